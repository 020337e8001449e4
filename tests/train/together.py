"""Runs of several processes on one machine, for tests.

A module of its own, because a spawned process must be able to import what it runs.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import toys
from opsin import families, weights
from opsin.errors import MediaError, OpsinError
from opsin.families.blip2 import TINY_RETRIEVER
from opsin.match import PairEncoder
from opsin.spec.qformer import TextControls
from opsin.spec.recipe import RunConfig
from opsin.text.messages import Conversation
from opsin.text.tokenizer import load_tokenizer
from opsin.train import Loss, StopRequest, checkpoint, next_token, run, train_stage
from opsin.train.checkpoint import CheckpointStore
from opsin.train.parallel import local, open_world
from opsin.train.stage1 import CaptionPairs, stage1
from train.toy import DrawnSource, stage, tensors_of, tiny_model, two_sources, two_stages, write_conversations

MIXTURES = {"frozen tower": ["connector", "decoder"], "decoder": ["decoder"], "all": ["vision", "connector", "decoder"]}
"""What trains while pictures and text alone mix."""


def start(size: int, work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run work(rank, folder, *arguments) in `size` processes that know one another; raises what one of them raised."""
    folder.mkdir(parents=True, exist_ok=True)
    if size == 1:
        work(0, folder, *arguments)
    else:
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


def adamw_stages(output: Path, **changes: Any) -> RunConfig:
    """`two_stages` with AdamW alone: Muon makes much of differences in rounding, and the curve is to be compared."""
    data = two_stages(output, **changes).model_dump(mode="json")
    data["stages"][1]["optim"] = {"kind": "adamw", "lr": 1e-3, "weight_decay": 0.1}
    return RunConfig.parse(data, where="test")


def finishing_run(rank: int, folder: Path, output: Path) -> None:
    """A run whose stages end with their best weights, which the first evaluation of each is made to be."""
    held_out = {name: DrawnSource(5, with_text=False) for name in ("first", "second")}
    data = adamw_stages(output).model_dump(mode="json")
    for each in data["stages"]:
        each["evaluate"] = {"every": 2, "finish": "best"}
        each["optim"] |= {"lr": 10.0}  # whatever follows is worse
    config = RunConfig.parse(data, where="test")
    model = tiny_model(folder / str(rank))
    result = run(config, model=model, sources=two_sources(), held_out=held_out)
    save_file(tensors_of(result.model), folder / f"{rank}.safetensors")


def whole_run(rank: int, folder: Path, config: RunConfig, stop_after: int | None = None) -> None:
    """A run of two stages; every process leaves the model that it ends with and the samples that it read."""
    stop, rows = StopRequest(), []
    sources = {stage.name: two_sources()[stage.name] for stage in config.stages}

    def on_row(row: Any) -> None:
        rows.append(row)
        if len(rows) == stop_after and rank == 0:  # one process is asked; all stop
            stop.make()

    result = run(config, model=tiny_model(folder / str(rank)), sources=sources, on_row=on_row, stop=stop)
    save_file(tensors_of(result.model), folder / f"{rank}.safetensors")
    asked = [place for source in sources.values() for place in source.asked]  # type: ignore[attr-defined]
    (folder / f"{rank}.json").write_text(json.dumps({"status": result.status, "steps": result.steps, "asked": asked}))


def mixtures(rank: int, folder: Path, names: list[str]) -> None:
    """Steps in which some processes have pictures and others have text alone, or nothing, for many models."""
    losses = {}
    size = dist.get_world_size() if dist.is_initialized() else 1
    for family in names:
        for what, trainable in MIXTURES.items():
            model = tiny_model(folder / str(rank), family)
            # Steps of 4, 4 and 1 samples, of which 9 have two of text alone.
            rows = train_stage(
                model.vlm,
                stage(trainable=trainable, batch={"samples": 4, "micro_samples": 1}),
                DrawnSource(9),
                tokenizer=model.tokenizer,
            )
            losses[f"{family}, {what}"] = [(row["loss"], row["grad_norm"], row["image_tokens"]) for row in rows]
            held = sum(local(parameter).numel() for parameter in model.vlm.parameters())
            most = 1.1 * sum(parameter.numel() for parameter in model.vlm.parameters()) / size
            assert held < most, f"process {rank} holds {held} numbers"
    (folder / f"{rank}.json").write_text(json.dumps(losses))


def adapters(rank: int, folder: Path, config: RunConfig) -> None:
    """A run of one stage that trains adapters, whose model every process ends with."""
    result = run(config, model=tiny_model(folder / str(rank)), sources={"second": DrawnSource(18)})
    save_file(tensors_of(result.model), folder / f"{rank}.safetensors")


class BadPicture(DrawnSource):
    """One sample cannot be read."""

    def sample(self, index: int, epoch: int) -> Conversation:
        if index == 12:
            raise MediaError("picture 12 is damaged")
        return super().sample(index, epoch)


