"""Pixels, token counts by size, and token layouts against recorded outputs."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL.Image import Image as PILImage

from opsin.families._hub import original_resolution, read_pinpoints
from opsin.media.image import Picture, open_image
from opsin.media.prepare import pixels, prepare
from opsin.spec.chat import AssistantTurn, ChatFormat, UserTurn
from opsin.spec.connector import LinearConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.plan import NEWLINE, ImagePlan
from opsin.spec.resolution import AnyRes, ResolutionConfig
from opsin.spec.vision import VisionConfig
from parity.case import Case, check_close, check_equal

Array = NDArray[Any]


def model(resolution: ResolutionConfig, vision: VisionConfig) -> VLMConfig:
    """The least model that has these two parts."""
    return VLMConfig(
        vision=vision,
        connector=LinearConnector(),
        decoder=DecoderConfig(vocab_size=8, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=8),
        resolution=resolution,
        chat=ChatFormat(name="none", user=UserTurn(), assistant=AssistantTurn()),
    )


def tower(tile_size: int, patch_size: int, preprocessor: dict[str, Any] | None = None) -> VisionConfig:
    """A tower for tiles of `tile_size` pixels. Only sizes and pixel statistics matter to these kinds."""
    statistics = {}
    if preprocessor is not None:
        statistics = {"mean": tuple(preprocessor["image_mean"]), "std": tuple(preprocessor["image_std"])}
    return VisionConfig(
        image_size=tile_size, patch_size=patch_size, dim=8, num_layers=2, num_heads=1, mlp_dim=8, **statistics
    )


# ---- image_pixels ----------------------------------------------------------------------------------------------------


def run_image_pixels(case: Case) -> None:
    """Pictures, opened as the authors do, become the recorded arrays bit by bit; so they do for transformers."""
    preprocessor, outputs = case.json("preprocessor_config.json"), case.tensors("outputs.safetensors")
    theirs = case.tensors("outputs_hf.safetensors") if case.has("outputs_hf.safetensors") else {}
    sides = {side for key in ("size", "crop_size") for side in preprocessor[key].values()}
    assert len(sides) == 1, f"{case.name}: size and crop_size differ: {sorted(sides)}"
    tile = sides.pop()
    vision = tower(tile, next(p for p in (14, 16, 8, 7, tile) if tile % p == 0), preprocessor)
    hub = case.json("config.json")
    assert (hub.get("image_aspect_ratio") or "square") == (case.data.get("mode") or "square")
    config = model(original_resolution(hub, vision), vision)
    checked: set[str] = set()
    for index, image in enumerate(case.data["images"]):
        picture = open_image(case.folder / image["file"], mode="reference")
        assert list(picture.size) == image["size_wh"]
        what = f"{case.name} {image['file']}"
        planned = config.plan(picture.size)
        if best := image.get("best_resolution_wh"):
            assert list(planned.canvases[1].size) == best, what
        tiles = pixels(picture.pixels, planned, vision)
        if len(image["pixel_values_shape"]) == 3:  # one tile, recorded without its axis
            tiles = tiles[0]
        assert list(tiles.shape) == image["pixel_values_shape"], what
        checked |= _check_pixels(case, index, image, tiles, vision, outputs)
        _check_patches(picture, planned, vision, tiles)
        checked |= _check_transformers(case, index, picture.pixels, config, tiles, theirs, what)
    unread = (outputs.keys() | theirs.keys()) - checked
    assert not unread, f"{case.name}: recorded, but nobody knows how to check it: {sorted(unread)}"


def _allowed(case: Case, vision: VisionConfig) -> float:
    """0, for the same numbers bit by bit. Pillow 13 began to resample stretched pictures along columns first where that
    is cheaper, which moves some values by one of 256 levels: across that change one level is allowed."""
    recorded = int(case.data["versions"]["pillow"].split(".")[0])
    installed = int(PIL.__version__.split(".")[0])
    return 0.0 if (recorded < 13) == (installed < 13) else 1.01 / 255 / min(vision.std)


def _compare(actual: Array, expected: Array, what: str, allowed: float) -> None:
    if allowed == 0:
        check_equal(actual, expected, what)
    else:
        check_close(actual, expected, what, atol=1 if actual.dtype == np.uint8 else allowed)


def _check_pixels(
    case: Case, index: int, image: dict[str, Any], tiles: Array, vision: VisionConfig, outputs: dict[str, Array]
) -> set[str]:
    """Whole arrays, or where they are large their hash, slices and moments. Returns the names that were checked."""
    what, name = f"{case.name} {image['file']}", f"pixel_values.{index}"
    levels, allowed = _levels(tiles, vision), _allowed(case, vision)
    for key, array in (("sha256_float32_le", tiles.astype("<f4")), ("sha256_uint8_chw", levels)):
        if key in image and allowed == 0:
            assert hashlib.sha256(array.tobytes()).hexdigest() == image[key], f"{what}: {key}"
    derived = {name: tiles, f"{name}.mean": tiles.mean((-2, -1)), f"{name}.std": tiles.std((-2, -1))}
    # "slice_every_12 = pv[..., 5::12, 5::12]; row_168 = pv[..., 168, :]; uint8 every_4 = u[..., 1::4, 1::4]"
    for key, variable, index_text in re.findall(r"(\w+) = (pv|u)\[\.\.\., ([^\]]*)\]", case.data.get("slices", "")):
        source, prefix = (tiles, "pixel_values") if variable == "pv" else (levels, "uint8")
        derived[f"{prefix}.{index}.{key}"] = source[(..., *_parse_index(index_text))]
    found = derived.keys() & outputs.keys()
    for key in found:
        if key.endswith((".mean", ".std")):
            # Sums of many float32 numbers depend on their order; std may or may not count the mean's freedom.
            check_close(derived[key], outputs[key], f"{what} {key}", atol=1e-4 + allowed)
        else:
            _compare(derived[key], outputs[key], f"{what} {key}", allowed)
    assert found or "sha256_float32_le" in image, f"{what}: nothing is recorded for it"
    return set(found)


def _levels(tiles: Array, vision: VisionConfig) -> Array:
    """The 8-bit pixels that normalised ones come from."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (vision.mean, vision.std))
    return np.rint((tiles * std + mean) * 255).astype(np.uint8)


