"""The figures of a finished experiment as one page: runs/ucm/report.md, and curves beside it.

python experiments/ucm/report.py [--update-docs]
"""

import argparse
import json
import platform
import re
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from run import FACTS, OUT

from opsin.inspect.curves import loss_svg, read_curves

DOCS = Path(__file__).parents[2] / "docs" / "experiments"
WAYS = ("picture to text", "text to picture")
CUTOFFS = ("R@1", "R@5", "R@10")
STAGES = ("stage1", "captions")
CURVES = "![Loss of stage 1](ucm-stage1.svg) ![Loss of stage 2](ucm-captions.svg)"


def figures(task: str) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Of one evaluation: control -> (group, figure) -> value, low, high."""
    results = json.loads((OUT / "eval" / task / "results.json").read_text(encoding="utf-8"))
    return {
        control: {(each["group"], each["figure"]): each for each in several}
        for control, several in results["figures"].items()
    }


def percent(figure: dict[str, Any]) -> str:
    """53.3 (46.7 to 60.0), or the value alone where it has no interval."""
    value, low, high = (None if figure[key] is None else 100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:.1f}" if low is None else f"{value:.1f} ({low:.1f} to {high:.1f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def retrieval(controls: dict[str, Any]) -> str:
    """Recall both ways, by who ranks."""
    contrast, matching = figures("contrast"), figures("matching")
    rows = []
    for way in WAYS:
        for name, found in (
            ("contrast", contrast["real"]),
            ("matching, of the best 32", matching["real"]),
            ("contrast, another picture", contrast["shuffled"]),
            ("matching, another picture", matching["shuffled"]),
            ("chance", contrast["chance"]),
        ):
            rows.append((f"{way}: {name}", *(percent(found[way, cutoff]) for cutoff in CUTOFFS)))
        levels = controls["retrieval by the kind alone"][way]
        rows.append((f"{way}: the kind of land alone", *(f"{100 * level:.1f}" for level in levels)))
    return table(("recall, %", *CUTOFFS), rows)


def captions(controls: dict[str, Any]) -> str:
    """CIDEr-D, by who writes."""
    found = figures("describe")
    scores = {name: next(iter(of.values())) for name, of in found.items()}
    levels = controls["CIDEr-D"]
    rows = [
        ("stage 2", scores["real"]),
        ("stage 2, another picture", scores["shuffled"]),
        ("stage 2, no picture", scores["text-only"]),
        (f'one caption for all ("{levels["one caption"]}")', levels["one caption for all"]),
        ("the kind of land alone", levels["the kind alone"]),
    ]
    return table(("CIDEr-D, times 100", "value (95 %)"), [(name, percent(figure)) for name, figure in rows])


def costs() -> str:
    """Time and memory of each step."""
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    rows = [
        (name, f"{each['minutes']:.1f}", f"{each['cpu_minutes']:.1f}", f"{each['peak_mib']:.0f}")
        for name, each in facts.items()
    ]
    total = [sum(each[key] for each in facts.values()) for key in ("minutes", "cpu_minutes")]
    rows.append(("all", *(f"{each:.1f}" for each in total), ""))
    return table(("step", "minutes", "minutes of a core", "peak MiB"), rows)


def losses() -> str:
    """What each stage's loss was on pictures held back, while it trained."""
    rows = []
    for name in STAGES:
        for line in (OUT / name / "log.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "evaluation" in row:
                rows.append((name, f"{row['step']:,}", f"{row['evaluation']['loss']:.3f}"))
    return table(("stage", "steps", "loss on validation pairs"), rows)


def put(page: str, name: str, text: str) -> str:
    """The page with a text between its two marks of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page, count = re.subn(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
    assert count == 1, f"the page has no place for {name}"
    return page


def main() -> None:
    """Write the report, and the page of the docs where it is asked for."""
    parser = argparse.ArgumentParser(description="Write the figures of this experiment.")
    parser.add_argument("--update-docs", action="store_true")
    given = parser.parse_args()
    controls = json.loads((OUT / "controls.json").read_text(encoding="utf-8"))
    machine = (
        f"{date.today()}, {platform.system()} {platform.machine()}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}:"
    )
    parts = {
        "retrieval": retrieval(controls),
        "captions": captions(controls),
        "losses": f"{CURVES}\n\n{losses()}",
        "costs": f"{machine}\n\n{costs()}",
    }
    (OUT / "report.md").write_text("\n\n".join(parts.values()) + "\n", encoding="utf-8")
    print("\n\n".join(parts.values()))
    for folder in (OUT, DOCS) if given.update_docs else (OUT,):
        for name in STAGES:
            (curve,) = read_curves(OUT / name / "log.jsonl")
            (folder / f"ucm-{name}.svg").write_text(loss_svg(curve) + "\n", encoding="utf-8")
    if given.update_docs:
        page = (DOCS / "ucm.md").read_text(encoding="utf-8")
        for name, text in parts.items():
            page = put(page, name, text)
        (DOCS / "ucm.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
