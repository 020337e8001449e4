"""Accounting: each tensor of a checkpoint is placed, dropped by a rule or reported; each of the model is found.

All that is wrong comes in one error, before a single tensor is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from opsin.errors import WeightError
from opsin.spec.rules import Constant, Layout
from opsin.weights.files import Checkpoint, Entry
from opsin.weights.rules import Match, Renamer, Shape

FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
SHOWN = 8
"""Lines per kind of problem; the rest is counted."""


@dataclass
class Account:
    """Where each tensor of the model comes from, and what does not add up."""

    layout: Layout
    placed: dict[str, tuple[Match, Entry]] = field(default_factory=dict)
    """Our name -> where it is."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Kind -> one line per tensor."""
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    """Our names and shapes."""
    constants: dict[str, tuple[Constant, Entry]] = field(default_factory=dict)
    """Name in the checkpoint -> what it has to hold and where it is, for tensors that the model has not."""
    filled: dict[str, float] = field(default_factory=dict)
    """Our name -> the only value of a tensor that the layout does not store."""
    absent: tuple[str, ...] = ()
    """Prefixes of `Layout.optional` of which the checkpoint holds nothing."""

    def add(self, kind: str, line: str) -> None:
        """Note a problem."""
        self.problems.setdefault(kind, []).append(line)


def choose_layout(layouts: Iterable[Layout], checkpoint: Checkpoint, *, part: str = "") -> Layout:
    """The layout that knows most of a checkpoint's names, or of those of one part; the first of equals."""
    return max(layouts, key=lambda layout: Renamer(layout).num_known(checkpoint.entries, part))


def account(checkpoint: Checkpoint, layout: Layout, expected: Mapping[str, Shape], *, part: str = "") -> Account:
    """Place every tensor.

    expected: our names and shapes. part: a prefix of our names; all other tensors are then left alone, because the file
    may hold a bigger model.
    """
    wanted = {name: shape for name, shape in expected.items() if name.startswith(part)}
    renamer, result = Renamer(layout), Account(layout, shapes=wanted)
    theirs = {match.source: name for name in wanted if (match := renamer.from_target(name)) is not None}
    due = {name: each for name, each in renamer.constants.items() if each.beside in wanted}
    for name, entry in checkpoint.entries.items():
        if name in renamer.constants:
            if (same := due.pop(name, None)) is None:
                continue
            result.constants[name] = (same, entry)
            if entry.shape != same.shape:
                result.add("mis-shaped", f"{name}   is {_sides(entry.shape)}, the config asks for {_sides(same.shape)}")
            continue
        matches = renamer.from_source(name)
        if not matches or any(match.target not in expected for match in matches):
            in_part = not part or any(match.target.startswith(part) for match in matches)
            if in_part and not renamer.drops(name):
                near = get_close_matches(name, theirs, n=1, cutoff=0.6) if _room(result, "unexpected") else []
                result.add("unexpected", f"{name}{f'   nearest known: {near[0]}' if near else ''}")
        elif matches[0].target in wanted:
            shape = matches[0].source_shape(wanted[matches[0].target])
            if entry.shape != shape:
                result.add("mis-shaped", f"{name}   is {_sides(entry.shape)}, the config asks for {_sides(shape)}")
            elif entry.dtype not in FLOATS:
                result.add("mis-typed", f"{name}   is {entry.dtype}; only {', '.join(sorted(FLOATS))} are read")
            result.placed |= {match.target: (match, entry) for match in matches}
    if not result.placed:
        what = f"no tensor of {part.rstrip('.')!r}" if part else "no tensor of this model"
        names = ", ".join(list(checkpoint.entries)[:3]) or "none at all"
        raise WeightError(
            f"{checkpoint.label} holds {what} under any name known here. "
            f"Its {len(checkpoint.entries)} tensors: {names}, ..."
        )
    for name, files in checkpoint.duplicates.items():
        result.add("duplicate", f"{name}   in {' and '.join(file.name for file in files)}")
    result.filled = {name: rule.value for name in wanted if (rule := renamer.fills(name)) is not None}
    missing = [name for name in wanted if name not in result.placed and name not in result.filled]
    result.absent = tuple(
        prefix
        for prefix in layout.optional
        if all(name in missing for name in wanted if name.startswith(prefix) and name not in result.filled) and not part
    )
    result.filled = {n: value for n, value in result.filled.items() if not n.startswith(result.absent or ("\0",))}
    for name in missing:
        if not name.startswith(result.absent or ("\0",)):
            source = renamer.from_target(name)
            result.add("missing", f"{name}{f' <- {source.source}' if source else ''}")
    for name in due:
        result.add("missing", name)
    return result


def raise_problems(accounts: Mapping[str, Account]) -> None:
    """Raise one WeightError for everything that several accounts, by label, found wrong."""
    wrong = {label: each for label, each in accounts.items() if each.problems}
    if not wrong:
        return
    texts = []
    for label, each in wrong.items():
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in each.problems.items())
        many = sum(len(lines) for lines in each.problems.values()) != 1
        lines = [f"{counts} key{'s' if many else ''} in {label} (read as layout {each.layout.name!r})"]
        for kind, found in each.problems.items():
            lines += [f"  {kind:<11} {line}" for line in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"  {kind:<11} ... and {len(found) - SHOWN} more")
        texts.append("\n".join(lines))
    raise WeightError("\n".join(texts))


def _room(result: Account, kind: str) -> bool:
    """Whether another line of this kind will be shown; looking for near names takes a while."""
    return len(result.problems.get(kind, ())) < SHOWN


def _sides(shape: Shape) -> str:
    return "x".join(str(side) for side in shape) or "a scalar"
