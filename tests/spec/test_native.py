"""Native resolution, frames of videos, and positions on three axes: integers from sizes alone."""

import math
from typing import Any

import numpy as np
import pytest

from opsin.errors import ConfigError, PlanError
from opsin.families import preset
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native, VideoSampling
from opsin.spec.positions import token_positions

QWEN2_VL = preset("qwen2-vl-7b-instruct").config


def native(**changes: Any) -> VLMConfig:
    return QWEN2_VL.replace(resolution=Native(**changes))


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small_sides", ["grow", "one_block"])
def test_every_size_becomes_whole_blocks_within_the_limits(small_sides: Any) -> None:
    """Rounding may pass a limit by less than one block per side, never more; the grid is that of the canvas."""
    config = native(min_pixels=4 * 784, max_pixels=60 * 784, small_sides=small_sides)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(4000):
        size = tuple(int(side) for side in np.exp(random.uniform(0, 8, 2)) + 1)
        if max(size) > 200 * min(size):
            continue
        try:
            plan = config.plan(size)
        except PlanError:
            refused += 1  # nothing would be left of a short side: qwen-vl-utils alone
            continue
        (width, height), (_, rows, columns) = plan.canvases[0].size, plan.tiles[0].grid
        assert width % 28 == height % 28 == 0
        assert (rows * 14, columns * 14) == (height, width)
        assert plan.num_slots == width * height // 784 == len(plan.layout.order)
        assert min(width, height) == 28 or 4 * 784 <= width * height <= 60 * 784
        assert plan.raster == (1, rows // 2, columns // 2)
    assert small_sides == "one_block" or not refused


def test_sides_halfway_between_two_multiples_go_to_the_even_one() -> None:
    assert native().plan((70, 98)).canvases[0].size == (56, 112)
    assert native().plan((98, 70)).canvases[0].size == (112, 56)


@pytest.mark.parametrize(
    ("size", "grow", "one_block"),
    [((10, 2000), (28, 812), (28, 1988)), ((13, 2000), (28, 700), (28, 1988)), ((1, 1), (56, 56), (56, 56))],
)
def test_versions_differ_on_sides_below_one_block(
    size: tuple[int, int], grow: tuple[int, int], one_block: tuple[int, int]
) -> None:
    assert native().plan(size).canvases[0].size == grow
    assert native(small_sides="one_block").plan(size).canvases[0].size == one_block
    with pytest.raises(PlanError, match=f"{size[0]}x{size[1]} px is too small: both sides must be at least 28 px"):
        native(small_sides="refuse").plan(size)
    assert native(small_sides="refuse").plan((28, 28)).num_slots == 4


def test_a_ratio_of_200_is_the_last_that_is_read() -> None:
    assert native().plan((5600, 28)).num_slots == 200
    with pytest.raises(PlanError, match=r"5601x28 px is too elongated: one side is 200.0 times the other, at most 200"):
        native().plan((5601, 28))
    with pytest.raises(PlanError, match="has no pixels"):
        native().plan((0, 5))


def test_a_strip_that_cannot_shrink_is_refused_where_the_published_code_would_make_an_empty_picture() -> None:
    with pytest.raises(PlanError, match="less than 28 px would be left of one side"):
        native(max_pixels=100 * 784, small_sides="one_block").plan((5600, 28))
    assert native(max_pixels=100 * 784).plan((5600, 28)).canvases[0].size == (3948, 28)


def test_slots_see_the_blocks_of_the_picture() -> None:
    plan = native().plan((112, 56))
    boxes = plan.slot_boxes()
    assert boxes.tolist()[:5] == [[28.0 * x, 0, 28.0 * (x + 1), 28] for x in range(4)] + [[0, 28, 28, 56]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resolution": Native(factor=14)}, "factor 14 is not a multiple of the 28 px"),
        ({"vision": QWEN2_VL.vision.replace(patch_block=1)}, "patch_block must be 2, not 1"),
        ({"vision": QWEN2_VL.vision.replace(positions="learned")}, "learned positions fit one"),
    ],
)
def test_parts_that_disagree_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        QWEN2_VL.replace(**changes)


# ---- videos ----------------------------------------------------------------------------------------------------------


def test_frames_are_two_a_second_even_and_evenly_spread() -> None:
    sampling = VideoSampling()
    for num_source in range(4, 400, 7):
        for rate in (5.0, 24.0, 29.97, 60.0):
            chosen = sampling.choose(num_source, rate, multiple=2)
            assert len(chosen) % 2 == 0
            assert (chosen[0], chosen[-1]) == (0, num_source - 1)
            gaps = np.diff(chosen)
            assert gaps.min() >= 1
            assert gaps.max() - gaps.min() <= 1
            wanted = num_source / rate * 2
            assert len(chosen) == min(max(4, wanted), num_source, 768) // 2 * 2 or abs(len(chosen) - wanted) <= 1


