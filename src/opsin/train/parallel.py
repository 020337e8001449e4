"""Several processes as one run: who reads which samples, what all must know, and tensors that each holds a part of.

The rest of the trainer sees a `World`. One process is a world in which every question is answered at once.

Two rules keep processes together. Whatever one of them meets (an error, a signal, a number that is not finite) is told
to all before anything is written or updated. And all run the same modules in the same order: where one has no sample
left in a round, or no picture while others have some, it runs a stand-in that counts for nothing.
"""

import copy
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opsin.encode import Encoded
from opsin.errors import OpsinError, TrainError
from opsin.nn.batch import Batch
from opsin.nn.decoder import DecoderLayer
from opsin.nn.qformer import QFormerLayer
from opsin.nn.vision import VisionLayer
from opsin.train.blocks import blocks_of, elementwise
from opsin.train.objectives import Objective

Item = TypeVar("Item")
TIMEOUT = timedelta(minutes=30)
"""How long processes wait for one another: the first may read and check a large checkpoint alone."""


class TogetherError(TrainError):
    """An error that all processes of a run raise with the same text, so that only the first needs to print it."""


class World:
    """The processes of a run, and which of them this is."""

    def __init__(self, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None) -> None:
        """device: what this process computes on. group: carries small messages between CPUs; None for one process."""
        self.device = torch.device(device)
        self._group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that logs, prints and writes what is written once."""
        return self.rank == 0

    def share(self, samples: Sequence[Item]) -> Sequence[Item]:
        """The samples of a step that this process reads: every size-th one, so that lengths in order spread evenly."""
        return samples[self.rank :: self.size]

    def rows(self, num_rows: int) -> slice:
        """The first axis of a split tensor, as far as this process holds it (FSDP2 cuts like `torch.chunk`)."""
        each = -(-num_rows // self.size)
        return slice(min(num_rows, self.rank * each), min(num_rows, (self.rank + 1) * each))

    def sums(self, *numbers: float) -> list[float]:
        """Sums over all processes, in double precision."""
        if self._group is None:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        return sums.tolist()

    def any(self, *facts: bool) -> list[bool]:
        """For each fact, whether it holds on some process."""
        if self._group is None:
            return list(facts)
        largest = torch.tensor(facts, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return [bool(fact) for fact in largest.tolist()]

    def texts(self, text: str) -> list[str]:
        """The texts of all processes, in order of their ranks."""
        if self._group is None:
            return [text]
        encoded = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())])
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self._group)
        padded = encoded.new_zeros(max(1, *(int(each) for each in lengths)))
        padded[: len(encoded)] = encoded
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self._group)
        return [bytes(each[: int(n)].tolist()).decode() for each, n in zip(gathered, lengths, strict=True)]

    def lists(self, items: Sequence[str]) -> list[list[str]]:
        """The lists of all processes."""
        return [json.loads(text) for text in self.texts(json.dumps(list(items)))]

    def named(self, rank: int) -> str:
        """A process for a message; nothing where there is one."""
        return "" if self.size == 1 else f" (process {rank})"

    def told(self, text: str) -> str:
        """The text of the first process."""
        return self.texts(text)[0]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A stretch that all processes pass, or none: an error of the library on one is raised on all."""
        if self._group is None:
            yield
            return
        error = None
        try:
            yield
        except OpsinError as raised:
            error = raised
        self.raise_any(error)

    def raise_any(self, error: OpsinError | None) -> None:
        """Raise on all processes what some of them met."""
        if self._group is None:
            if error is not None:
                raise error
            return
        texts = self.texts("" if error is None else str(error))
        if any(texts):
            first = next(rank for rank, text in enumerate(texts) if text)
            common = len(set(texts)) == 1
            raise TogetherError(
                texts[first] if common else f"process {first} of {self.size}: {texts[first]}"
            ) from error

    def rounds(
        self, groups: Iterator[list[Encoded]], *, alone_allowed: bool, where: str
    ) -> Iterator[tuple[list[Encoded], bool]]:
        """The passes of a step, those of all processes beside one another.

        Gives this process' own (empty when it has none left and others have) and whether any of them shows a picture.
        alone_allowed: whether some may have none while others have. where: for the message when they may not.
        """
        while True:
            group: list[Encoded] = []
            error = None
            try:
                group = next(groups, [])
            except OpsinError as raised:
                error = raised
            pictures = any(sample.images for sample in group)
            failed, some, none, pictures = self.any(error is not None, bool(group), not group, pictures)
            if failed:
                self.raise_any(error)
            if not some:
                return
            if none and not alone_allowed:
                raise TogetherError(
                    f"{where}: its objective compares the samples of all {self.size} processes, but one of them has "
                    "none left while others have. Take numbers of samples that the number of processes divides, and "
                    "no micro_samples or micro_tokens."
                )
            yield group, pictures

    def split(self, step: "Step", *, low: torch.dtype | None) -> None:
        """Move a module to the device, each process holding its rows of every parameter (FSDP2).

        A block's parameters are whole only while it runs; those outside blocks while the step's objective does.
        low: dtype in which blocks travel; gradients are added up in float32, and what is trained stays float32.
        """
        if self.size == 1:
            step.to(self.device)
            return
        mesh = init_device_mesh(self.device.type, (self.size,))
        # Inputs are not cast: as on one process, autocast decides the arithmetic of every operation.
        whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks_of(step.module):
            if isinstance(block, QFormerLayer):  # small, and stage 1 runs each several times with different parts
                continue
            policy = whole
            if low is not None and isinstance(block, VisionLayer | DecoderLayer):
                fully_shard(elementwise(block), mesh=mesh, mp_policy=whole)  # autocast reads these in float32
                policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        scalars = {parameter for parameter in step.parameters() if parameter.ndim == 0}  # FSDP2 cannot split them
        for scalar in scalars:
            scalar.data = scalar.data.to(self.device)
        fully_shard(step, mesh=mesh, mp_policy=whole, ignored_params=scalars)
        for module in step.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # sums: the step divides them, by the taught tokens of all
                module.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def joined(self, step: "Step") -> Iterator[None]:
        """Inside, methods of a split module work as those of a whole one, if all processes call them."""
        if isinstance(step, FSDPModule):
            step.unshard()
        try:
            yield
        finally:
            if isinstance(step, FSDPModule):
                step.reshard()

    def add_up(self, gradients: Iterable[Tensor]) -> None:
        """Add up the gradients of parameters that are not split; FSDP2 has done so with the others."""
        if self.size > 1:
            for gradient in gradients:
                if not isinstance(gradient, DTensor):
                    dist.all_reduce(gradient)

    def norm(self, gradients: Sequence[Tensor]) -> float:
        """2-norm over whole tensors of which each process holds its part."""
        if self.size == 1:
            return float(nn.utils.get_total_norm(gradients))
        mine = [local(gradient) for gradient in gradients if self.is_first or isinstance(gradient, DTensor)]
        (squares,) = self.sums(float(nn.utils.get_total_norm(mine)) ** 2)
        return math.sqrt(squares)


