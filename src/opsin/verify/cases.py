"""A recorded case: a folder with `case.json`, which says what was run, and the files that go with it.

Here is how each family's recorded inputs (ids, pixel values, grids) become samples. Everything comes from case.json,
the published config files and the tensors; names of folders say nothing.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from opsin.encode import Encoded
from opsin.errors import ConfigError
from opsin.media.prepare import PreparedImage
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native, VideoSampling
from opsin.spec.plan import Grid, ImagePlan, Size
from opsin.spec.positions import token_positions
from opsin.spec.resolution import DynamicTiles
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.spec.vision import VisionConfig
from opsin.verify.theirs import to_patches

Array = NDArray[Any]
Arrays = dict[str, Array]

IN_WORDS = {"features": "logits_and_hidden", "logits": "logits_and_hidden", "loss": "losses", "grads": "grads"}
"""Names of tolerances that are stated in words."""


@dataclass(frozen=True)
class Case:
    """What there is to know about a case stands in `data` and the files."""

    family: str
    kind: str
    name: str
    folder: Path
    data: dict[str, Any] = field(repr=False)
    """The content of `case.json`."""
    tokenizers: Path | None = field(default=None, repr=False)
    """Folder of published tokenizers, one folder each, for those who compare texts. It may not exist."""

    @classmethod
    def load(cls, folder: Path, tokenizers: Path | None = None) -> "Case":
        """Read `case.json`. Raises ConfigError when it cannot be read or does not say which family and kind it is."""
        data = _read_json(folder / "case.json")
        for key in ("family", "kind"):
            if not isinstance(data, dict) or not isinstance(data.get(key), str):
                raise ConfigError(f"{folder / 'case.json'} has no {key!r}")
        return cls(data["family"], data["kind"], str(data.get("case", folder.name)), folder, data, tokenizers)

    def json(self, name: str) -> Any:
        """The content of one JSON file of the case. Raises ConfigError where it cannot be read."""
        return _read_json(self.folder / name)

    def has(self, name: str) -> bool:
        """Whether the case has this file."""
        return (self.folder / name).is_file()

    def tensors(self, name: str) -> Arrays:
        """The arrays of one safetensors file of the case. Raises ConfigError where it cannot be read."""
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.folder / name} cannot be read: {error}") from None

    def allowed(self, what: str) -> dict[str, float]:
        """Recorded `atol` and `rtol` of features, logits, loss or grads, in each of the ways in which cases state them.

        Raises ConfigError where a case states none.
        """
        table = self.data.get("tolerances", self.data.get("tolerance"))
        if isinstance(table, dict):
            if f"{what}_atol" in table:
                return {"atol": table[f"{what}_atol"], "rtol": table.get(f"{what}_rtol", 0.0)}
            if "atol" in table:
                return {"atol": table["atol"], "rtol": table.get("rtol", 0.0)}
            said = re.findall(r"(atol|rtol) ([\d.e-]+)", str(table.get(IN_WORDS[what], "")))
            if said:
                return {"atol": 0.0, "rtol": 0.0} | {name: float(value) for name, value in said}
        raise ConfigError(f"{self.folder / 'case.json'} records no tolerance of {what}")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


# ---- what all families share -----------------------------------------------------------------------------------------


def cut(tiles: Array, vision: VisionConfig) -> tuple[Array, Array]:
    """Tiles (N, 3, H, W) as patches (P, 3 * p * p) and grids (N, 3)."""
    grid = (1, tiles.shape[2] // vision.patch_size, tiles.shape[3] // vision.patch_size)
    return to_patches(tiles.astype(np.float32), vision), np.array([grid] * len(tiles), np.int64)


def encoded(
    ids: Array,
    slots: Array | None = None,
    images: Sequence[PreparedImage] = (),
    *,
    taught: Array | None = None,
    positions: Array | None = None,
    encoder_length: int = 0,
    name: str = "",
) -> Encoded:
    """Recorded ids as a sample. Positions count from 0 unless given; nothing is taught unless said."""
    orders = [image.plan.layout.order for image in images]
    return Encoded(
        ids=ids.astype(np.int64),
        supervised=np.zeros(len(ids), np.bool_) if taught is None else taught,
        positions=np.arange(len(ids), dtype=np.int64)[:, None] if positions is None else positions,
        slots=np.zeros(0, np.int64) if slots is None else slots,
        slot_rows=np.concatenate(orders).astype(np.int64) if orders else np.zeros(0, np.int64),
        images=tuple(images),
        token_spans=np.zeros(len(ids), np.int64),
        spans=(),
        encoder_length=encoder_length,
        name=name,
    )


def check_slots(recorded: int, images: Sequence[PreparedImage], where: str) -> None:
    """Raises ConfigError unless as many slots are recorded as the pictures' plans have."""
    planned = sum(image.plan.num_slots for image in images)
    if recorded != planned:
        raise ConfigError(f"{where}: {recorded} picture slots are recorded, the model's plan has {planned}")


