"""How many slots a picture takes and which row fills each: recorded numbers, and properties over thousands of sizes."""

import itertools
import math

import numpy as np
import pytest

from opsin.errors import ConfigError, PlanError
from opsin.families import preset
from opsin.spec.model import VLMConfig
from opsin.spec.plan import NEWLINE, ImagePlan, Size
from opsin.spec.resolution import AnyRes, CenterCrop, Pad, ResolutionConfig

BASE = preset("llava-1.5-7b").config
NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
HD = tuple(
    (224 * x, 224 * y)
    for x, y in (
        *((1, n) for n in range(1, 7)), (2, 2), (2, 3), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (3, 2),
    )
)  # fmt: skip
MANY = tuple((336 * x, 336 * y) for x in range(1, 7) for y in range(1, 7))


def config(resolution: ResolutionConfig) -> VLMConfig:
    """LLaVA-1.5-7B with another resolution rule, and a tower of its tile size."""
    return BASE.replace(
        resolution=resolution, vision=BASE.vision.replace(image_size=resolution.tile_size, patch_size=14)
    )


RULES: dict[str, ResolutionConfig] = {
    "crop 224": CenterCrop(tile_size=224),
    "crop 336": CenterCrop(tile_size=336),
    "pad 336": Pad(tile_size=336),
    "next": AnyRes(tile_size=336, resolutions=NEXT),
    "next-hf": AnyRes(tile_size=336, resolutions=NEXT, compat="hf"),
    "next flat": AnyRes(tile_size=336, resolutions=NEXT, merge="flat"),
    "next flat, no base": AnyRes(tile_size=336, resolutions=NEXT, merge="flat", base="none"),
    "next spatial": AnyRes(tile_size=336, resolutions=NEXT, merge="spatial"),
    "next maxima": AnyRes(tile_size=336, resolutions=NEXT, merge="spatial_maxpool2x2"),
    "next, no base": AnyRes(tile_size=336, resolutions=NEXT, base="none"),
    "anyres_max_9": AnyRes(tile_size=336, resolutions=MANY, max_base_tiles=9),
    "hd": AnyRes(tile_size=224, resolutions=HD),
}
CONFIGS = {name: config(rule) for name, rule in RULES.items()}

SIDES = (1, 2, 3, 13, 14, 27, 28, 29, 55, 56, 223, 224, 225, 335, 336, 337, 447, 448, 449, 1000, 16384)
EXTREME = list(itertools.product(SIDES, SIDES))


def random_sizes(count: int, seed: int) -> list[Size]:
    """Sizes of all proportions, up to 3000 px: sides are drawn evenly on a logarithmic scale."""
    sides = np.exp(np.random.default_rng(seed).uniform(0, math.log(3000), (count, 2))).astype(int)
    return [(int(width), int(height)) for width, height in sides]


def check_layout(plan: ImagePlan) -> None:
    """What holds for every plan: the counts agree, each row exists and is used at most once."""
    order, resample = plan.layout.order, plan.layout.resample
    assert order.dtype == np.int32
    assert plan.num_slots == len(order)
    assert plan.num_rows == len(plan.row_tiles)
    assert plan.num_patches == plan.num_rows  # the connectors of LLaVA keep the raster
    named = order[order != NEWLINE]
    if resample is not None:
        assert len(resample.rows) == math.prod(resample.grid_in)
        made = named[named >= plan.num_rows]
        assert made.tolist() == list(range(plan.num_rows, plan.num_rows + math.prod(resample.grid_out)))
        named = np.concatenate([named[named < plan.num_rows], resample.rows])
    assert len(np.unique(named)) == len(named)
    assert len(named) == 0 or (named.min() >= 0 and named.max() < plan.num_rows)
    for tile in plan.tiles:
        left, top, right, bottom = tile.box
        width, height = plan.canvases[tile.canvas].size
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


@pytest.mark.parametrize("name", RULES)
def test_every_size_has_a_plan_whose_counts_agree(name: str) -> None:
    for size in EXTREME + random_sizes(400, seed=len(name)):
        check_layout(CONFIGS[name].plan(size))