class Step(nn.Module):
    """A module under its objective. Its `forward` is what FSDP2 sees as the whole model's."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.module = module
        self.objective = objective

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """The sum over taught tokens, and how many they are."""
        loss = self.objective(self.module, batch)
        return loss.total, loss.count


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory; all of it where it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(part: Tensor, parameter: Tensor) -> Tensor:
    """This process' part of a tensor as one that is split like `parameter`, on the same device."""
    part = part.to(parameter.device)
    if not isinstance(parameter, DTensor) or part.ndim == 0:
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def skeleton(module: nn.Module) -> nn.Module:
    """A copy without numbers, to be filled by `load_state_dict(..., assign=True)`: what is split cannot be joined."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo={**empty, **{id(buffer): buffer for buffer in module.buffers()}})


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """All numbers of a split module, on the CPU of every process, which must all ask."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in module.state_dict().items()
    }


@contextmanager
def open_world(device: torch.device) -> Iterator[World]:
    """The processes that torchrun, or whoever set up torch.distributed, has started; one where nobody did.

    device: of the run; under torchrun each process takes the GPU of its own number on its machine. What waits for a
    process that is gone raises TrainError.
    """
    started = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if started:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            yield World(device)
            return
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        try:
            yield World(device, dist.new_group(backend="gloo", timeout=TIMEOUT))
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
                raise TrainError(
                    f"another process of this run has ended, so that process {dist.get_rank()} cannot go on: look for "
                    f"what that one said. The same command goes on from the last checkpoint. ({error})"
                ) from None
            raise
    finally:
        if started:
            dist.destroy_process_group()