# ---- LLaVA -----------------------------------------------------------------------------------------------------------


def read_llava(config: VLMConfig, case: Case, inputs: Arrays) -> list[Encoded]:
    """Samples of the original code, whose pixels are `images`, or of transformers."""
    if any(name == "images" or name.startswith("images.") for name in inputs):
        return _read_llava_original(config, case, inputs)
    return _read_llava_hf(config, case, inputs)


def _read_llava_original(config: VLMConfig, case: Case, inputs: Arrays) -> list[Encoded]:
    """Right-padded ids with one mark per picture. A row without a mark still consumes one entry of the picture list."""
    mark = case.data["image_token_index"]
    pixels = llava_pictures(inputs)
    sizes = inputs.get("image_sizes_wh")
    samples, taken = [], 0
    for row, (ids, valid) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].astype(bool), strict=True)):
        ids, labels = ids[valid], inputs["labels"][row][valid]
        count = int((ids == mark).sum())
        images = [
            _tiled(config, pixels[i], tuple(sizes[i].tolist()) if sizes is not None else None)
            for i in range(taken, taken + count)
        ]
        taken += max(count, 1)
        entries = np.ones(len(ids), np.int64)
        entries[ids == mark] = [image.plan.num_slots for image in images]
        slots = np.flatnonzero(np.repeat(ids == mark, entries))
        taught = np.repeat(labels != -100, entries)
        ids = np.repeat(np.where(ids == mark, 0, ids), entries)
        samples.append(encoded(ids, slots, images, taught=taught, name=f"row {row}"))
    return samples


def llava_pictures(inputs: Arrays) -> list[Array]:
    """The original's picture list: one tile each (3, H, W), or the tiles (N, 3, H, W) of each."""
    if "images" in inputs:
        return list(inputs["images"])
    return [inputs[f"images.{i}"] for i in range(sum(name.startswith("images.") for name in inputs))]


def _read_llava_hf(config: VLMConfig, case: Case, inputs: Arrays) -> list[Encoded]:
    """Left-padded ids in which every picture slot already holds the image token; the last three tokens are taught."""
    samples, taken = [], 0
    specs, sizes = case.data["rows"], inputs.get("image_sizes")
    for row, (ids, valid) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].astype(bool), strict=True)):
        ids, images = ids[valid], []
        for index in range(taken, taken + specs[row]["images"]):
            height_width = tuple(sizes[index].tolist()) if sizes is not None else None
            images.append(_tiled(config, inputs["pixel_values"][index], height_width and height_width[::-1]))
        taken += specs[row]["images"]
        slots = np.flatnonzero(ids == config.image_token_id)
        check_slots(len(slots), images, f"{case.name} row {row}")
        taught = np.arange(len(ids)) >= len(ids) - 3
        samples.append(encoded(ids, slots, images, taught=taught, name=f"row {row}"))
    return samples


def _tiled(config: VLMConfig, pixels: Array, size: Size | None) -> PreparedImage:
    """Recorded pixel values (3, H, W) or (N, 3, H, W, padded to the largest N) as patches of the planned tiles."""
    side = config.vision.image_size
    plan = config.plan(size or (side, side))
    tiles = (pixels if pixels.ndim == 4 else pixels[None])[: plan.num_tiles]
    grids = np.array([tile.grid for tile in plan.tiles], np.int64)
    return PreparedImage(cut(tiles, config.vision)[0], grids, plan, "recorded")


# ---- BLIP-2 ----------------------------------------------------------------------------------------------------------


