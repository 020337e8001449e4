"""Last stages: the trained model in half precision, and its card with the figures of an evaluation."""

import json
from pathlib import Path
from typing import Any

from opsin import weights
from opsin.evaluate.figures import MACRO
from opsin.mini.recipe import TRAINED

SHIPPED = "opsin-mini"
"""Folder, in the recipe's, of what the package carries."""
RESULTS = "results.json"
CARD = "README.md"
_BEGIN, _END = "<!-- figures: begin -->", "<!-- figures: end -->"


def ship(folder: Path) -> Path:
    """Write the model that the last stage left in `folder` to its folder `opsin-mini`, in float16; returns that.

    Ten bits of fraction are enough: nothing here comes near the range of float16, and halves the size.
    """
    model = weights.load(folder / TRAINED)
    out = folder / SHIPPED
    weights.save_native(out, model.vlm.half(), model.config, model.tokenizer)
    return out


def write_figures(card: Path, results: Path) -> None:
    """Put the figures of `opsin eval ... --task mini` between the marks of the card."""
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    lines = figures(json.loads(results.read_text(encoding="utf-8")))
    card.write_text(f"{before}{_BEGIN}\n{lines}\n{_END}{after}", encoding="utf-8")


def figures(results: dict[str, Any]) -> str:
    """The table of a results file of the task, in Markdown."""
    columns = ("real", "majority", "shuffled", "text-only")
    found = {
        column: {each["group"]: each for each in results["figures"].get(column, [])[::-1]}  # a group's first counts
        for column in columns
    }
    lines = [
        "| task | accuracy | 95 % interval | majority | shuffled | text only | questions |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    groups = [group for group in found["real"] if group != MACRO]
    for column in columns[1:]:  # a task without commonest answer (boxes) earns nothing by it
        shares = [found[column].get(group, {"value": 0.0})["value"] for group in groups]
        found[column].setdefault(MACRO, {"value": sum(shares) / len(shares)})
    for group, each in reversed(found["real"].items()):
        shares = [_percent(found[column].get(group, {}).get("value")) for column in columns[1:]]
        interval = f"{_percent(each['low'])} to {_percent(each['high'])}"
        lines.append(f"| {group} | {_percent(each['value'])} | {interval} | {' | '.join(shares)} | {each['number']} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
