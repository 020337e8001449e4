"""Model folders made for tests: tiny models with random weights in a published layout, and ways to spoil them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsin import families, weights
from opsin.weights import Model

State = dict[str, Tensor]


def tiny(id: str = "llava-next-tiny", seed: int = 1, **build: torch.dtype) -> Model:
    """A tiny preset with random weights."""
    config = families.preset(id).config
    return Model(vlm=weights.build(config, seed=seed, **build), config=config, name=id)


def published(folder: Path, id: str = "llava-next-tiny", layout: str = "hf", **options: int) -> Path:
    """Its export."""
    weights.export(folder, tiny(id), layout=layout, **options)
    return folder


def rewrite(folder: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of model.safetensors in place."""
    file = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(state)
    file.unlink()
    save_file(state, file)


def edit_json(file: Path, **changes: object) -> None:
    """Set some keys."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def raw_safetensors(header: object, data: bytes = b"") -> bytes:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def same(ours: State, wanted: State) -> bool:
    """Whether two state dicts hold the same names and bits."""
    return ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)
