"""Every recorded case is run by its family and kind. `pytest tests/parity --goldens DIR --tokenizers DIR`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from parity import (
    kinds_blip2,
    kinds_data,
    kinds_internvl,
    kinds_internvl_text,
    kinds_media,
    kinds_model,
    kinds_qwen2_vl,
    kinds_qwen_vl,
    kinds_text,
)
from parity.case import Case, find_cases

SUPPORTED = {"blip2", "llava", "internvl", "qwen2_vl", "qwen_vl"}
"""Families that are built. A case of any other family is skipped; one of these must be understood."""

FAMILY_MODULES = (kinds_blip2, kinds_internvl, kinds_internvl_text, kinds_qwen2_vl, kinds_qwen_vl)
"""Modules whose RUNNERS are named by (family, kind)."""

Runner = Callable[[Case], None]


def collect_runners(family: str) -> dict[str, Runner]:
    """Runner by kind, over all modules; a kind belongs to one module. A family's own runner comes first."""
    runners: dict[str, Runner] = {}
    for module in (kinds_media, kinds_text, kinds_model, kinds_data):
        twice = runners.keys() & module.RUNNERS.keys()
        assert not twice, f"{module.__name__} runs {sorted(twice)}, which another module already runs"
        runners |= module.RUNNERS
    for own in FAMILY_MODULES:
        runners |= {kind: runner for (name, kind), runner in own.RUNNERS.items() if name == family}
    return runners


def run(folder: Path, tokenizers: Path) -> None:
    """Run one case folder: passes, fails, or skips when its family is not built yet."""
    try:
        case = Case.load(folder, tokenizers)
    except (ValueError, OSError) as error:
        pytest.fail(f"case cannot be read: {error}", pytrace=False)
    if case.family not in SUPPORTED:
        pytest.skip(f"family {case.family!r} is not built yet")
    runners = collect_runners(case.family)
    if case.kind not in runners:
        pytest.fail(
            f"{folder}: kind {case.kind!r} of family {case.family!r} is unknown; runners exist for "
            f"{', '.join(sorted(runners))}",
            pytrace=False,
        )
    runners[case.kind](case)


def test_recorded_outputs_are_reproduced(golden: Path, tokenizers: Path) -> None:
    run(golden, tokenizers)


def _write_case(folder: Path, **data: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "case.json").write_text(json.dumps(data))
    return folder


def test_cases_are_found_at_any_depth_and_copies_run_once(tmp_path: Path) -> None:
    first = _write_case(tmp_path / "a" / "deep" / "folder", family="llava", kind="size_table")
    _write_case(tmp_path / "b" / "copy", family="llava", kind="size_table")
    other = _write_case(tmp_path / "b" / "other", family="llava", kind="labels")
    assert find_cases([tmp_path / "a", tmp_path / "b"]) == [first, other]


def test_a_kind_that_nobody_runs_fails(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="kind 'telepathy'"):
        run(_write_case(tmp_path / "x", family="llava", kind="telepathy"), tmp_path)


def test_a_family_that_is_not_built_is_skipped(tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="'perceiver' is not built yet"):
        run(_write_case(tmp_path / "x", family="perceiver", kind="model"), tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "model"}'], ids=["empty", "cut", "list", "no family"])
def test_a_case_that_cannot_be_read_fails(tmp_path: Path, text: str) -> None:
    (tmp_path / "case.json").write_text(text)
    with pytest.raises(pytest.fail.Exception, match="cannot be read"):
        run(tmp_path, tmp_path)
