"""What the benchmarks share: the table they print, and its place in docs/benchmarks.md."""

import platform
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs/benchmarks.md"


def table(first: str, rows: Sequence[Sequence[str]]) -> str:
    """Markdown. first: the head of the first column."""
    head = [first, "dtype", "phase", "opsin", "transformers", "ratio", "range"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 3 + "---:|" * 4]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def update_docs(name: str, text: str, *, threads: int) -> None:
    """Put a table where the page has `<!-- NAME: begin -->`, under the command and the machine that made it."""
    import torch
    import transformers

    stamp = (
        f"`{' '.join([f'python benchmarks/{name}.py', *sys.argv[1:]])}`, {date.today()}, {processor_name()}, {threads} "
        f"threads, torch {torch.__version__}, transformers {transformers.__version__}:"
    )
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page, count = re.subn(
        f"{begin}.*{end}",
        lambda _: f"{begin}\n{stamp}\n\n{text}\n{end}",
        DOCS.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    assert count == 1, f"{DOCS} has no place for {name}"
    DOCS.write_text(page, encoding="utf-8")


def processor_name() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def peak_bytes() -> int:
    """Most memory that this process has held. Not `ru_maxrss`: that starts at the peak of the process it came from."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
