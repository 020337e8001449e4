"""From a picture to patches: the drawing, the arithmetic and the order of numbers, bit by bit."""

import numpy as np
import pytest
from PIL import Image

from opsin.families import preset
from opsin.media import prepare as prepare_module
from opsin.media.image import Picture
from opsin.media.prepare import pixels, prepare, prepare_video
from opsin.spec.model import VLMConfig
from opsin.spec.plan import Canvas, Size
from opsin.spec.resolution import AnyRes, CenterCrop, Pad, ResolutionConfig

BICUBIC = Image.Resampling.BICUBIC
PINPOINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))


def config(resolution: ResolutionConfig) -> VLMConfig:
    """LLaVA-1.5 with tiles of 56 px and patches of 14."""
    base = preset("llava-1.5-7b").config
    return base.replace(resolution=resolution, vision=base.vision.replace(image_size=resolution.tile_size))


def picture(size: Size, seed: int = 0) -> Picture:
    width, height = size
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture(Image.fromarray(levels), f"{width}x{height}")


def random_sizes(count: int, seed: int, largest: int = 700) -> list[Size]:
    """Sizes of all proportions: sides are drawn evenly on a logarithmic scale."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(0, np.log(largest), (count, 2))).astype(int)
    return [(int(width), int(height)) for width, height in sides]


@pytest.mark.parametrize("fill", [(122, 116, 104), (255, 0, 1)])
def test_padding_in_bands_equals_padding_first(fill: tuple[int, int, int]) -> None:
    """Also where a picture is longer than one band, and where the short side is a single pixel."""
    sizes = [*random_sizes(60, seed=1), (1, 600), (600, 1), (256, 257), (513, 512), (30, 900)]
    for number, size in enumerate(sizes):
        image, side = picture(size, seed=number).pixels, max(size)
        offset = ((side - size[0]) // 2, (side - size[1]) // 2)
        for tile in (56, 61):
            canvas = Canvas((side, side), offset, (tile, tile), (tile, tile), (0, 0), fill)
            padded = Image.new("RGB", (side, side), fill)
            padded.paste(image, offset)
            expected = np.asarray(padded.resize((tile, tile), BICUBIC))
            assert np.array_equal(np.asarray(prepare_module.draw_canvas(image, canvas)), expected), size


@pytest.mark.parametrize(
    "rule", [CenterCrop(tile_size=56), Pad(tile_size=56), AnyRes(tile_size=56, resolutions=PINPOINTS)]
)
def test_nothing_larger_than_the_plan_says_is_allocated(
    rule: ResolutionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    new, resize = Image.new, Image.Image.resize

    def watched_new(mode: str, size: Size, *rest: object) -> Image.Image:
        made.append(size[0] * size[1])
        return new(mode, size, *rest)

    def watched_resize(self: Image.Image, size: Size, *rest: object) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *rest)

    monkeypatch.setattr(Image, "new", watched_new)
    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    for size in [(300, 200), (7, 1200), (1200, 7), (56, 56), (1, 1)]:
        image, plan = picture(size), config(rule).plan(size)
        made.clear()
        prepare(image, plan, config(rule).vision)
        band = prepare_module._BAND * max(size)  # the working memory of padding
        assert max(made) <= max(plan.derived_pixels, band if isinstance(rule, Pad) else 0)


def test_normalising_equals_the_processors_arithmetic_for_every_level() -> None:
    """Rescale in float64, round to float32, mean and deviation in float32: transformers 4.37 image_transforms."""
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 256))
    base = preset("llava-1.5-7b").config.vision
    rng = np.random.default_rng(0)
    for _ in range(20):
        vision = base.replace(
            mean=tuple(rng.uniform(0.3, 0.6, 3).tolist()), std=tuple(rng.uniform(0.2, 0.6, 3).tolist())
        )
        for statistics in (base, vision):
            rescaled = (levels * np.float64(0.00392156862745098)).astype(np.float32)
            mean, std = (np.array(v, np.float32) for v in (statistics.mean, statistics.std))
            ours = np.empty((1, 3, 2, 256), np.float32)
            prepare_module._EXACT.normalise(levels[None, :, None], mean, std, ours)
            for frame in range(2):
                assert np.array_equal(ours[0, :, frame], (rescaled - mean[:, None]) / std[:, None])


def test_patches_are_the_tiles_cut_in_raster_order_with_channels_outermost() -> None:
    rule = AnyRes(tile_size=56, resolutions=PINPOINTS)
    image, model = picture((200, 120)), config(rule)
    plan = model.plan(image.size)
    prepared, tiles = prepare(image, plan, model.vision), pixels(image.pixels, plan, model.vision)
    assert prepared.patches.shape == (plan.num_patches, 3 * 14 * 14)
    assert prepared.patches.dtype == tiles.dtype == np.float32
    assert prepared.patches.flags.c_contiguous
    assert prepared.grids.tolist() == [[1, 4, 4]] * plan.num_tiles
    row = 0
    for tile in tiles:
        for y in range(4):
            for x in range(4):
                patch = tile[:, 14 * y : 14 * (y + 1), 14 * x : 14 * (x + 1)]
                assert np.array_equal(prepared.patches[row], patch.ravel())
                row += 1


def test_a_patch_times_a_flat_weight_is_a_strided_convolution() -> None:
    """In float64, where both orders of summation agree to the last digits."""
    image, model = picture((56, 56)), config(CenterCrop(tile_size=56))
    plan = model.plan((56, 56))
    weight = np.random.default_rng(3).normal(size=(8, 3, 14, 14))
    product = prepare(image, plan, model.vision).patches.astype(np.float64) @ weight.reshape(8, -1).T
    tile = pixels(image.pixels, plan, model.vision)[0].astype(np.float64)
    for y in range(4):
        for x in range(4):
            window = tile[:, 14 * y : 14 * (y + 1), 14 * x : 14 * (x + 1)]
            assert np.allclose(product[4 * y + x], np.tensordot(weight, window, 3), atol=1e-10)


def test_pixels_beyond_the_last_whole_patch_are_left_out() -> None:
    model = config(CenterCrop(tile_size=60))  # 4 patches of 14 and a remainder of 4 pixels
    image, plan = picture((60, 60)), model.plan((60, 60))
    prepared, tile = prepare(image, plan, model.vision), pixels(image.pixels, plan, model.vision)[0]
    assert tile.shape == (3, 60, 60)
    assert prepared.patches.shape == (16, 588)
    assert np.array_equal(prepared.patches[15], tile[:, 42:56, 42:56].ravel())


def test_black_bars_are_black_before_normalisation_and_padding_has_its_colour() -> None:
    white = Picture(Image.new("RGB", (200, 100), "white"), "white")
    for rule, expected in ((AnyRes(tile_size=56, resolutions=((112, 112),)), 0), (Pad(tile_size=56), (122, 116, 104))):
        model = config(rule)
        tile = pixels(white.pixels, model.plan(white.size), model.vision)[-1 if expected == 0 else 0]
        corner = tile[:, -1, -1] * np.array(model.vision.std) + np.array(model.vision.mean)
        assert np.rint(corner * 255).tolist() == np.broadcast_to(expected, 3).tolist()


@pytest.mark.parametrize("mode", ["crop", "pad", "anyres"])
def test_pixels_equal_those_of_transformers(mode: str) -> None:
    """Every number, for sizes of all proportions: transformers' Pillow processors and this module do the same sums."""
    pytest.importorskip("transformers")
    options = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    rule: ResolutionConfig
    if mode == "crop":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        rule, processor = CenterCrop(tile_size=56), CLIPImageProcessorPil(**options)
    elif mode == "pad":
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        rule, processor = Pad(tile_size=56), LlavaImageProcessorPil(do_pad=True, **options)
    else:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        rule = AnyRes(tile_size=56, resolutions=PINPOINTS, compat="hf")
        processor = LlavaNextImageProcessorPil(image_grid_pinpoints=[list(pair) for pair in PINPOINTS], **options)
    model = config(rule)
    sizes = random_sizes(25, seed=5, largest=300)
    for number, (width, height) in enumerate(sizes):
        image = picture((width, height), seed=number).pixels
        ours = pixels(image, model.plan(image.size), model.vision)
        theirs = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])
        assert np.array_equal(ours, theirs.reshape(-1, *theirs.shape[-3:])[: len(ours)]), (width, height)


