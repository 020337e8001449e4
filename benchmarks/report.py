"""What was measured, as a table for the terminal and the docs, and as JSON."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

BEGIN, END = "<!-- begin: written by benchmarks/inference.py -->", "<!-- end -->"
OTHER = "transformers"


@dataclass(frozen=True)
class Measurement:
    """One phase of one model: a number per round for each library, taken right after each other."""

    phase: str
    model: str
    """The column; empty where the phase does not depend on a model."""
    unit: Literal["s", "bytes"]
    opsin: tuple[float, ...]
    transformers: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """transformers / opsin, round by round: above 1, opsin is faster or smaller."""
        return [theirs / ours for ours, theirs in zip(self.opsin, self.transformers, strict=True)]

    @property
    def ratio(self) -> float:
        """The median round's."""
        return statistics.median(self.ratios)

    def cell(self) -> str:
        """`1.52x (1.40-1.61), 12 / 18 ms`."""
        ours, theirs = statistics.median(self.opsin), statistics.median(self.transformers)
        span = f" ({min(self.ratios):.2f}-{max(self.ratios):.2f})" if len(self.ratios) > 1 else ""
        return f"{self.ratio:.2f}x{span}, {_amounts(ours, theirs, self.unit)}"


def _amounts(ours: float, theirs: float, unit: str) -> str:
    if unit == "bytes":
        return f"{ours / 2**20:.0f} / {theirs / 2**20:.0f} MiB"
    if theirs < 1:
        digits = 1 if ours < 0.1 else 0
        return f"{ours * 1e3:.{digits}f} / {theirs * 1e3:.{digits}f} ms"
    return f"{ours:.2f} / {theirs:.2f} s"


def tables(measurements: Sequence[Measurement]) -> str:
    """Markdown: phases that depend on a model with a column for each, then the others."""
    alone = [each for each in measurements if not each.model]
    columns = list(dict.fromkeys(each.model for each in measurements if each.model))
    cells = {(each.phase, each.model): each.cell() for each in measurements}
    rows = [["phase", "times as good, opsin / transformers"], *([each.phase, each.cell()] for each in alone)]
    phases = dict.fromkeys(each.phase for each in measurements if each.model)
    table = [["phase", *columns], *([phase, *(cells.get((phase, c), "") for c in columns)] for phase in phases)]
    return f"{_table(table)}\n\n{_table(rows)}" if phases else _table(rows)


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def verdict(measurements: Sequence[Measurement]) -> str:
    """Names what is slower or bigger than with transformers, if anything."""
    worse = [
        f"{each.phase} ({each.model or 'any model'}: {each.ratio:.2f}x)" for each in measurements if each.ratio < 1
    ]
    return f"Behind {OTHER}: {', '.join(worse)}." if worse else f"Nothing is behind {OTHER}."


def surroundings(threads: int) -> dict[str, Any]:
    """The machine and the versions that a number belongs to."""
    names = ("opsin", "torch", "transformers", "safetensors", "pillow", "numpy")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _cpu() -> str:
    """The processor's name and, where they tell more than it, the instructions that matter here."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    info = {key.strip(): value.strip() for key, value in lines.items()}
    flags = info.get("flags", "").split()
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{info.get('model name', platform.machine())} ({', '.join(has)})"


def as_json(measurements: Sequence[Measurement], **context: Any) -> dict[str, Any]:
    """Everything, for machines."""
    results = [asdict(each) | {"ratios": each.ratios, "ratio": each.ratio} for each in measurements]
    return context | {"results": results}


def update_docs(page: Path, text: str) -> None:
    """Replace what stands between the markers of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no place for the result: it needs the lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
