"""Loss curves as SVG, written by hand: one drawing per training stage, readable on light and on dark ground."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.errors import DataError
from opsin.inspect._html import escape

WIDTH, HEIGHT = 420, 290
"""Size of the drawing's own units. Small, so that 12-unit text stays readable where a phone shrinks it."""
_LEFT, _RIGHT, _TOP = 46, 372, 14
_LOSS_BOTTOM, _RATE_TOP, _RATE_BOTTOM = 196, 218, 246
_MAX_POINTS = 600
_STYLE = """
.opsin-curve{--curve-ink:#2b3140;--curve-soft:#667085;--curve-grid:#e3e6ec;--curve-line:#2f5fd0;--curve-rate:#b4690e;
font:12px system-ui,sans-serif}
@media (prefers-color-scheme:dark){.opsin-curve{--curve-ink:#e6e9f0;--curve-soft:#98a2b3;--curve-grid:#323847;
--curve-line:#8fb0ff;--curve-rate:#f0b45f}}
.opsin-curve text{fill:var(--curve-soft)}.opsin-curve .value{fill:var(--curve-ink);font-weight:600}
.opsin-curve .grid{stroke:var(--curve-grid)}.opsin-curve .axis{stroke:var(--curve-soft)}
.opsin-curve .raw{fill:none;stroke:var(--curve-line);stroke-opacity:.32}
.opsin-curve .smooth{fill:none;stroke:var(--curve-line);stroke-width:2.5;stroke-linejoin:round;stroke-linecap:round}
.opsin-curve .end{fill:var(--curve-line)}
.opsin-curve .rate{fill:var(--curve-rate);fill-opacity:.22;stroke:var(--curve-rate);stroke-width:1.5}
""".replace("\n", "")


@dataclass(frozen=True)
class Curve:
    """What one stage logged, one entry per log row."""

    stage: str
    steps: tuple[int, ...]
    """Optimizer steps, counted over the whole run."""
    losses: tuple[float, ...]
    """Mean loss over the taught tokens, in nats."""
    rates: tuple[float, ...]
    """The highest learning rate of any parameter group."""


def curves_of(rows: Iterable[Mapping[str, Any]], *, where: str = "log") -> tuple[Curve, ...]:
    """Log rows to one curve per stage, in order of appearance. Of two rows of one step, the later counts.

    Rows without a loss (notes, evaluations) are passed over. Raises DataError for one that lacks its stage or step.
    """
    stages: dict[str, dict[int, tuple[float, float]]] = {}
    for number, row in enumerate(rows, start=1):
        if "loss" not in row:
            continue
        try:
            rate = row["lr"]
            highest = max(rate.values(), default=0.0) if isinstance(rate, Mapping) else rate
            stages.setdefault(str(row["stage"]), {})[int(row["step"])] = (float(row["loss"]), float(highest))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}, row {number}: not a training log row ({type(error).__name__}: {error}); it needs stage, "
                "step, loss and lr"
            ) from None
    curves = []
    for stage, by_step in stages.items():
        steps = tuple(sorted(by_step))
        losses, rates = zip(*(by_step[step] for step in steps), strict=True)
        curves.append(Curve(stage, steps, losses, rates))
    return tuple(curves)


