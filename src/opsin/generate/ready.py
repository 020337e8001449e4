"""A model made ready to answer on this machine: device, dtype and layout of its weights."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

from opsin import weights
from opsin.errors import ConfigError
from opsin.nn.packed import pack
from opsin.weights import Model

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What a CPU gets converted or packed: a mapped file would stay in memory beside it."""


def load_ready(name: str | Path, *, device: str = "auto", dtype: str = "auto", **options: Any) -> Model:
    """Load a model for inference. Options are those of `weights.load`; the model cannot be trained or saved afterwards.

    device: `auto` is a GPU where there is one. dtype: `auto` is the checkpoint's own, except that float16 becomes
    bfloat16 on a CPU that has kernels for it, else float32: CPUs compute float16 many times slower.
    """
    chosen = choose_device(device)
    model = weights.load(name, device=chosen, dtype=dtype, unmapped=_FLOATS, **options)
    if chosen == "cpu":
        if dtype == "auto" and model.vlm.decoder.embed.weight.dtype == torch.float16:
            has_kernels = torch.ops.mkldnn._is_mkldnn_bf16_supported()
            model.vlm.to(torch.bfloat16 if has_kernels else torch.float32)
        pack(model.vlm)
        _return_freed_memory()
    return model


def _return_freed_memory() -> None:
    """Give the pages of the unpacked weights back to the system.

    glibc keeps what is freed between blocks in use: 220 MiB of 1,070 for 310 million parameters in bfloat16. Other
    libraries of C have no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def choose_device(device: str) -> str:
    """`auto` to the best device here; anything else is checked. Raises ConfigError."""
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_gpu else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not known. Known: auto, cpu, cuda, cuda:1, ...")
    if kind == "cuda" and not has_gpu:
        raise ConfigError(f"device {device!r}: this machine, or this build of torch, has no GPU to offer. Use cpu")
    return device