@pytest.mark.parametrize(
    "rule", [CenterCrop(tile_size=56), Pad(tile_size=56), AnyRes(tile_size=56, resolutions=PINPOINTS)]
)
def test_every_small_size_gives_the_patches_that_its_plan_counts(rule: ResolutionConfig) -> None:
    model = config(rule)
    sides = (1, 2, 3, 13, 14, 27, 28, 29, 55, 56, 57, 223, 224)
    for width in sides:
        for height in sides:
            plan = model.plan((width, height))
            prepared = prepare(Picture(Image.new("RGB", (width, height)), "x"), plan, model.vision)
            assert len(prepared.patches) == plan.num_patches
            assert np.isfinite(prepared.patches).all()


# ---- blocks of patches, several frames -------------------------------------------------------------------------------

QWEN2_VL = preset("qwen2-vl-2b-instruct").config


def reference_patches(levels: np.ndarray, frames: int) -> np.ndarray:
    """Qwen2-VL's order, written out: blocks of 2x2 patches row by row, inside them (channel, frame, y, x)."""
    height, width, _ = levels.shape
    patches = []
    for top in range(0, height, 28):
        for left in range(0, width, 28):
            for y, x in ((0, 0), (0, 14), (14, 0), (14, 14)):
                patch = levels[top + y : top + y + 14, left + x : left + x + 14].transpose(2, 0, 1)
                patches.append(np.stack([patch] * frames, axis=1).ravel())
    return np.stack(patches)