@pytest.mark.parametrize("name", ["crop 224", "crop 336", "pad 336"])
def test_one_tile_rules_give_the_same_count_for_every_size(name: str) -> None:
    expected = (RULES[name].tile_size // 14) ** 2
    assert {CONFIGS[name].plan(size).num_slots for size in EXTREME} == {expected}


TABLE: dict[Size, tuple[Size, Size, int]] = {
    # size: grid (wide, high), unpadded (h', w'), tokens; recorded from the authors' code
    (1, 1): ((1, 2), (24, 24), 1176),
    (100, 100): ((1, 2), (24, 24), 1176),
    (336, 336): ((1, 2), (24, 24), 1176),
    (250, 300): ((1, 2), (28, 24), 1276),
    (337, 337): ((2, 2), (48, 48), 2928),
    (672, 672): ((2, 2), (48, 48), 2928),
    (333, 500): ((1, 2), (36, 24), 1476),
    (640, 480): ((2, 2), (36, 48), 2340),
    (1024, 768): ((2, 2), (36, 48), 2340),
    (480, 640): ((2, 2), (48, 36), 2352),
    (1920, 1080): ((2, 2), (28, 48), 1948),
    (1080, 1920): ((2, 2), (48, 28), 1968),
    (1024, 899): ((2, 2), (42, 48), 2634),
    (899, 1024): ((2, 2), (48, 42), 2640),
    (672, 337): ((2, 2), (24, 48), 1752),
    (800, 100): ((3, 1), (10, 72), 1306),
    (2000, 400): ((3, 1), (14, 72), 1598),
    (400, 2000): ((1, 3), (72, 14), 1656),
    (1344, 336): ((3, 1), (18, 72), 1890),
    (336, 1344): ((1, 3), (72, 18), 1944),
    (3000, 1000): ((3, 1), (24, 72), 2328),
    (1000, 3000): ((1, 3), (72, 24), 2376),
    (5000, 50): ((3, 1), (0, 72), 576),
    (50, 5000): ((1, 3), (72, 0), 648),
}
HF_TABLE: dict[Size, tuple[Size, Size, int]] = {
    # where transformers differs: ties fall to the wide mosaic, and rounding keeps a line more or less
    (1, 1): ((2, 1), (24, 24), 1176),
    (100, 100): ((2, 1), (24, 24), 1176),
    (336, 336): ((2, 1), (24, 24), 1176),
    (250, 300): ((2, 1), (24, 20), 1080),
}


@pytest.mark.parametrize("compat", ["original", "hf"])
def test_llava_next_takes_as_many_tokens_as_the_code_it_follows(compat: str) -> None:
    table = TABLE if compat == "original" else TABLE | HF_TABLE
    for size, (grid, (height, width), tokens) in table.items():
        plan = CONFIGS["next" if compat == "original" else "next-hf"].plan(size)
        assert plan.mosaic == grid, size
        assert plan.num_slots == tokens == 576 + height * (width + 1), size
        assert (plan.layout.order == NEWLINE).sum() == height, size


@pytest.mark.parametrize(("size", "original", "hf"), [((110, 352), 1296, 1392), ((47, 1128), 792, 936)])
def test_rounding_before_truncation_changes_the_count_of_a_few_sizes(size: Size, original: int, hf: int) -> None:
    assert CONFIGS["next"].plan(size).num_slots == original
    assert CONFIGS["next-hf"].plan(size).num_slots == hf
    assert CONFIGS["next"].plan(size).mosaic == CONFIGS["next-hf"].plan(size).mosaic


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [
        ((224, 224), (1, 1), 528),
        ((640, 480), (3, 2), 1632),
        ((480, 640), (2, 3), 1642),
        ((1920, 1080), (3, 2), 1628),
        ((1344, 224), (6, 1), 1808),
        ((336, 336), (2, 2), 1312),
    ],
)
def test_llava_15_hd_grids(size: Size, grid: Size, tokens: int) -> None:
    plan = CONFIGS["hd"].plan(size)
    assert (plan.mosaic, plan.num_slots) == (grid, tokens)


def test_the_order_of_slots_is_the_gather_that_transformers_does_on_features() -> None:
    """transformers' own functions, fed with row numbers instead of features, over sizes of all proportions."""
    modeling = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    torch = pytest.importorskip("torch")
    pairs = [list(pair) for pair in NEXT]
    for width, height in [*random_sizes(500, seed=7), (110, 352), (47, 1128), (300, 300), (5000, 50), (50, 5000)]:
        rows, columns = modeling.get_anyres_image_grid_shape((height, width), pairs, 336)
        raster = torch.arange(576, 576 * (1 + rows * columns)).view(1, rows, columns, 24, 24)
        raster = raster.permute(0, 1, 3, 2, 4).reshape(1, rows * 24, columns * 24)
        kept = modeling.unpad_image(raster, (height, width))[0]
        lines = torch.cat([kept, torch.full((kept.shape[0], 1), NEWLINE)], dim=1)
        expected = torch.cat([torch.arange(576), lines.flatten()])
        assert CONFIGS["next-hf"].plan((width, height)).layout.order.tolist() == expected.tolist(), (width, height)