def read_blip2(config: VLMConfig, case: Case, inputs: Arrays, prefix: str = "") -> list[Encoded]:
    """Rows of ids with the picture's slots in front, padded on either side. A T5's labels are its decoder's tokens.

    prefix: `gen_` for the prompts of answers, which have no labels.
    """
    ids, valid = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"].astype(bool)
    labels = None if prefix else inputs["labels"]
    start = case.json("config.json")["text_config"].get("decoder_start_token_id")
    samples = []
    for row in range(len(ids)):
        image = one_tile(config, inputs["pixel_values"][row])
        kept = ids[row][valid[row]]
        slots = np.flatnonzero(kept == config.image_token_id)
        check_slots(len(slots), [image], f"{case.name} row {row}")
        length, taught = 0, None
        if isinstance(config.decoder, Seq2SeqConfig):
            length = len(kept)
            answer = labels[row][labels[row] != -100] if labels is not None else np.zeros(0, np.int64)
            kept = np.concatenate([kept, [start], answer])
            taught = np.arange(len(kept)) > length
        elif labels is not None:
            wanted = labels[row][valid[row]]
            taught = wanted != -100
            if not np.array_equal(wanted[taught], kept[taught]):
                raise ConfigError(f"{case.name} row {row}: its labels are not its own ids")
        samples.append(encoded(kept, slots, [image], taught=taught, encoder_length=length, name=f"row {row}"))
    return samples


def one_tile(config: Any, tile: Array) -> PreparedImage:
    """Recorded pixel values (3, H, W) of any size, as one tile of the model's plan."""
    plan = config.plan((tile.shape[-1], tile.shape[-2]))
    return PreparedImage(*cut(tile[None], config.vision), plan, "recorded")


# ---- Qwen-VL ---------------------------------------------------------------------------------------------------------


def read_qwen_vl(config: VLMConfig, case: Case, inputs: Arrays) -> list[Encoded]:
    """Rows of padded ids in which `<img>`, its slots and `</img>` stand; pictures come in the order of their slots."""
    assert config.image_token_id is not None
    pictures = list(inputs.get("images", np.zeros((0,), np.float32)))
    samples = []
    for row, valid in enumerate(inputs["attention_mask"].astype(bool)):
        ids = inputs["input_ids"][row][valid]
        begins = np.flatnonzero(ids == config.image_token_id - 2)
        ends = np.flatnonzero(ids == config.image_token_id - 1)
        if len(begins) != len(ends) or len(begins) > len(pictures):
            raise ConfigError(
                f"{case.name} row {row}: {len(begins)} pictures begin, {len(ends)} end, {len(pictures)} are left"
            )
        images = [one_tile(config, pictures.pop(0)) for _ in begins]
        slots = [np.arange(a + 1, b) for a, b in zip(begins, ends, strict=True)]
        places = np.concatenate(slots) if slots else np.zeros(0, np.int64)
        check_slots(len(places), images, f"{case.name} row {row}")
        taught = inputs["labels"][row][valid] != -100 if "labels" in inputs else None
        samples.append(encoded(ids, places, images, taught=taught, name=f"row {row}"))
    if pictures:
        raise ConfigError(f"{case.name}: {len(pictures)} recorded pictures are shown nowhere")
    return samples


# ---- Qwen2-VL --------------------------------------------------------------------------------------------------------


def read_qwen2_vl(config: VLMConfig, inputs: Arrays) -> list[Encoded]:
    """Rows of padded ids with their pictures and videos, whose patches stand in two lists over the whole batch."""
    used = {"image": 0, "video": 0}
    taken = dict(used)
    samples = []
    for row, valid in enumerate(inputs["attention_mask"].astype(bool)):
        ids = inputs["input_ids"][row][valid]
        media = grids_of(config, ids, inputs, taken)
        images = []
        for kind, _, grid in media:
            pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
            count = grid[0] * grid[1] * grid[2]
            images.append(_of_grid(config, pixels[used[kind] : used[kind] + count], grid))
            used[kind] += count
        slots = np.flatnonzero((ids == config.image_token_id) | (ids == config.video_token_id))
        rasters = [(start, merged(grid)) for _, start, grid in media]
        taught = inputs["labels"][row][valid] != -100 if "labels" in inputs else None
        positions = token_positions(len(ids), rasters, config.decoder)
        samples.append(encoded(ids, slots, images, taught=taught, positions=positions, name=f"row {row}"))
    return samples