def judged(rank: int, folder: Path, config: RunConfig) -> None:
    """A run that is evaluated and leaves out the samples that cannot be read."""
    sources = {"first": DrawnSource(8, with_text=False), "second": BadPicture(18)}
    held_out = {"first": DrawnSource(5), "second": DrawnSource(5)}
    rows: list[Any] = []
    result = run(config, model=tiny_model(folder / str(rank)), sources=sources, held_out=held_out, on_row=rows.append)
    (folder / f"{rank}.json").write_text(json.dumps([result.status, result.steps, len(rows)]))


def failing(rank: int, folder: Path) -> None:
    """Three runs that end with an error, which each process leaves in a file of the run's name and its own number."""

    def attempt(name: str, **given: Any) -> None:
        config = adamw_stages(folder / name, checkpoint={"every": 1})
        try:
            run(config, model=tiny_model(folder / str(rank)), **{"sources": two_sources(), **given})
        except OpsinError as error:
            (folder / f"{name}-{rank}.txt").write_text(f"{type(error).__name__}: {error}")

    def infinite(vlm: Any, batch: Any) -> Loss:
        loss = next_token(vlm, batch)
        return Loss(loss.total * float("inf"), loss.count) if "picture 12" in batch.names else loss

    attempt("not finite", objectives={"second": infinite})
    attempt("unreadable", sources={**two_sources(), "second": BadPicture(18)})
    real, calls = checkpoint.save_file, []

    def save(*arguments: Any) -> None:
        """The disk of the second process is full at the third checkpoint."""
        calls.append(1)
        if rank == 1 and len(calls) == 6:
            raise OSError(28, "No space left on device")
        real(*arguments)

    checkpoint.save_file = save
    attempt("full disk")


def pairs_compared(rank: int, folder: Path) -> None:
    """BLIP-2's stage 1, whose last step has 3 pairs for all processes."""
    config = TINY_RETRIEVER.replace(controls=TextControls(first="<s>", last="</s>", caption="<unk>"))
    encoder = PairEncoder(config, load_tokenizer(toys.tokenizer_folder(folder / str(rank) / "tokenizer")))
    parts = ["norm_features", "queries", "qformer", "words", "positions", "vision_proj", "text_proj", "itm_head"]
    retriever = weights.build_retriever(config, seed=4)
    rows = train_stage(
        retriever,
        stage(trainable=[*parts, "captions", "temperature"], batch={"samples": 6, "form": "pad"}),
        CaptionPairs(DrawnSource(9, with_text=False), encoder),
        objective=stage1(encoder.caption_id),
    )
    assert retriever.temperature is not None
    left = {"losses": [row["loss"] for row in rows], "temperature": float(retriever.temperature.detach())}
    (folder / f"{rank}.json").write_text(json.dumps(left))


def torchrun(folder: Path, *arguments: str, size: int = 2) -> subprocess.Popen:
    """The command of the documentation, with its output in one pipe."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *arguments]
    # Tests may be started with signals ignored, which children inherit; a shell's Ctrl-C reaches a group of its own.
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def write_project(folder: Path) -> None:
    """A run file of one stage, `run.yaml`, and all it needs."""
    write_conversations(folder, 12)
    tune = {
        "name": "tune",
        "trainable": ["connector", "decoder"],
        "data": [{"path": "data.json", "image_root": "images"}],
        "batch": {"samples": 4},
        "optim": {"kind": "adamw", "lr": 1e-3},
        "steps": 40,
    }
    settings = {"init": "random", "tokenizer": "tokenizer", "output": "out", "device": "cpu", "log_every": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": "llava-1.5-tiny", **settings, "stages": [tune]}))


def split_tensors() -> dict[str, Tensor]:
    """Tensors that each process holds some rows of: some of them fewer than there are processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (7, 3), "row": (1, 5), "vector": (8,)}
    return {name: distribute_tensor(torch.randn(s, generator=draw), mesh, [Shard(0)]) for name, s in shapes.items()}


def save_split(rank: int, folder: Path) -> None:
    """A checkpoint of them."""
    with open_world(torch.device("cpu")) as world:
        CheckpointStore(folder, keep=1).save(1, tensors={"weights": split_tensors()}, state={}, world=world)


def load_split_with_dcp(rank: int, folder: Path) -> None:
    """PyTorch's own reader puts them back into as many parts as there are processes now."""
    wanted = split_tensors()
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(folder / "step-00000001")))
    for name, tensor in wanted.items():
        assert torch.equal(local(found[name]), local(tensor)), (rank, name)
    dist.barrier()


FAMILIES = [family.name for family in families.FAMILIES]


def main(folder: Path) -> None:
    """What torchrun starts where processes are killed: `two_stages`, saying who runs and how far it is."""

    rank = os.environ["RANK"]

    def on_row(row: Any) -> None:
        if rank == "0":
            print(f"{row['stage']} {row['step']}\n", end="", flush=True)

    torch.set_num_threads(1)
    print(f"process {rank} {os.getpid()}\n", end="", flush=True)
    run(two_stages(folder / "out"), model=tiny_model(folder / rank), sources=two_sources(), on_row=on_row)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
