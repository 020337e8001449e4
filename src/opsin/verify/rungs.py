"""The rungs of the ladder, and the comparison of two climbs of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Verdict = Literal["equal", "differs", "skipped"]

RUNGS: dict[str, str] = {
    "pixels": "how the picture is resampled (Pillow's version, a torch resize), padded or cropped, or image_mean and "
    "image_std in preprocessor_config.json",
    "ids": "the tokenizer: its normaliser, its added tokens, or a space before the first word",
    "positions": "the position rule: M-RoPE after a picture, or counting that does not begin at 0",
    "features": "the vision tower: which layer is read (off by one), the class token, its activation, its epsilon, or "
    "its weights",
    "rows": "the connector: its weights or activation; or how rows are laid out (newlines, rounding of the unpadding); "
    "or the token embeddings' width",
    "first layer": "the decoder's rotation (rope theta, NTK scaling, sections), its norm's epsilon, its grouped keys, "
    "or the weights of layer 0",
    "last layer": "the weights of a layer after the first, a mask, or the number of layers",
    "logits": "the final norm, or the head (tied or its own)",
    "greedy": "the cache or the positions of later tokens; or a tie, which rounding decides",
}
"""Every rung, in order, and what usually causes the first difference there."""

LOSS = {"loss": "which tokens are taught, or over what their mean is taken"}
"""A rung behind the logits that only recorded cases have, where they recorded one."""

HALVES = "; in half precision also plain rounding: run it again with --dtype float32"

TOLERANCES = {"float64": 1e-9, "float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest allowed error by dtype, as a share of the largest number on the other side. Two orders of adding the same
float32 numbers differ by about 1e-6 of it, a wrong constant by more than 1e-3; half precisions carry 11 and 8 bits, and
lose some on the way through the layers."""

PIXEL_TOLERANCE = 1e-5
"""Pixels are normalised in float32 whatever the model computes in."""


@dataclass
class Trace:
    """One climb: what stood at each rung, and why a rung has nothing."""

    values: dict[str, NDArray[Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One rung compared."""

    rung: str
    verdict: Verdict
    error: float | None = None
    """Largest absolute difference; None where there is none to speak of: skipped, or shapes that differ."""
    tolerance: float | None = None
    relative: float = 0.0
    """What a recorded tolerance allows more, as a share of each recorded number."""
    note: str = ""


@dataclass(frozen=True)
class Ladder:
    """All rungs, compared."""

    model: str
    reference: str
    """What it was compared with."""
    dtype: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @property
    def first_difference(self) -> Step | None:
        """The lowest rung that differs."""
        return next((step for step in self.steps if step.verdict == "differs"), None)

    @property
    def not_compared(self) -> str:
        """`; ids, pixels not compared: why`, once for each reason."""
        reasons: dict[str, list[str]] = {}
        for step in self.steps:
            if step.verdict == "skipped":
                reasons.setdefault(step.note, []).append(step.rung)
        return "".join(f"; {', '.join(rungs)} not compared: {reason}" for reason, rungs in reasons.items())

    @property
    def conclusion(self) -> str:
        """One line: the first rung that differs and the likely cause; and what was not compared."""
        first = self.first_difference
        if first is None:
            equal = sum(step.verdict == "equal" for step in self.steps)
            return (
                f"{self.model} computes what {self.reference} computes: {equal} of {len(self.steps)} rungs equal"
                f"{self.not_compared}."
            )
        half = HALVES if self.dtype in ("float16", "bfloat16") else ""
        return (
            f"The first rung that differs is {first.rung}. Likely cause: {(RUNGS | LOSS)[first.rung]}{half}"
            f"{self.not_compared}."
        )


@dataclass(frozen=True)
class Pair:
    """Our numbers and recorded ones. Each of ours may be off by atol + rtol * |the recorded one|."""

    ours: NDArray[Any]
    recorded: NDArray[Any]
    atol: float = 0.0
    rtol: float = 0.0


def compare(ours: Trace, theirs: Trace, *, dtype: str) -> list[Step]:
    """Compare two climbs rung by rung."""
    steps = []
    for rung in RUNGS:
        reasons = [trace.missing.get(rung, "not recorded") for trace in (ours, theirs) if rung not in trace.values]
        if reasons:
            steps.append(Step(rung, "skipped", note=reasons[0]))
            continue
        there = theirs.values[rung]
        allowed = 0.0
        if rung == "pixels":
            allowed = PIXEL_TOLERANCE
        elif not np.issubdtype(there.dtype, np.integer):
            allowed = TOLERANCES[dtype] * float(np.abs(there).max(initial=0))
        steps.append(_compare(rung, [Pair(ours.values[rung], there, allowed)]))
    return steps


def compare_recorded(pairs: Iterable[tuple[str, Pair]], missing: Mapping[str, str]) -> list[Step]:
    """Compare by rung; several pairs of a rung count as one. missing: why a rung may have none.

    A loss is compared where there is one.
    """
    by_rung: dict[str, list[Pair]] = {}
    for rung, pair in pairs:
        by_rung.setdefault(rung, []).append(pair)
    return [
        _compare(rung, by_rung[rung])
        if rung in by_rung
        else Step(rung, "skipped", note=missing.get(rung, "not recorded"))
        for each in RUNGS
        for rung in ((each, *LOSS) if each == "logits" and LOSS.keys() & by_rung else (each,))
    ]


def _compare(rung: str, pairs: Sequence[Pair]) -> Step:
    for pair in pairs:
        if pair.ours.shape != pair.recorded.shape:
            return Step(rung, "differs", note=f"shape {pair.ours.shape} here, {pair.recorded.shape} there")
    errors = [np.abs(pair.ours.astype(np.float64) - pair.recorded) for pair in pairs]
    # NaN is within nothing.
    wrong = [
        ~(error <= pair.atol + pair.rtol * np.abs(pair.recorded)) for error, pair in zip(errors, pairs, strict=True)
    ]
    apart = max(float(error.max(initial=0)) for error in errors)
    count, total = sum(int(each.sum()) for each in wrong), sum(each.size for each in wrong)
    note = f"{count} of {total} differ" if count else ""
    return Step(rung, "differs" if count else "equal", apart, pairs[0].atol, pairs[0].rtol, note)


Tap = tuple[nn.Module, str]
"""A module, and what to keep of a call: `output`, or the name of an argument."""


@contextmanager
def tapped(taps: Mapping[str, Tap]) -> Iterator[dict[str, Tensor]]:
    """What passes the tapped modules while the context is open, by the taps' names; of several calls the first."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, argument: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = (
                output if argument == "output" else signature(module.forward).bind(*args, **kwargs).arguments[argument]
            )
            value = getattr(value, "last_hidden_state", value)
            kept.setdefault(name, value[0] if isinstance(value, tuple) else value)

        return hook

    handles = [
        module.register_forward_hook(keep(name, argument), with_kwargs=True)
        for name, (module, argument) in taps.items()
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor as numpy has it; half precision widened, which numpy lacks."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor).numpy()