def test_merge_types_lay_out_the_same_rows_differently() -> None:
    size = (640, 480)  # 2x2 tiles
    flat, spatial = CONFIGS["next flat"].plan(size).layout.order, CONFIGS["next spatial"].plan(size).layout.order
    assert flat.tolist() == list(range(5 * 576))
    assert sorted(spatial.tolist()) == flat.tolist()
    # The first line of the raster crosses the first two tiles.
    assert spatial[576 : 576 + 48].tolist() == [*range(576, 600), *range(1152, 1176)]
    without_base = CONFIGS["next, no base"].plan(size)
    assert without_base.layout.order.tolist() == CONFIGS["next"].plan(size).layout.order[576:].tolist()
    assert without_base.num_tiles == 5  # the base is still drawn and seen, as in the authors' code
    maxima = CONFIGS["next maxima"].plan(size)
    assert maxima.num_slots == 576 + 24 * 24
    assert maxima.layout.resample.mode == "max"


def test_large_mosaics_shrink_to_about_as_many_rows_as_the_limit_has_tiles() -> None:
    for size in random_sizes(300, seed=3):
        plan = CONFIGS["anyres_max_9"].plan(size)
        resample = plan.layout.resample
        if resample is None:
            continue
        before, after = math.prod(resample.grid_in), math.prod(resample.grid_out)
        assert before > 9 * 576 * 1.1**2
        assert 0.9 * 9 * 576 < after <= 9 * 576
        assert plan.num_slots == 576 + resample.grid_out[0] * (resample.grid_out[1] + 1)


def test_the_best_resolution_keeps_most_pixels_then_wastes_least_then_comes_first() -> None:
    rule = AnyRes(tile_size=336, resolutions=NEXT)
    assert rule.best_resolution((300, 300)) == (336, 672)
    assert rule.replace(compat="hf").best_resolution((300, 300)) == (672, 336)
    assert rule.best_resolution((1000, 300)) == (1008, 336)
    assert rule.best_resolution((640, 480)) == (672, 672)
    # A 1x1 picture fits everywhere and the smallest candidates waste least.
    assert AnyRes(tile_size=336, resolutions=((672, 672), (336, 336))).best_resolution((1, 1)) == (336, 336)


def test_a_kept_class_token_is_a_row_in_front_of_each_tile() -> None:
    keep = BASE.vision.replace(class_token="keep")
    plan = BASE.replace(vision=keep).plan((640, 480))
    assert (plan.num_slots, plan.class_rows, plan.row_grids) == (577, 1, ((1, 24, 24),))
    flat = BASE.replace(vision=keep, resolution=RULES["next flat"]).plan((640, 480))
    assert flat.num_slots == 5 * 577
    without_base = BASE.replace(vision=keep, resolution=RULES["next flat, no base"]).plan((640, 480))
    assert without_base.layout.order.tolist() == list(range(577, 5 * 577))


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-3, 5), (0, 0)])
@pytest.mark.parametrize("name", ["crop 336", "pad 336", "next"])
def test_a_picture_without_pixels_is_refused_with_its_size(name: str, size: Size) -> None:
    with pytest.raises(PlanError, match=f"a picture of {size[0]}x{size[1]} px has no pixels"):
        CONFIGS[name].plan(size)


def test_an_error_among_several_pictures_names_the_picture() -> None:
    with pytest.raises(PlanError, match="picture 2 of 3: a picture of 0x5 px"):
        BASE.plan_all([(5, 5), (0, 5), (5, 5)])


def test_a_raster_that_would_shrink_to_nothing_is_refused() -> None:
    vision = BASE.vision.replace(image_size=28, patch_size=14)
    rule = AnyRes(tile_size=28, resolutions=((280, 28),), max_base_tiles=1)
    with pytest.raises(PlanError, match=r"raster of 20x2 rows cannot shrink 3\.2 times .* nothing is left"):
        BASE.replace(resolution=rule, vision=vision).plan((280, 28))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "anyres", "tile_size": 224, "resolutions": [[336, 672]]}, "336x672 does not consist of whole tiles"),
        ({"kind": "anyres", "tile_size": 336, "resolutions": []}, "at least 1 item"),
        ({"kind": "anyres", "tile_size": 336, "resolutions": [[0, 336]]}, "whole tiles"),
        ({"kind": "pad", "tile_size": 0}, "greater than 0"),
        ({"kind": "anyres", "tile_size": 336, "resolutions": [[336, 336]], "merge": "spatial_unpat"}, "spatial_unpad"),
    ],
)
def test_rules_that_cannot_work_are_refused_when_they_are_made(data: dict[str, object], message: str) -> None:
    rule = {"pad": Pad, "anyres": AnyRes}[data["kind"]]
    with pytest.raises(ConfigError, match=message):
        rule.parse(data, where="test")


def test_models_whose_parts_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tile_size 224 differs from vision\.image_size 336"):
        BASE.replace(resolution=Pad(tile_size=224))
    with pytest.raises(ConfigError, match="class tokens have no place"):
        BASE.replace(resolution=RULES["next"], vision=BASE.vision.replace(class_token="keep"))
