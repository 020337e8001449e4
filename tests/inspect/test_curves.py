"""Loss curves."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from opsin.errors import DataError
from opsin.inspect.curves import HEIGHT, WIDTH, Curve, curves_of, loss_svg, nice_ticks, read_curves, running_mean


def falling(count: int = 200, *, end: float = 0.1) -> Curve:
    """A loss that falls from about 3 to `end`."""
    steps = tuple(range(1, count + 1))
    losses = tuple(end + 3 * math.exp(-8 * step / count) + 0.02 * math.sin(step) for step in steps)
    return Curve("stage <2> & more", steps, losses, tuple(1e-3 * (1 - step / count) for step in steps))


CURVES = {
    "falling": falling(),
    "flat": Curve("flat", (1, 2, 3), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    "single": Curve("single", (7,), (2.0,), (1e-4,)),
    "negative": Curve("negative", (1, 2, 3), (-1.0, 0.5, 0.2), (1e-4, 1e-4, 1e-4)),
    "broken": Curve("broken", (1, 2, 3), (2.0, math.nan, math.inf), (1e-4, 1e-4, 1e-4)),
    "nothing": Curve("nothing", (1,), (math.nan,), (1e-4,)),
    "zero": Curve("zero", (1, 2), (0.0, 0.0), (1e-4, 1e-4)),
    "long": falling(5000),
    "control\x00name": Curve("control\x00name", (1, 2), (2.0, 1.0), (1e-4, 1e-4)),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_xml_whose_points_lie_in_the_frame(name: str) -> None:
    drawing = loss_svg(CURVES[name])
    root = ElementTree.fromstring(drawing)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path.get("d", "")):
            assert 0 <= float(x) <= WIDTH
            assert 0 <= float(y) <= HEIGHT
    assert "nan" not in drawing.replace("nanos", "")
    assert len(drawing) < 40_000


def test_a_curve_names_its_stage_and_its_losses_for_those_who_cannot_see_it() -> None:
    title = ElementTree.fromstring(loss_svg(falling())).find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert re.fullmatch(r"stage <2> & more: loss from 2\.\d+ to 0\.\d+ over 200 entries", title.text or "")


def test_the_axis_is_logarithmic_only_where_the_loss_falls_far() -> None:
    assert "log scale" in loss_svg(falling(end=0.1))
    assert "log scale" not in loss_svg(falling(end=2.0))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 1400), (0, 0.037), (1400, 1600), (2, 2.5), (0, 7e6)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 6
    assert low - 1e-9 <= ticks[0]
    assert ticks[-1] <= high * (1 + 1e-9)
    gaps = np.diff(ticks)
    assert np.allclose(gaps, gaps[0])
    assert round(gaps[0] / 10 ** math.floor(math.log10(gaps[0]) + 1e-9), 6) in (1, 2, 5)


def test_the_running_mean_keeps_a_constant_and_shrinks_at_the_ends() -> None:
    mean, window = running_mean(np.full(100, 3.0))
    assert window == 5
    assert np.allclose(mean, 3.0)
    assert running_mean(np.array([1.0, 5.0]))[1] == 1


def test_a_log_becomes_one_curve_per_stage(tmp_path: Path) -> None:
    rows = [
        {"stage": "align", "step": 1, "loss": 3.0, "lr": {"connector": 1e-3}},
        {"stage": "align", "step": 2, "loss": 2.0, "lr": {"connector": 2e-3}},
        {"note": "resumed"},
        {"stage": "align", "step": 2, "loss": 1.9, "lr": {"connector": 2e-3}},
        {"stage": "instruct", "step": 1, "loss": 1.0, "lr": {"connector": 1e-5, "decoder": 2e-5}},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "inst')
    align, instruct = read_curves(log)
    assert align == Curve("align", (1, 2), (3.0, 1.9), (1e-3, 2e-3))
    assert instruct == Curve("instruct", (1,), (1.0,), (2e-5,))


def test_a_broken_log_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"loss": 1\n{"stage": "a", "step": 1, "loss": 1, "lr": 0}\n')
    with pytest.raises(DataError, match="line 1: not JSON"):
        read_curves(log)
    with pytest.raises(DataError, match="row 1: not a training log row"):
        curves_of([{"loss": 1.0, "stage": "a"}])
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot read"):
        read_curves(tmp_path / "missing.jsonl")
