"""Boxes: overlap by hand, and the same rectangle written in four spaces."""

import pytest

from opsin.evaluate.boxes import PLAIN, describe, first_box, first_four, iou, moved
from opsin.families._grounding import LLAVA_BOXES, QWEN_VL_BOXES
from opsin.text.grounding import Box

SIZE = (200, 100)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),  # right: 0.5 is enough
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # they touch
        ((5, 5, 5, 5), (5, 5, 5, 5), 0.0),  # without area
        ((2, 2, 8, 8), (0, 0, 10, 10), 0.36),
    ],
)
def test_intersection_over_union(one: tuple[float, ...], other: tuple[float, ...], expected: float) -> None:
    assert iou(one, other) == pytest.approx(expected)
    assert iou(other, one) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("space", "text"),
    [
        ("pixels", "It is at [50, 25, 100, 75]."),
        ("unit", "[0.25, 0.25, 0.50, 0.75]"),
        ("per_1000", "[250, 250, 500, 750]"),
        ("per_999", "[249.75, 249.75, 499.5, 749.25]"),
    ],
)
def test_the_same_box_in_every_space(space: str, text: str) -> None:
    found = first_box(text, PLAIN[space], SIZE)
    assert found is not None
    assert found.sides == pytest.approx((50, 25, 100, 75))


def test_the_wrong_space_is_a_wrong_or_unreadable_box() -> None:
    """The trap: numbers of one space in another."""
    as_unit = first_box("[250, 250, 500, 750]", PLAIN["unit"], SIZE)
    assert as_unit is None  # 250 is no share of a side
    as_pixels = first_box("[0.25, 0.25, 0.50, 0.75]", PLAIN["pixels"], SIZE)
    assert as_pixels is not None
    assert iou(as_pixels.sides, (50, 25, 100, 75)) == 0


def test_the_first_readable_box_counts() -> None:
    found = first_box("[0.9, 0.9, 0.1, 0.1] or [0, 0, 1, 1] or [0.5, 0.5, 1, 1]", PLAIN["unit"], SIZE)
    assert found is not None
    assert found.sides == (0, 0, 200, 100)
    assert first_box("no box", PLAIN["unit"], SIZE) is None


def test_four_numbers_are_read_as_lmms_eval_does() -> None:
    """Outside the picture too: (0.5, 0) to (1.1, 1) on 200x100 px."""
    text = "It is [0.5, 0, 1.1, 1]."
    assert first_four(text, SIZE) == pytest.approx((100, 0, 220, 100))
    assert first_box(text, PLAIN["unit"], SIZE) is None
    assert first_four("(0.5, 0, 1, 1)", SIZE) is None


def test_families_write_boxes_their_own_way() -> None:
    # LLaVA: of the padded square of 200 px, where the picture begins at y = 50: (0.25, 0.375) is (50, 75 - 50).
    padded = first_box("[0.25, 0.375, 0.5, 0.625]", LLAVA_BOXES, SIZE)
    assert padded is not None
    assert padded.sides == pytest.approx((50, 25, 100, 75))
    qwen = first_box("<ref>dog</ref><box>(250,250),(500,750)</box>", QWEN_VL_BOXES, SIZE)
    assert qwen is not None
    assert qwen.sides == pytest.approx((50, 25, 100, 75))
    assert describe(LLAVA_BOXES) == "bare, unit of the padded square"
    assert describe(QWEN_VL_BOXES) == "points, per_1000 to 999"


def test_a_box_moves_to_another_picture_by_shares() -> None:
    assert moved(Box.of(50, 25, 100, 75), SIZE, (20, 40)).sides == pytest.approx((5, 10, 10, 30))
