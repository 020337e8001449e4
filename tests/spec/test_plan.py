"""Where each slot looks: the geometry of canvases and the boxes of rows."""

import numpy as np
import pytest

from opsin.families import preset
from opsin.spec.model import VLMConfig
from opsin.spec.plan import NEWLINE, Canvas, ImagePlan, Size
from opsin.spec.resolution import AnyRes, CenterCrop, Pad, ResolutionConfig

BASE = preset("llava-1.5-7b").config
NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MANY = tuple((336 * x, 336 * y) for x in range(1, 7) for y in range(1, 7))
SIZES: list[Size] = [
    (640, 480),
    (480, 640),
    (250, 300),
    (1920, 1080),
    (100, 700),
    (33, 32),
    (1, 1),
    (2000, 400),
    (7, 5),
]


def config(resolution: ResolutionConfig) -> VLMConfig:
    return BASE.replace(resolution=resolution, vision=BASE.vision.replace(image_size=resolution.tile_size))


def area(boxes: np.ndarray) -> float:
    return float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum())


def pictures(plan: ImagePlan) -> np.ndarray:
    """Boxes of the slots that hold a row."""
    return plan.slot_boxes()[plan.layout.order != NEWLINE]


def check_inside(plan: ImagePlan) -> None:
    """No box reaches beyond the picture, none is turned inside out, and newlines have none."""
    boxes = plan.slot_boxes()
    newline = plan.layout.order == NEWLINE
    assert np.isnan(boxes[newline]).all()
    boxes, (width, height) = boxes[~newline], plan.size
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] <= boxes[:, 2]).all()
    assert (boxes[:, 1] <= boxes[:, 3]).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()


def test_mapping_to_the_source_and_back_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        source, padding, resized, size = rng.integers(1, 2000, (4, 2))
        canvas = Canvas(
            padded=tuple(source + padding),
            pad_offset=tuple(rng.integers(0, padding + 1)),
            resized=tuple(resized),
            size=tuple(size),
            offset=tuple(rng.integers(-500, 500, 2)),
        )
        boxes = rng.uniform(-100, 2000, (7, 4))
        assert np.allclose(canvas.from_source(canvas.to_source(boxes)), boxes, atol=1e-6)
        assert np.allclose(canvas.to_source(canvas.from_source(boxes)), boxes, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_pad_and_stretch_see_every_pixel_exactly_once(size: Size) -> None:
    """Boxes of one tile do not overlap and fill the picture: their areas add up to its own, to rounding."""
    width, height = size
    pad = config(Pad(tile_size=336)).plan(size)
    base = config(AnyRes(tile_size=336, resolutions=NEXT)).plan(size).slot_boxes()[:576]
    check_inside(pad)
    for boxes in (pictures(pad), base):
        assert np.isclose(area(boxes), width * height)
        assert boxes[:, :2].min() == 0
        assert np.allclose(boxes[:, 2:].max(0), size)


@pytest.mark.parametrize("size", SIZES)
def test_the_central_crop_sees_the_central_square(size: Size) -> None:
    plan = config(CenterCrop(tile_size=336)).plan(size)
    check_inside(plan)
    boxes, short = pictures(plan), min(size)
    # The long side is resized to whole pixels and cropped at a whole pixel: half a source pixel per target pixel.
    slack = 1.5 * short / 336 + 1e-6
    for axis in (0, 1):
        low, high = boxes[:, axis].min(), boxes[:, axis + 2].max()
        assert abs(high - low - short) <= slack
        assert abs((low + high) / 2 - size[axis] / 2) <= slack


@pytest.mark.parametrize("compat", ["original", "hf"])
@pytest.mark.parametrize("size", SIZES)
def test_the_unpadded_mosaic_sees_the_picture_but_for_a_part_of_a_line(size: Size, compat: str) -> None:
    """Unpadding truncates to whole lines of rows, so that up to one line of the picture's edge may be left out."""
    plan = config(AnyRes(tile_size=336, resolutions=NEXT, compat=compat)).plan(size)
    check_inside(plan)
    boxes = pictures(plan)[576:]
    lines = int((plan.layout.order == NEWLINE).sum())
    columns = len(boxes) // lines
    assert area(boxes) <= size[0] * size[1] * (1 + 1e-9)
    assert area(boxes) >= size[0] * size[1] * (1 - 1 / min(lines, columns))


def test_a_slot_of_a_tile_looks_where_the_tile_was_cut() -> None:
    """672x672 is resized by 1: the first row of the fourth tile of 2x2 sees its first 14 pixels."""
    plan = config(AnyRes(tile_size=336, resolutions=NEXT, merge="flat")).plan((672, 672))
    assert plan.slot_boxes()[576 * 4].tolist() == [336, 336, 350, 350]
    assert plan.slot_boxes()[576 * 2 - 1].tolist() == [322, 322, 336, 336]
    assert plan.slot_boxes()[0].tolist() == [0, 0, 28, 28]
    assert plan.row_tiles[[0, 575, 576, 5 * 576 - 1]].tolist() == [0, 0, 1, 4]


@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial_maxpool2x2"])
def test_resampled_slots_share_the_picture_without_overlap(merge: str) -> None:
    plan = config(AnyRes(tile_size=336, resolutions=MANY, merge=merge, max_base_tiles=9)).plan((2016, 1900))
    check_inside(plan)
    assert plan.layout.resample is not None
    boxes = pictures(plan)[576:]
    assert len(boxes) == np.prod(plan.layout.resample.grid_out)
    # What is left out is the part of a line that unpadding cuts; 2x2 maxima keep the black bars and all of the picture.
    assert 1 - 1 / 60 < area(boxes) / (2016 * 1900) <= 1 + 1e-9


def test_maxima_of_an_odd_raster_leave_its_last_line_out() -> None:
    vision = BASE.vision.replace(image_size=42)
    rule = AnyRes(tile_size=42, resolutions=((42, 42),), merge="spatial_maxpool2x2", base="none")
    plan = BASE.replace(vision=vision, resolution=rule).plan((42, 42))
    assert plan.slot_boxes().tolist() == [[0, 0, 28, 28]]


def test_a_class_token_sees_its_whole_tile() -> None:
    plan = BASE.replace(vision=BASE.vision.replace(class_token="keep")).plan((640, 480))
    check_inside(plan)
    assert plan.slot_boxes()[0].tolist() == [0, 0, 640, 480]
    expected = BASE.plan((640, 480)).slot_boxes()
    assert np.array_equal(plan.slot_boxes()[1:], expected)


def test_padding_rows_have_empty_boxes() -> None:
    boxes = config(Pad(tile_size=336)).plan((640, 320)).slot_boxes().reshape(24, 24, 4)
    heights = boxes[..., 3] - boxes[..., 1]
    assert (heights[:6] == 0).all()
    assert (heights[18:] == 0).all()
    assert (heights[6:18] > 0).all()


def test_derived_pixels_count_what_a_thin_strip_grows_to() -> None:
    strip = (20_000, 1)
    assert config(CenterCrop(tile_size=336)).plan(strip).derived_pixels == 336 * 336 * 20_000
    assert config(Pad(tile_size=336)).plan(strip).derived_pixels == 336 * 20_000
    assert config(AnyRes(tile_size=336, resolutions=NEXT)).plan(strip).derived_pixels == 336 * 672
