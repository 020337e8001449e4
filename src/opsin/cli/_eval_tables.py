"""`opsin eval`: its tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from opsin.evaluate.compare import Comparison

BESIDE = ("shuffled", "text-only", "majority", "chance")
"""What stands beside the real figures, where it was measured."""


def facts_text(results: dict[str, Any]) -> str:
    """What the figures are of."""
    parsers = ", ".join(dict.fromkeys(results["parsers"].values()))
    model = Path(results["model"])
    near = model.is_absolute() and model.is_relative_to(Path.cwd())
    name = str(model.relative_to(Path.cwd())) if near else results["model"]
    count, pictures = results["examples"], results["bootstrap"]["pictures"]
    lines = [f"{name} on {results['task']}: {count} examples of {pictures} pictures"]
    if "prompt" in results:
        decoding = ", ".join(f"{name} {value}" for name, value in results["decoding"].items())
        lines += [f"parser {parsers}; {decoding}; prompt {results['prompt']!r}"]
    return "\n".join(lines)


def results_table(results: dict[str, Any]) -> Table:
    """Every figure with its interval, and those of the controls."""
    figures = results["figures"]
    beside = [name for name in BESIDE if name in figures]
    known = {name: {(each["group"], each["figure"]): each["value"] for each in figures[name]} for name in beside}
    has_groups = len({each["group"] for each in figures["real"]}) > 1
    table = _table([*(["group"] if has_groups else []), "figure"], ["value", "95 % interval", "number", *beside])
    last = None
    for each in figures["real"]:
        named = [each["group"] if each["group"] != last else ""] if has_groups else []
        last = each["group"]
        others = [_number(known[name].get((each["group"], each["figure"]))) for name in beside]
        interval = _interval(each["low"], each["high"])
        table.add_row(*named, each["figure"], _number(each["value"]), interval, str(each["number"]), *others)
    return table


def comparison_table(found: "Comparison") -> Table:
    """Both values of every figure and their difference."""
    has_groups = len({each.group for each in found.figures}) > 1
    columns = [*(["group"] if has_groups else []), "figure"]
    table = _table(columns, [found.first, found.second, "difference", "95 % interval", "p", "number"])
    last = None
    for each in found.figures:
        named = [each.group if each.group != last else ""] if has_groups else []
        last = each.group
        table.add_row(
            *named,
            each.figure,
            _number(each.first),
            _number(each.second),
            f"{each.difference:+.4f}",
            _interval(each.low, each.high, signed=True),
            "" if each.p_value is None else f"{each.p_value:.4f}",
            str(each.number),
        )
    return table


def tasks_table() -> Table:
    """Built-in tasks, what they measure and how outputs can be read."""
    from opsin.evaluate.metrics import METRICS
    from opsin.evaluate.tasks import DEFAULTS, MADE

    table = _table(["task", "metric", "what it measures", "parsers"], [])
    for name, settings in DEFAULTS.items():
        metric = METRICS[settings.metric]
        table.add_row(name, metric.name, metric.about, ", ".join(metric.parsers))
    for name in MADE:
        table.add_row(name, "", "examples of its own; needs no --data", "")
    return table


def _table(left: list[str], right: list[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    if low is None or high is None:
        return "none"
    return f"{low:+.4f} to {high:+.4f}" if signed else f"{low:.4f} to {high:.4f}"
