"""The climb in transformers, which is imported when it is asked for and never needed otherwise.

How its classes are entered and where they are tapped stands in one table, `CLASSES`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from opsin.encode import Encoded
from opsin.errors import ConfigError
from opsin.media.prepare import PreparedImage
from opsin.spec.vision import VisionConfig
from opsin.text.render import ControlSpan, ImageSpan, TextSpan
from opsin.verify.ours import NUM_LOGITS, flat
from opsin.verify.rungs import Tap, Trace, as_array, tapped

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Points:
    """Where a class of transformers is entered and tapped. Paths are those of its modules."""

    features: tuple[str, str]
    """Module, and which of its arguments (or `output`) the tower's features are."""
    inputs: Callable[[PreparedImage, Tensor, Tensor], Inputs]
    """(picture, its patches as tiles (N, 3, H, W), ids) to what the forward pass needs beside ids."""
    language: str = "model.language_model"
    layers: str = "model.language_model.layers"
    positions: tuple[str, str] = ("model.language_model.rotary_emb", "position_ids")
    class_token: bool = False
    """Whether the features begin with a class token that is not read."""


def _tiles(image: PreparedImage, tiles: Tensor, ids: Tensor) -> Inputs:
    return {"pixel_values": tiles}


def _mosaic(image: PreparedImage, tiles: Tensor, ids: Tensor) -> Inputs:
    width, height = image.plan.size
    return {"pixel_values": tiles[None], "image_sizes": torch.tensor([[height, width]])}


def _patches(image: PreparedImage, tiles: Tensor, ids: Tensor) -> Inputs:
    is_slot = torch.zeros_like(ids)
    return {
        "pixel_values": torch.from_numpy(image.patches),
        "image_grid_thw": torch.from_numpy(image.grids),
        "mm_token_type_ids": is_slot,  # filled in by `climb`, which knows the slots
    }


PROJECTED = ("model.multi_modal_projector", "image_features")

CLASSES = {
    "LlavaForConditionalGeneration": Points(PROJECTED, _tiles),
    "LlavaNextForConditionalGeneration": Points(PROJECTED, _mosaic),
    "InternVLForConditionalGeneration": Points(("model.vision_tower", "output"), _tiles, class_token=True),
    "Qwen2VLForConditionalGeneration": Points(("model.visual.merger", "x"), _patches),
    "Blip2ForConditionalGeneration": Points(
        ("vision_model", "output"),
        _tiles,
        language="language_model",
        layers="language_model.model.decoder.layers",
        positions=("language_model.model.decoder.embed_positions", "position_ids"),
    ),
}
"""Classes of transformers that compute what a family here computes."""


def load_transformers() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"transformers cannot be imported ({error}), and it is what opsin is compared with. Install it "
            "(pip install transformers)"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def class_name(folder: Path) -> str:
    """The class of transformers that a folder's config.json names. Raises ConfigError where it is not in the table."""
    hub = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = next(iter(hub.get("architectures") or [None]))
    if name not in CLASSES:
        raise ConfigError(
            f"{folder}: transformers computes no model of class {name!r} by itself that opsin has too (it has "
            f"{', '.join(CLASSES)}); only recorded outputs of its authors' code can verify it"
        )
    return str(name)


@torch.inference_mode()
def climb(
    folder: Path,
    sample: Encoded,
    picture: Image.Image,
    vision: VisionConfig,
    *,
    dtype: torch.dtype,
    device: str,
    max_new_tokens: int,
    tokenizer: Path | None,
) -> Trace:
    """The same climb from a folder in a layout of transformers.

    Pixels and ids are its own. What comes after starts from ours, so that one fault shows on one rung. picture: as its
    users would hand it over. tokenizer: folder of its files, where the ids are those
    of a text.
    """
    transformers, trace = load_transformers(), Trace()
    points = CLASSES[class_name(folder)]
    _prepare(transformers, folder, picture, vision, trace)
    if tokenizer is not None:
        _tokenise(transformers, tokenizer, sample, trace)
    else:
        trace.missing["ids"] = "no tokenizer, so ids are given"
    model = _load(transformers, folder, dtype, device)

    image, ids = sample.images[0], torch.from_numpy(sample.ids)[None]
    read, written = ids[:, : sample.encoder_length or None], ids[:, sample.encoder_length :]
    inputs = points.inputs(image, to_tiles(image, vision), read)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"][:, sample.slots] = 1
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    inputs |= {"input_ids": read, "attention_mask": torch.ones_like(read)}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    start = {"decoder_input_ids": written.to(device)} if sample.encoder_length else {}

    with tapped(_taps(model, points, is_seq2seq=bool(sample.encoder_length))) as kept:
        logits = model(**inputs, **start).logits[0, -NUM_LOGITS:]
    features = kept["features"][:, 1:] if points.class_token else kept["features"]
    trace.values |= {
        "features": flat(features),
        "rows": flat(kept["language"][0, sample.slots]),
        "first layer": flat(kept["first layer"]),
        "last layer": flat(kept["last layer"]),
        "logits": as_array(logits),
    }
    if "positions" in kept:
        axes = kept["positions"].reshape(-1, ids.shape[1])  # (A, T)
        trace.values["positions"] = as_array(axes.T)
    else:
        trace.missing["positions"] = "relative to one another in this decoder"
    # BLIP-2 answers with its language model's own settings.
    language = model.get_submodule(points.language)
    model.generation_config = language.generation_config = transformers.GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=max_new_tokens, pad_token_id=0
    )
    new = model.generate(**inputs, **start)[0]
    trace.values["greedy"] = as_array(new[-max_new_tokens:])
    return trace