def _parse_index(text: str) -> tuple[int | slice, ...]:
    """`5::12, 168, :` as numpy indices."""
    index: list[int | slice] = []
    for part in text.split(","):
        numbers = [int(number) if number else None for number in part.strip().split(":")]
        index.append(slice(*numbers) if len(numbers) > 1 else int(part))
    return tuple(index)


def _check_patches(picture: Picture, planned: ImagePlan, vision: VisionConfig, tiles: Array) -> None:
    """The tower's input holds the same numbers, patch by patch, in the order of a convolution's weight."""
    p, prepared = vision.patch_size, prepare(picture, planned, vision)
    n, rows, columns = planned.num_tiles, *prepared.grids[0, 1:]
    expected = tiles.reshape(n, 3, rows, p, columns, p).transpose(0, 2, 4, 1, 3, 5).reshape(n * rows * columns, -1)
    check_equal(prepared.patches, expected, f"{picture.name} patches")


def _check_transformers(
    case: Case,
    index: int,
    opened: PILImage,
    config: VLMConfig,
    original: Array,
    theirs: dict[str, Array],
    what: str,
) -> set[str]:
    """What transformers makes of the same picture: stored where it differs, else equal to the authors' arrays."""
    image, allowed = case.data["images"][index], _allowed(case, config.vision)
    if "hf_pil_processor_max_abs_diff" not in image:
        return set()
    if isinstance(config.resolution, AnyRes):
        config = config.replace(resolution=config.resolution.replace(compat="hf"))
    tiles = pixels(opened, config.plan(opened.size), config.vision).reshape(original.shape)
    name = f"hf_pixel_values.{index}"
    if name in theirs:
        _compare(tiles, theirs[name], f"{what} as transformers prepares it", allowed)
    difference = np.abs(tiles - original).max()
    recorded = image["hf_pil_processor_max_abs_diff"]
    assert abs(difference - recorded) < 1e-4 + 2 * allowed, f"{what}: differs by {difference}, recorded {recorded}"
    return {name} & theirs.keys()


# ---- size_table ------------------------------------------------------------------------------------------------------


def run_size_table(case: Case) -> None:
    """Grid, unpadded raster and token count of every recorded size, in each recorded column."""
    config, rows = case.data["config"], case.json("rows.json")
    tables: dict[str, VLMConfig] = {}
    for column in {name for row in rows for name in row} - {"size_wh"}:
        assert column in ("orig", "hf", "hd224"), f"{case.name}: column {column!r} is unknown"
        hd = column == "hd224"
        pinpoints = next(value for key, value in config.items() if key.startswith("pinpoints") and ("hd" in key) == hd)
        # The HD list names no tile; its smallest mosaic is one tile high or wide.
        tile = min(min(pair) for pair in pinpoints) if hd else config["tile"]
        vision = tower(tile, tile // config["side_hd" if hd else "side"])
        resolution = AnyRes(
            tile_size=tile,
            resolutions=read_pinpoints(pinpoints, tile),
            merge="spatial_unpad",
            compat="hf" if column == "hf" else "original",
        )
        tables[column] = model(resolution, vision)
    for row in rows:
        size = (row["size_wh"][0], row["size_wh"][1])
        for column in row.keys() & tables.keys():
            planned, recorded, what = tables[column].plan(size), row[column], f"{column} {size}"
            height, width = recorded["unpadded_hw"]
            assert list(planned.mosaic) == recorded["grid_wh"], what
            assert planned.num_slots == recorded["tokens"], what
            assert (planned.layout.order == NEWLINE).sum() == height, what
            assert planned.num_slots == tables[column].vision.side ** 2 + height * (width + 1), what


# ---- token_layout ----------------------------------------------------------------------------------------------------


def run_token_layout(case: Case) -> None:
    """Recorded features, gathered by the planned order, are the sequence that the authors' code packs."""
    import torch

    from opsin.nn.batch import RowResample
    from opsin.nn.layout import row_table

    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    vision = tower(case.data["tile_size"], case.data["tile_size"] // case.data["side"])
    newline = torch.from_numpy(inputs["image_newline"])
    for index, image in enumerate(case.data["images"]):
        what = f"{case.name} image {index}"
        planned = model(original_resolution(image, vision), vision).plan((image["size_wh"][0], image["size_wh"][1]))
        assert list(planned.mosaic) == image["grid_wh"], what
        assert planned.num_slots == image["tokens"], what
        features = torch.from_numpy(inputs[f"features.{index}"])
        assert len(features) == planned.num_tiles, what
        resamples = []
        if (made := planned.layout.resample) is not None:
            rows = torch.from_numpy(made.rows).long()
            resamples.append(RowResample(rows, made.grid_in, made.grid_out, made.mode))
        table = row_table(features.flatten(0, 1), resamples, newline)
        packed = table[torch.from_numpy(planned.layout.order).long()]
        check_close(packed.numpy(), outputs[f"packed.{index}"], what, atol=case.data["tolerances"]["atol"])
    assert len(case.data["images"]) == sum(name.startswith("packed.") for name in outputs)


RUNNERS: dict[str, Callable[[Case], None]] = {
    "image_pixels": run_image_pixels,
    "size_table": run_size_table,
    "token_layout": run_token_layout,
}
