"""Runs of several processes on one machine, for tests.

A module of its own, because a spawned process must be able to import what it runs.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

from opsin.spec.recipe import RunConfig
from opsin.train import run
from train.toy import tensors_of, tiny_model, two_sources


def start(size: int, work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run work(rank, folder, *arguments) in `size` processes that know one another; raises what one of them raised."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_process, (size, work, folder, *arguments), nprocs=size, start_method="spawn")
    (folder / "meet").unlink(missing_ok=True)


def _process(rank: int, size: int, work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    try:
        work(rank, folder, *arguments)
    finally:
        dist.destroy_process_group()


def whole_run(rank: int, folder: Path, config: RunConfig) -> None:
    """The run of two stages to its end; every process leaves the model that it ends with."""
    result = run(config, model=tiny_model(folder / str(rank)), sources=two_sources())
    save_file(tensors_of(result.model), folder / f"{rank}.safetensors")