def read_curves(path: Path) -> tuple[Curve, ...]:
    """Curves from a `log.jsonl`. A last line that was cut short is passed over; other broken ones raise DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot read the training log ({error.strerror})") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from None
        rows.append(row if isinstance(row, dict) else {})
    return curves_of(rows, where=str(path))


def loss_svg(curve: Curve) -> str:
    """One stage: logged losses (thin), their running mean (thick), and the learning rate below. A whole SVG document.

    The loss axis is logarithmic where the running mean spans more than a factor of 8.
    """
    losses, steps = np.array(curve.losses, np.float64), np.array(curve.steps, np.float64)
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    rates = np.array(curve.rates, np.float64)[finite]
    if not len(losses):
        return _document(curve.stage, "no loss was logged", [_text(WIDTH / 2, 100, "no loss was logged", "middle")])
    mean, window = running_mean(losses)
    scale = _LossScale(losses, mean)
    across = _linear(float(steps[0]), float(steps[-1]), _LEFT, _RIGHT)
    parts = []
    for tick in scale.ticks:
        y = scale.y(tick)
        parts += [_line("grid", _LEFT, y, _RIGHT, y), _text(_LEFT - 6, y + 4, _number(tick), "end")]
    for tick in nice_ticks(float(steps[0]), float(steps[-1]), 5):
        x = across(tick)
        parts += [_line("grid", x, _TOP, x, _LOSS_BOTTOM), _line("axis", x, _RATE_BOTTOM, x, _RATE_BOTTOM + 4)]
        parts.append(_text(x, _RATE_BOTTOM + 17, f"{tick:,.0f}", "middle"))
    keep = np.unique(np.linspace(0, len(losses) - 1, min(len(losses), _MAX_POINTS)).round().astype(np.int64))
    xs = [across(step) for step in steps[keep]]
    parts.append(_path("raw", xs, [scale.y(loss) for loss in losses[keep]]))
    parts.append(_path("smooth", xs, [scale.y(loss) for loss in mean[keep]]))
    end_y = scale.y(float(mean[-1]))
    parts.append(f'<circle class="end" cx="{xs[-1]:.1f}" cy="{end_y:.1f}" r="3.5"/>')
    parts.append(_text(_RIGHT + 8, end_y + 4, _number(float(mean[-1])), "start", "value"))
    parts.append(_line("axis", _LEFT, _LOSS_BOTTOM, _RIGHT, _LOSS_BOTTOM))
    peak = float(rates.max())
    height = _linear(0.0, peak or 1.0, _RATE_BOTTOM, _RATE_TOP)
    area = " L".join(f"{x:.1f},{height(rate):.1f}" for x, rate in zip(xs, rates[keep], strict=True))
    parts.append(f'<path class="rate" d="M{xs[0]:.1f},{_RATE_BOTTOM} L{area} L{xs[-1]:.1f},{_RATE_BOTTOM}"/>')
    parts.append(_line("axis", _LEFT, _RATE_BOTTOM, _RIGHT, _RATE_BOTTOM))
    parts.append(_text(_LEFT - 6, _RATE_TOP + 18, "rate", "end"))
    parts.append(_text(_RIGHT + 8, _RATE_TOP + 8, f"{peak:.0e}".replace("e-0", "e-").replace("e+0", "e"), "start"))
    parts.append(_text(_RIGHT, HEIGHT - 8, "step", "end"))
    kind = "loss, log scale" if scale.logarithmic else "loss"
    smoothing = f"thick: running mean of {window}" if window > 1 else "every entry of the log"
    parts.append(_text(_LEFT, HEIGHT - 8, f"{kind}; {smoothing}", "start"))
    summary = f"loss from {_number(float(mean[0]))} to {_number(float(mean[-1]))} over {len(losses)} entries"
    return _document(curve.stage, summary, parts)


def running_mean(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Centred mean over an odd window of about a twentieth of the values, which shrinks at both ends; and its width."""
    window = 2 * (len(values) // 40) + 1
    kernel = np.ones(window)
    sums = np.convolve(values, kernel, mode="same")
    return sums / np.convolve(np.ones(len(values)), kernel, mode="same"), window


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _LossScale:
    """Where a loss stands on the drawing. Rare spikes above the frame are drawn on its edge."""

    def __init__(self, losses: NDArray[np.float64], mean: NDArray[np.float64]) -> None:
        self.logarithmic = bool(losses.min() > 0 and mean.max() > 8 * mean.min())
        high = max(float(np.quantile(losses, 0.99)), float(mean.max()))
        if self.logarithmic:
            low = min(float(np.quantile(losses, 0.01)), float(mean.min()))
            self._low, self._high = math.log10(low), math.log10(high)
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            factors = (1, 2, 5) if self._high - self._low < 2.2 else (1,)
            all_ticks = [factor * 10.0**decade for decade in decades for factor in factors]
            self.ticks = [tick for tick in all_ticks if low <= tick <= high]
        else:
            self._low, self._high = min(0.0, float(losses.min())), high if high > 0 else 1.0
            self.ticks = nice_ticks(self._low, self._high, 5)
        self._place = _linear(self._low, self._high, _LOSS_BOTTOM, _TOP)

    def y(self, loss: float) -> float:
        value = math.log10(loss) if self.logarithmic else loss
        return self._place(min(max(value, self._low), self._high))


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The map that takes low..high to start..end; the middle where both are one value."""
    if high <= low:
        return lambda _: (start + end) / 2
    return lambda value: start + (float(value) - low) / (high - low) * (end - start)


def _number(value: float) -> str:
    """Three digits at most, without needless zeros."""
    return f"{value:.3g}" if 0.001 <= abs(value) < 1000 or not value else f"{value:.0e}"


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    name = f' class="{style}"' if style else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(style: str, x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line class="{style}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _path(style: str, xs: Sequence[float], ys: Sequence[float]) -> str:
    points = " L".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    return f'<path class="{style}" d="M{points}"/>'


def _document(stage: str, summary: str, parts: Sequence[str]) -> str:
    label = escape(f"{stage}: {summary}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="opsin-curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}"><title>{label}</title><style>{_STYLE}</style>{"".join(parts)}</svg>'
    )