def to_tiles(image: PreparedImage, vision: VisionConfig) -> Tensor:
    """Prepared patches as tiles (N, 3, H, W); empty where a patch holds several frames, which no tile does."""
    p = vision.patch_size
    if image.patches.shape[1] != 3 * p * p:
        return torch.empty(0)
    _, rows, columns = image.grids[0]
    patches = image.patches.reshape(-1, rows, columns, 3, p, p).transpose(0, 3, 1, 4, 2, 5)
    return torch.from_numpy(np.ascontiguousarray(patches).reshape(-1, 3, rows * p, columns * p))


def to_patches(tiles: NDArray[Any], vision: VisionConfig) -> NDArray[Any]:
    """The inverse: (..., 3, H, W) to (P, 3 * p * p), a remainder of less than a patch left out; patches stay."""
    if tiles.ndim == 2:
        return tiles
    p = vision.patch_size
    tiles = tiles.reshape(-1, *tiles.shape[-3:])
    rows, columns = tiles.shape[2] // p, tiles.shape[3] // p
    patches = tiles[:, :, : rows * p, : columns * p].reshape(-1, 3, rows, p, columns, p)
    return np.ascontiguousarray(patches.transpose(0, 2, 4, 1, 3, 5)).reshape(-1, 3 * p * p)


def _prepare(transformers: Any, folder: Path, picture: Image.Image, vision: VisionConfig, trace: Trace) -> None:
    """Pixels by its processor, which resizes with Pillow as the authors' code does."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        trace.missing["pixels"] = f"transformers has no image processor for this folder ({_first_line(error)})"
        return
    tiles = processor(images=picture, return_tensors="np")["pixel_values"]
    trace.values["pixels"] = to_patches(np.asarray(tiles, np.float32), vision)


def _tokenise(transformers: Any, folder: Path, sample: Encoded, trace: Trace) -> None:
    """Ids of the same prompt, written as one text and read by its tokenizer; the picture's slots are ours."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        trace.missing["ids"] = f"transformers cannot read the tokenizer ({_first_line(error)})"
        return
    ids: list[int] = []
    text = ""
    for span in (*sample.spans, None):
        if isinstance(span, TextSpan | ControlSpan):
            text += span.text if isinstance(span, TextSpan) else span.token
            continue
        if text:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            text = ""
        if isinstance(span, ImageSpan):
            ids += sample.ids[sample.slots].tolist()
    trace.values["ids"] = np.array(ids, np.int64)


def _load(transformers: Any, folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Its model, plain attention, every tensor found."""
    model, report = getattr(transformers, class_name(folder)).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    unfit = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if unfit:
        raise ConfigError(
            f"{folder}: transformers misses or does not know {len(unfit)} tensors ({', '.join(unfit[:3])})"
        )
    return model.eval().to(device)


def _taps(model: Any, points: Points, *, is_seq2seq: bool) -> dict[str, Tap]:
    language = model.get_submodule(points.language)
    if is_seq2seq:  # T5 has two stacks: the first layer that reads, the last that writes
        first, last = language.encoder.block[0], language.decoder.block[-1]
    else:
        layers = model.get_submodule(points.layers)
        first, last = layers[0], layers[-1]
    taps = {
        "features": (model.get_submodule(points.features[0]), points.features[1]),
        "language": (language, "inputs_embeds"),
        "first layer": (first, "output"),
        "last layer": (last, "output"),
    }
    if not is_seq2seq:
        taps["positions"] = (model.get_submodule(points.positions[0]), points.positions[1])
    return taps


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
