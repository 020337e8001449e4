"""The findings of `opsin data check`, for people and for programs."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from opsin.cli._datasets import Dataset
from opsin.data.check import DataCheck, Totals, fix, open_file, severity
from opsin.data.defects import defect
from opsin.data.problems import Problem
from opsin.errors import OpsinError
from opsin.spec.recipe import DataFile

COLOURS = {"error": "red", "warning": "yellow"}


@dataclass(frozen=True)
class Findings:
    """What was found in one set of files."""

    dataset: Dataset
    problems: tuple[Problem, ...]
    totals: Totals

    @property
    def num_errors(self) -> int:
        """Problems that training stops at."""
        return sum(severity(each) == "error" for each in self.problems)


def check_all(datasets: Sequence[Dataset], held_out: Sequence[str], image_root: str | None) -> list[Findings]:
    """Check every set. Files that cannot be opened at all are problems too."""
    found = []
    for dataset in datasets:
        check = DataCheck(dataset.rules)
        for file in (*dataset.held_out, *(DataFile(path=path, image_root=image_root) for path in held_out)):
            check.hold_out(open_file(file))
        problems: list[Problem] = []
        for file in _different(dataset.files):
            try:
                problems += check.check(open_file(file))
            except OpsinError as error:
                told = error.message.removeprefix(file.path).lstrip(": ")
                problems.append(Problem(file.path, error.kind or "file", told, error.fix))
        found.append(Findings(dataset, tuple(problems), check.totals))
    return found


def _different(files: Sequence[DataFile]) -> list[DataFile]:
    """Each once, whatever its share of an epoch."""
    return list({repr(file.replace(repeat=1, weight=None)): file for file in files}.values())


def print_findings(findings: Sequence[Findings], *, show: int) -> None:
    """Totals, then problems by kind. show: how many of each; 0 for all."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for each in findings:
        if each.dataset.name:
            console.print(f"stage {each.dataset.name}", style="bold")
        for line in _describe(each.totals):
            console.print(line)
        if each.dataset.note:
            console.print(each.dataset.note, style="dim")
        kinds = Counter(problem.kind for problem in each.problems)
        for kind in sorted(kinds, key=lambda kind: (defect(kind).severity, -kinds[kind])):
            _print_kind(console, kind, [problem for problem in each.problems if problem.kind == kind], show)
        warnings = len(each.problems) - each.num_errors
        console.print(f"{each.num_errors:,} errors, {warnings:,} warnings", style="bold")


def _print_kind(console: Console, kind: str, problems: Sequence[Problem], show: int) -> None:
    what = defect(kind)
    console.print()
    console.print(
        Text.assemble((f"{what.severity} {kind}", COLOURS[what.severity]), f" x {len(problems)}: {what.title}")
    )
    shown = problems[:show] if show else problems
    for problem in shown:
        console.print(f"  {problem.where}: {problem.message}")
        console.print(f"    -> {fix(problem)}", style="dim")
    if len(shown) < len(problems):
        console.print(f"  and {len(problems) - len(shown):,} more (--show 0 prints all)", style="dim")


def to_json(findings: Sequence[Findings]) -> str:
    """All findings as one object."""
    sets: list[dict[str, Any]] = [
        {
            "stage": each.dataset.name,
            "files": [file.path for file in each.dataset.files],
            **_numbers(each.totals),
            "not_looked_at": each.dataset.note,
            "errors": each.num_errors,
            "warnings": len(each.problems) - each.num_errors,
            "problems": [
                {
                    "where": problem.where,
                    "kind": problem.kind,
                    "severity": severity(problem),
                    "message": problem.message,
                    "fix": fix(problem),
                }
                for problem in each.problems
            ],
        }
        for each in findings
    ]
    return json.dumps({"sets": sets}, indent=1, ensure_ascii=False)


def _numbers(totals: Totals) -> dict[str, Any]:
    lengths = sorted(totals.tokens)
    counted = {
        "tokens": sum(lengths),
        "image_tokens": totals.image_tokens,
        "supervised": totals.supervised,
        "longest": lengths[-1] if lengths else 0,
        "median": lengths[len(lengths) // 2] if lengths else 0,
        "shortened": totals.shortened,
        "dropped": totals.dropped,
    }
    return {
        "records": totals.records,
        "pictures": totals.pictures,
        "videos": totals.videos,
        **(counted if lengths else {}),
    }


def _describe(totals: Totals) -> list[str]:
    numbers = _numbers(totals)
    videos = f", {totals.videos:,} videos" if totals.videos else ""
    lines = [f"{totals.records:,} records, {totals.pictures:,} different pictures{videos}"]
    if totals.tokens:
        lines.append(
            f"{numbers['tokens']:,} tokens ({numbers['image_tokens']:,} of pictures, {numbers['supervised']:,} taught)"
            f"; a record has {numbers['median']:,} in the middle and {numbers['longest']:,} at most"
        )
    if totals.shortened or totals.dropped:
        lines.append(f"{totals.shortened:,} too long and shortened, {totals.dropped:,} too long and dropped")
    return lines