def test_patches_come_in_blocks_and_a_still_picture_is_repeated_in_time() -> None:
    image = picture((112, 84))
    plan = QWEN2_VL.plan(image.size)
    prepared = prepare(image, plan, QWEN2_VL.vision)
    assert prepared.grids.tolist() == [[1, 6, 8]]
    assert prepared.patches.shape == (48, 1176)
    levels = reference_patches(np.asarray(image.pixels), 2)
    mean, std = (np.repeat(np.array(v, np.float32), 2 * 196) for v in (QWEN2_VL.vision.mean, QWEN2_VL.vision.std))
    assert np.array_equal(prepared.patches, (levels / np.float32(255) - mean) / std)


@pytest.mark.parametrize("size", [(28, 5600), (5600, 28), (300, 200), (1000, 30)])
def test_groups_of_patches_leave_no_seams(size: tuple[int, int]) -> None:
    """Pictures with fewer and with more patches in a line than are normalised at a time."""
    image = picture(size)
    plan = QWEN2_VL.plan(size)
    drawn = np.asarray(prepare_module.draw_canvas(image.pixels, plan.canvases[0]))
    prepared = prepare(image, plan, QWEN2_VL.vision).patches
    mean, std = (np.repeat(np.array(v, np.float32), 2 * 196) for v in (QWEN2_VL.vision.mean, QWEN2_VL.vision.std))
    assert np.array_equal(prepared, (reference_patches(drawn, 2) / np.float32(255) - mean) / std)


def test_frames_share_a_patch_in_pairs_and_each_is_drawn_once() -> None:
    frames = [picture((56, 56), seed) for seed in range(3)]
    plan = QWEN2_VL.replace(
        resolution=QWEN2_VL.resolution.replace(
            video=QWEN2_VL.resolution.video.replace(min_pixels=784, max_total_pixels=None)
        )
    ).plan_video((56, 56), num_frames=3)
    drawn: list[int] = []

    def given():
        for number, frame in enumerate(frames):
            drawn.append(number)
            yield frame.pixels

    prepared = prepare_video(given(), plan, QWEN2_VL.vision, name="clip")
    assert drawn == [0, 1, 2]
    still = [prepare(f, QWEN2_VL.plan((56, 56)), QWEN2_VL.vision).patches for f in frames]
    halves = [patches.reshape(16, 3, 2, 196)[:, :, 0] for patches in still]
    expected = [np.stack(pair, axis=2).reshape(16, -1) for pair in ((halves[0], halves[1]), (halves[2], halves[2]))]
    assert np.array_equal(prepared.patches, np.concatenate(expected))


def test_kernels_of_a_caller_draw_plain_canvases_and_pillow_draws_padded_ones() -> None:
    class Grey:
        """Kernels that are easy to tell from Pillow's."""

        def resize(self, levels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
            return np.full((size[1], size[0], 4), 100, np.uint8)

        def normalise(self, levels: np.ndarray, mean: np.ndarray, std: np.ndarray, out: np.ndarray) -> None:
            out[:] = levels

    image = picture((300, 200))
    plan = QWEN2_VL.plan(image.size)
    assert (prepare(image, plan, QWEN2_VL.vision, kernels=Grey()).patches == 100).all()
    rule = AnyRes(tile_size=56, resolutions=PINPOINTS)
    mosaic = config(rule).plan(image.size)
    patches = prepare(image, mosaic, config(rule).vision, kernels=Grey()).patches
    assert set(np.unique(patches)) == {0.0, 100.0}, "the black bars of a mosaic are pasted around"
    padded = config(Pad(tile_size=56)).plan(image.size)
    patches = prepare(image, padded, config(Pad(tile_size=56)).vision, kernels=Grey()).patches
    assert len(np.unique(patches)) > 10
