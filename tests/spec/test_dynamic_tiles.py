"""InternVL-1.5's tiling: the authors' table, what decides ties, and what holds for every size."""

import math

import numpy as np
import pytest

from opsin.errors import ConfigError
from opsin.families import preset
from opsin.spec.model import VLMConfig
from opsin.spec.plan import Size
from opsin.spec.resolution import DynamicTiles

BASE = preset("internvl-1.5-2b").config


def config(**changes: object) -> VLMConfig:
    return BASE.replace(resolution=BASE.resolution.replace(**changes))


def tiles(size: Size, **changes: object) -> tuple[int, int, int, int]:
    """(columns, rows, tiles, tokens)."""
    plan = config(**changes).plan(size)
    return (*plan.mosaic, plan.num_tiles, plan.num_slots)


@pytest.mark.parametrize(
    ("size", "six", "twelve", "forty"),
    [
        # Computed with the authors' code: dataset.py, dynamic_preprocess.
        ((512, 512), (1, 1, 1, 256), (1, 1, 1, 256), (1, 1, 1, 256)),
        ((40, 400), (1, 6, 7, 1792), (1, 10, 11, 2816), (1, 10, 11, 2816)),
        ((800, 1300), (2, 3, 7, 1792), (2, 3, 7, 1792), (5, 8, 41, 10496)),
        ((633, 634), (1, 1, 1, 256), (1, 1, 1, 256), (1, 1, 1, 256)),
        ((634, 634), (2, 2, 5, 1280), (2, 2, 5, 1280), (2, 2, 5, 1280)),
        ((1000, 1000), (2, 2, 5, 1280), (3, 3, 10, 2560), (3, 3, 10, 2560)),
        ((640, 480), (3, 2, 7, 1792), (4, 3, 13, 3328), (4, 3, 13, 3328)),
        ((1920, 1080), (2, 1, 3, 768), (4, 2, 9, 2304), (7, 4, 29, 7424)),
        ((1000, 150), (6, 1, 7, 1792), (7, 1, 8, 2048), (13, 2, 27, 6912)),
        ((600, 480), (1, 1, 1, 256), (4, 3, 13, 3328), (5, 4, 21, 5376)),
        ((1200, 960), (3, 2, 7, 1792), (4, 3, 13, 3328), (5, 4, 21, 5376)),
    ],
)
def test_the_authors_table(size: Size, six: tuple[int, ...], twelve: tuple[int, ...], forty: tuple[int, ...]) -> None:
    assert (tiles(size, max_tiles=6), tiles(size), tiles(size, max_tiles=40)) == (six, twelve, forty)


@pytest.mark.parametrize(("most", "count"), [(6, 14), (7, 16), (12, 35), (24, 84), (40, 158)])
def test_a_large_picture_of_a_grids_shape_takes_the_largest_grid_of_that_shape(most: int, count: int) -> None:
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if columns * rows <= most]
    assert len(grids) == count
    for columns, rows in grids:
        shared = math.gcd(columns, rows)
        wide, high = columns // shared, rows // shared
        times = math.isqrt(most // (wide * high))
        assert tiles((4480 * columns, 4480 * rows), max_tiles=most)[:2] == (times * wide, times * high)


def test_an_exact_tie_falls_by_area() -> None:
    """A picture takes the larger of two grids of one shape from more than half of their pixels on."""
    half = math.isqrt(448 * 448 * 4 // 2)
    assert tiles((half, half))[:2] == (1, 1)
    assert tiles((half + 1, half + 1))[:2] == (2, 2)


def test_grids_of_equally_many_tiles_stand_in_the_order_of_the_authors_set() -> None:
    """3.75 lies as far from 6:1 as from 3:2: dataset.py takes whichever its set gives first."""
    sides = range(1, 7)
    theirs = sorted(
        {(i, j) for n in (6,) for i in sides for j in sides if i * j == n}, key=lambda grid: grid[0] * grid[1]
    )
    nearest = min(theirs, key=lambda grid: abs(1110 / 296 - grid[0] / grid[1]))  # the first of equals
    assert tiles((1110, 296), min_tiles=6, max_tiles=6)[:2] == nearest


def test_the_thumbnail_is_last_and_only_beside_several_tiles() -> None:
    plan = config().plan((800, 1300))
    assert [tile.canvas for tile in plan.tiles] == [0] * 6 + [1]
    assert plan.canvases[0].size == (896, 1344)
    assert plan.canvases[1].size == (448, 448)
    assert [tile.box[:2] for tile in plan.tiles[:3]] == [(0, 0), (448, 0), (0, 448)]
    assert plan.layout.order.tolist() == list(range(7 * 256))
    assert config().plan((500, 500)).num_tiles == 1
    assert config(thumbnail="none").plan((800, 1300)).num_tiles == 6


def test_every_size_gets_a_grid_within_the_limits() -> None:
    random = np.random.default_rng(1)
    for width, height in np.exp(random.uniform(0, 9, (500, 2))).astype(int) + 1:
        plan = config(min_tiles=3, max_tiles=8).plan((int(width), int(height)))
        columns, rows = plan.mosaic
        assert 3 <= columns * rows <= 8
        assert plan.num_tiles == columns * rows + 1
        boxes = plan.slot_boxes()
        # The tiles cover the picture once, the thumbnail once more.
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert area.sum() == pytest.approx(2 * int(width) * int(height))


@pytest.mark.parametrize(("pictures", "most"), [(1, 12), (2, 6), (3, 4), (5, 2), (12, 1), (40, 1)])
def test_pictures_that_share_their_tiles_get_fewer_each(pictures: int, most: int) -> None:
    shared = config(budget="shared")
    plans = shared.plan_all([(640, 480)] * pictures)
    assert {plan.mosaic for plan in plans} == {config(max_tiles=most).plan((640, 480)).mosaic}
    assert {plan.mosaic for plan in config().plan_all([(640, 480)] * pictures)} == {(4, 3)}


def test_a_share_below_the_fewest_tiles_is_one_tile() -> None:
    rule = DynamicTiles(tile_size=448, min_tiles=4, max_tiles=12, budget="shared")
    assert rule.among(3).grid((640, 480)) == (2, 2)
    assert rule.among(4).grid((640, 480)) == (1, 1)


def test_limits_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_tiles 7 is more than max_tiles 6"):
        config(min_tiles=7, max_tiles=6)