def test_the_two_rules_choose_other_frames() -> None:
    assert VideoSampling().choose(100, 25.0, multiple=2) == (0, 14, 28, 42, 57, 71, 85, 99)
    theirs = VideoSampling(rule="transformers")
    assert theirs.choose(100, 25.0, multiple=2) == (0, 12, 25, 37, 50, 62, 75, 87)


@pytest.mark.parametrize("rule", ["qwen_vl_utils", "transformers"])
def test_a_video_of_one_frame_is_refused(rule: Any) -> None:
    with pytest.raises(PlanError, match=r"a video of 1 frame\(s\) cannot be sampled.*Show a single picture instead"):
        VideoSampling(rule=rule).choose(1, 30.0, multiple=2)
    with pytest.raises(PlanError, match="12 are asked for"):
        VideoSampling(rule=rule, num_frames=12).choose(10, 30.0, multiple=2)


def test_frames_shrink_as_their_number_grows_and_stay_above_the_least() -> None:
    sampling = VideoSampling()
    pixels = [sampling.max_frame_pixels(count, multiple=2) for count in (4, 64, 128, 400, 768)]
    assert pixels == sorted(pixels, reverse=True)
    assert pixels[0] == 768 * 784
    assert pixels[-1] == math.floor(128 * 784 * 1.05)
    tokens = QWEN2_VL.plan_video((1920, 1080), num_frames=120, rate=2.0).num_slots
    assert tokens <= 24_576


def test_a_video_is_one_tile_of_all_its_times() -> None:
    plan = QWEN2_VL.plan_video((640, 480), num_frames=100, rate=25.0)
    assert (plan.num_tiles, plan.tiles[0].grid, plan.raster) == (1, (4, 34, 46), (4, 17, 23))
    assert plan.num_slots == 1564
    boxes = plan.slot_boxes()
    assert np.array_equal(boxes[:391], boxes[391:782]), "each time shows the whole picture"


def test_frames_that_were_chosen_before_are_all_shown_and_an_odd_one_is_repeated() -> None:
    plan = QWEN2_VL.plan_video((64, 48), num_frames=5)
    assert plan.frames == (0, 1, 2, 3, 4, 4)
    assert plan.tiles[0].grid[0] == 3
    with pytest.raises(PlanError, match="without frames"):
        QWEN2_VL.plan_video((64, 48), num_frames=0)


def test_a_model_without_videos_says_so() -> None:
    for config in (preset("llava-1.5-7b").config, native(video=None)):
        with pytest.raises(PlanError, match="this model reads pictures only"):
            config.plan_video((640, 480), num_frames=8, rate=2.0)


# ---- positions -------------------------------------------------------------------------------------------------------


def with_span(span: Any) -> Any:
    assert QWEN2_VL.decoder.rope is not None
    return QWEN2_VL.decoder.replace(rope=QWEN2_VL.decoder.rope.replace(picture_span=span))


def test_text_counts_on_all_axes_and_a_picture_spreads_over_rows_and_columns() -> None:
    """The worked example: five tokens, a mark, 2x3 rows, a mark, text."""
    positions = token_positions(14, [(6, (1, 2, 3))], QWEN2_VL.decoder)
    assert positions[:6].tolist() == [[place] * 3 for place in range(6)]
    assert positions[6:12].T.tolist() == [[6] * 6, [6, 6, 6, 7, 7, 7], [6, 7, 8, 6, 7, 8]]
    assert positions[12:].tolist() == [[9] * 3, [10] * 3]


def test_text_after_a_long_video_goes_on_after_its_last_time_by_the_published_rule() -> None:
    rasters = [(1, (5, 2, 2))]
    assert token_positions(22, rasters, with_span("time_and_space"))[-1].tolist() == [6, 6, 6]
    assert token_positions(22, rasters, with_span("space"))[-1].tolist() == [3, 3, 3]


def test_one_axis_counts_tokens_whatever_they_show() -> None:
    decoder = preset("llava-1.5-7b").config.decoder
    assert token_positions(8, [(1, (1, 2, 2))], decoder).tolist() == [[place] for place in range(8)]


def test_pictures_may_follow_each_other_and_stand_at_both_ends() -> None:
    positions = token_positions(8, [(0, (1, 2, 2)), (4, (1, 1, 4))], QWEN2_VL.decoder)
    assert positions[:, 0].tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert positions[:, 2].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