def merged(grid: Grid) -> Grid:
    """Rows of a grid of patches."""
    return (grid[0], grid[1] // 2, grid[2] // 2)


def grids_of(config: VLMConfig, ids: Array, given: Arrays, taken: dict[str, int]) -> list[tuple[str, int, Grid]]:
    """(kind, first slot, grid) of what a row of ids shows, in order; `taken` counts grids over the rows."""
    found: list[tuple[str, int, Grid]] = []
    kinds = {config.image_token_id: "image", config.video_token_id: "video"}
    place = 0
    while place < len(ids):
        kind = kinds.get(int(ids[place]))
        if kind is None:
            place += 1
            continue
        t, h, w = (int(n) for n in given[f"{kind}_grid_thw"][taken[kind]])
        taken[kind] += 1
        found.append((kind, place, (t, h, w)))
        count = t * h * w // 4
        if not (ids[place : place + count] == ids[place]).all():
            raise ConfigError(f"the grid {(t, h, w)} and its slots from token {place} on do not match")
        place += count
    return found


def _of_grid(config: VLMConfig, patches: Array, grid: Grid) -> PreparedImage:
    """Recorded patches with the plan of a picture, or of a video, that is as large as its grid."""
    t, h, w = grid
    free = Native(
        factor=2 * config.vision.patch_size,
        min_pixels=1,
        max_pixels=2**40,
        video=VideoSampling(rule="transformers", min_pixels=1, max_pixels=2**40, max_total_pixels=None),
    )
    config = config.replace(resolution=free)
    size = (w * config.vision.patch_size, h * config.vision.patch_size)
    plan: ImagePlan = config.plan(size) if t == 1 else config.plan_video(size, num_frames=t * config.vision.frames)
    if plan.tiles[0].grid != grid:
        raise ConfigError(f"a grid of {grid} is recorded, the model's plan has {plan.tiles[0].grid}")
    return PreparedImage(np.ascontiguousarray(patches, np.float32), np.array([grid], np.int64), plan, "recorded")


# ---- InternVL --------------------------------------------------------------------------------------------------------


def read_internvl(config: VLMConfig, case: Case, given: Arrays) -> list[Encoded]:
    """Rows of padded ids. Every stretch of image tokens is a picture, which takes the next tiles of the batch."""
    tiles = given.get("pixel_values", np.zeros((0, 3, 1, 1), np.float32))
    # Text-only samples of a training batch bring a dummy tile along, which a flag takes out again.
    tiles = tiles[given["image_flags"].reshape(-1) != 0] if "image_flags" in given else tiles
    assert not isinstance(config.resolution, Native)
    per_tile = (config.resolution.tile_size // config.vision.patch_size // 2) ** 2
    mask = given.get("attention_mask", np.ones_like(given["input_ids"])).astype(bool)
    used, samples = 0, []
    for row, valid in enumerate(mask):
        ids, images = given["input_ids"][row][valid], []
        for length in [len(list(group)) for is_image, group in groupby(ids == config.image_token_id) if is_image]:
            count = length // per_tile
            images.append(_in_a_row(config, tiles[used : used + count]))
            check_slots(length, images[-1:], f"{case.name} row {row}")
            used += count
        slots = np.flatnonzero(ids == config.image_token_id)
        taught = given["labels"][row][valid] != -100 if "labels" in given else None
        samples.append(encoded(ids, slots, images, taught=taught, name=f"row {row}"))
    if used != len(tiles):
        raise ConfigError(f"{case.name}: {used} tiles are shown, {len(tiles)} recorded")
    return samples


def _in_a_row(config: VLMConfig, tiles: Array) -> PreparedImage:
    """Recorded tiles as one picture: a plan of as many tiles in a row."""
    assert not isinstance(config.resolution, Native)
    count, side = len(tiles), config.resolution.tile_size
    rule = DynamicTiles(tile_size=side, min_tiles=count, max_tiles=count, thumbnail="none")
    plan = config.replace(resolution=rule).plan((count * side, side))
    return PreparedImage(*cut(tiles, config.vision), plan, "recorded")
