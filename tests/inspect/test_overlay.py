"""Tiles and slots drawn on pictures."""

import numpy as np
import pytest
from PIL import Image

from opsin.inspect.overlay import (
    MAX_SIDE,
    count_slots,
    draw_slots,
    draw_tiles,
    slot_color,
    slot_layers,
    slot_rectangles,
)
from opsin.spec.plan import ImagePlan, Size
from opsin.spec.resolution import AnyRes, CenterCrop, Pad
from toys import picture

TILE, PATCH = 24, 6
CROP, PAD = CenterCrop(tile_size=TILE), Pad(tile_size=TILE)
ANYRES = AnyRes(tile_size=TILE, resolutions=((24, 48), (48, 24), (48, 48), (72, 24), (24, 72)))
RULES = {
    "crop": CROP,
    "pad": PAD,
    "anyres": ANYRES,
    "flat": ANYRES.replace(merge="flat"),
    "maxpool": ANYRES.replace(merge="spatial_maxpool2x2"),
    "bilinear": ANYRES.replace(max_base_tiles=1),
    "nobase": ANYRES.replace(base="none"),
}
SIZES: tuple[Size, ...] = ((40, 40), (61, 37), (30, 90), (1, 1), (400, 8))


def plan_of(rule: CenterCrop | Pad | AnyRes, size: Size) -> ImagePlan:
    """The plan with a connector that keeps the raster."""
    tiling = rule.tiling(size, PATCH)
    grids = tuple(tile.grid for tile in tiling.tiles)
    return ImagePlan(
        size, tiling.canvases, tiling.tiles, grids, rule.layout(tiling, grids), (tiling.columns, tiling.rows)
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_every_slot_is_drawn_inside_the_picture_once(name: str, size: Size) -> None:
    plan = plan_of(RULES[name], size)
    drawn_size = (size[0] * 3, size[1] * 3)
    rectangles = slot_rectangles(plan, drawn_size)
    assert (rectangles >= 0).all()
    assert (rectangles[:, 2] <= drawn_size[0]).all()
    assert (rectangles[:, 3] <= drawn_size[1]).all()
    layers = slot_layers(plan)
    assert sorted(slot for layer in layers for slot in layer.tolist()) == list(range(plan.num_slots))
    for layer in layers:
        cover = np.zeros(drawn_size[::-1], np.int64)
        for left, top, right, bottom in rectangles[layer]:
            cover[top:bottom, left:right] += 1
        assert cover.max() <= 1, "two slots of one canvas cover the same pixel"
    drawings = draw_slots(picture(size), plan, min_side=60)
    assert len(drawings) == len(layers)
    assert all(drawing.mode == "RGB" for drawing in drawings)


def test_slots_of_an_uncropped_picture_cover_it_without_gaps() -> None:
    plan = plan_of(PAD, (48, 30))
    cover = np.zeros((30, 48), np.int64)
    for left, top, right, bottom in slot_rectangles(plan, (48, 30)):
        cover[top:bottom, left:right] += 1
    assert (cover == 1).all()


def test_nothing_is_drawn_where_no_slot_looks() -> None:
    size = (96, 48)
    plan = plan_of(CROP, size)
    source = picture(size)
    (drawing,) = draw_slots(source, plan, min_side=96)
    left_out = np.s_[:, :24]  # the central square of 48 leaves 24 pixels at each side
    margin = drawing.width - source.width
    drawn = np.asarray(drawing)[:, margin:]
    assert (drawn[left_out] == np.asarray(source)[left_out]).all()
    assert (drawn[:, 25:71] != np.asarray(source)[:, 25:71]).any(axis=2).mean() > 0.9


def test_slots_are_counted_by_what_they_look_at() -> None:
    pad = count_slots(plan_of(PAD, (48, 24)))
    assert (pad.picture, pad.padding, pad.newline) == (8, 8, 0)
    plan = plan_of(ANYRES, (48, 24))
    base, mosaic = (count_slots(plan, layer) for layer in slot_layers(plan))
    assert (base.picture, base.padding, base.newline) == (16, 0, 0)
    assert (mosaic.picture, mosaic.padding, mosaic.newline) == (32, 0, 4)
    assert mosaic.newline + 48 == plan.num_slots


def test_newlines_are_marked_beside_the_picture_and_padding_has_no_mark() -> None:
    plan = plan_of(ANYRES, (48, 24))
    base, mosaic = draw_slots(picture((48, 24)), plan, min_side=480)
    assert base.size == (480, 240)
    assert mosaic.size[0] > 480
    assert mosaic.size[1] == 240
    margin = np.asarray(mosaic)[:, 480:]
    lines = np.unique(
        np.flatnonzero((margin == slot_color(plan.num_slots - 1, plan.num_slots)).all(axis=2).any(axis=1))
    )
    assert len(lines), "the last newline's colour is missing from the margin"
    assert lines.min() >= 180, "the last newline belongs to the last of four lines"


def test_bare_newlines_of_a_line_without_rows_are_spread_over_the_height() -> None:
    plan = plan_of(ANYRES, (8, 400))
    assert count_slots(plan).newline > 0
    assert len(draw_slots(picture((8, 400)), plan)) == len(slot_layers(plan))


def test_tiles_are_the_canvases_that_the_tower_sees() -> None:
    size = (40, 20)
    plan = plan_of(PAD, size)
    (drawing,) = draw_tiles(picture(size), plan, min_side=TILE * 8)
    assert drawing.size == (TILE * 8, TILE * 8)
    # The middle of the topmost patch, away from border, badge and grid, shows the fill of the padding.
    assert drawing.getpixel((150, 24)) == PAD.fill
    mosaics = draw_tiles(picture((90, 90)), plan_of(ANYRES, (90, 90)), min_side=1)
    assert [mosaic.size for mosaic in mosaics] == [(24, 24), (48, 48)]


def test_large_pictures_are_drawn_smaller() -> None:
    size = (3000, 40)
    (drawing,) = draw_slots(picture(size), plan_of(PAD, size))
    assert drawing.height == 18
    assert MAX_SIDE <= drawing.width <= MAX_SIDE + 40


def test_slot_colors_become_brighter_with_the_slot() -> None:
    shades = [Image.new("RGB", (1, 1), slot_color(slot, 80)).convert("L").getpixel((0, 0)) for slot in range(80)]
    assert shades == sorted(shades)
    assert slot_color(0, 1) == slot_color(0, 80)


def test_drawing_is_deterministic() -> None:
    plan = plan_of(ANYRES, (61, 37))
    first, second = (draw_slots(picture((61, 37)), plan) for _ in range(2))
    assert [drawing.tobytes() for drawing in first] == [drawing.tobytes() for drawing in second]
