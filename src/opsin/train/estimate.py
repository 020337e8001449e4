"""What a run will take before it begins: FLOPs and tokens per step, memory per device, and time on a named machine.

FLOPs are exact for the samples reckoned with (`flops`); memory counts every tensor of weights, gradients, optimizer and
activations; time is FLOPs by peak and utilisation. docs/training_cost.md compares it with what was published.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from opsin.data.passes import passes
from opsin.nn.lora import attach, detach
from opsin.nn.qformer import QFormerLayer
from opsin.nn.quantize import BITS_STORED, Bits, quantizable
from opsin.nn.retriever import Retriever
from opsin.nn.seq2seq import EncoderLayer
from opsin.nn.vlm import VLM
from opsin.spec.machine import Machine, parse_machine
from opsin.spec.recipe import RunConfig, Stage
from opsin.train.blocks import blocks_of
from opsin.train.flops import SampleShape, pass_work
from opsin.train.objectives import CHUNK_ELEMENTS
from opsin.train.optim import make_groups
from opsin.train.prepare import describe_run, on_meta, parameter_table, stage_trainable
from opsin.train.tape import FLOAT32, HALF, Work
from opsin.train.trainable import Trainable, set_trainable
from opsin.train.workload import Typical, Workload, find_workload, local_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opsin.encode import Encoded

MOST_SAMPLES = 256
"""So many samples of a device's share stand for all of it."""
OPTIMIZER_BYTES = {"adamw": 2 * FLOAT32, "muon": FLOAT32}
"""Of each number that trains: two averages, or one."""
MUON_ITERATIONS = 5
"""Of Newton and Schulz, by which torch.optim.Muon makes each update orthogonal."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    weights: int
    """In float32, spread evenly over the devices, as gradients and optimizer are."""
    gradients: int
    optimizer: int
    activations: int
    """Kept for the way back, of the largest pass."""
    activations_checkpointed: int
    """The same where each block is computed again on the way back."""
    working: int
    """Copies of weights in the precision and place of the products, a chunk of logits, and gradients made with it."""

    @property
    def state(self) -> int:
        """What is there between steps."""
        return self.weights + self.gradients + self.optimizer

    def total(self, *, checkpointing: bool) -> int:
        """All of it. Kernels' own workspace and fragments of the allocator are not counted: leave a tenth free."""
        activations = self.activations_checkpointed if checkpointing else self.activations
        return self.state + activations + self.working


@dataclass(frozen=True)
class StageEstimate:
    """One stage; the keys of `--json`."""

    stage: str
    parts: tuple[tuple[str, int, int], ...]
    """(part, parameters, of them trained)."""
    samples: int
    """Per step."""
    steps: int | None
    """None where neither steps nor the number of samples are known."""
    epoch_samples: int | None
    tokens: int
    """Per step, of which `image_tokens` are of pictures; `taught_tokens` are learned."""
    image_tokens: int
    taught_tokens: int
    tokens_from: str
    problem: str
    """Why the data was not used, where it was not."""
    forward: dict[str, float]
    """FLOPs per step of each part."""
    backward: dict[str, float]
    again: float
    """FLOPs per step of computing blocks again; part of `flops` with `checkpointing`."""
    update: float
    """FLOPs per step of the optimizer's own products: Muon's."""
    memory: Memory
    checkpointing: bool = False
    """Whether blocks are computed again on the way back."""
    machine: str | None = None
    utilisation: float | None = None
    fits: bool | None = None
    """Whether the memory of a device suffices; None where no machine, or not its memory, is known."""
    seconds_per_step: float | None = None

    @property
    def flops(self) -> float:
        """Per step, all in all."""
        passes = sum(self.forward.values()) + sum(self.backward.values())
        return passes + (self.again if self.checkpointing else 0) + self.update

    @property
    def seconds(self) -> float | None:
        """For all steps."""
        return None if self.seconds_per_step is None or self.steps is None else self.seconds_per_step * self.steps


def estimate(
    config: RunConfig,
    machine: Machine | str | None = None,
    *,
    checkpointing: bool | None = None,
    typical: Typical | None = None,
) -> list[StageEstimate]:
    """What each stage of a run will take. No weights are read.

    machine: such as "8xA100-80GB"; None leaves the time open. checkpointing: whether blocks are computed again on the
    way back; None as the run says (`activations`). typical: the sample to reckon with, instead of what the data says.
    """
    return [each for each, _, _ in walk(config, machine, checkpointing=checkpointing, typical=typical)]


def walk(
    config: RunConfig,
    machine: Machine | str | None = None,
    *,
    checkpointing: bool | None = None,
    typical: Typical | None = None,
) -> Iterator[tuple[StageEstimate, nn.Module, Trainable]]:
    """`estimate` stage by stage, with the module on the meta device and what trains of it."""
    machine = parse_machine(machine) if isinstance(machine, str) else machine
    again = config.activations == "recompute" if checkpointing is None else checkpointing
    model = describe_run(config)
    module = on_meta(model)
    tokenizer, missing = local_tokenizer(config)
    for stage in config.stages:
        trainable = stage_trainable(module, model, stage)
        workload = find_workload(
            config,
            stage,
            module=module,
            model=model,
            trained=trainable.names,
            tokenizer=tokenizer,
            missing=missing,
            typical=typical,
        )
        half, devices = config.precision == "bfloat16", machine.count if machine else 1
        if stage.lora is not None:
            attach(module, stage.lora, trainable.targets)
        done = _estimate_stage(stage, module, trainable, workload, devices=devices, half=half, bits=config.quantize)
        yield _on(machine, replace(done, checkpointing=again), config.precision), module, trainable
        detach(module)


def _estimate_stage(
    stage: Stage,
    module: VLM | Retriever,
    trainable: Trainable,
    workload: Workload,
    *,
    devices: int,
    half: bool,
    bits: Bits | None,
) -> StageEstimate:
    trained = set_trainable(module, trainable)
    algorithms = {name: each.algorithm for each in make_groups(trained, stage.optim) for name in each.names}
    per_step = min(stage.batch.samples, workload.per_epoch or stage.batch.samples)
    share = -(-per_step // devices)
    count = max(min(share, MOST_SAMPLES), len(workload.samples))
    samples = list(islice(cycle(workload.samples), count))
    steps = [samples[start : start + share] for start in range(0, count, share)]
    # A shape has all that is asked of a sample here: how many tokens it is long.
    groups = Counter(tuple(group) for step in steps for group in passes(cast("Iterable[Encoded]", step), stage.batch))
    works = {
        group: pass_work(module, cast("Sequence[SampleShape]", group), pack=stage.batch.form == "pack", half=half)
        for group in groups
    }
    scale = per_step / len(samples)
    forward: defaultdict[str, float] = defaultdict(float)
    backward: defaultdict[str, float] = defaultdict(float)
    again = 0.0
    for group, times in groups.items():
        for part in works[group].forward:
            forward[part] += scale * times * works[group].forward[part]
            backward[part] += scale * times * works[group].backward[part]
        again += scale * times * works[group].again
    return StageEstimate(
        stage=stage.name,
        parts=tuple(parameter_table(module, trainable)),
        samples=per_step,
        steps=workload.num_steps,
        epoch_samples=workload.per_epoch,
        tokens=round(scale * sum(sample.num_tokens for sample in samples)),
        image_tokens=round(scale * sum(sample.num_image_tokens for sample in samples)),
        taught_tokens=round(scale * sum(sample.num_supervised for sample in samples)),
        tokens_from=workload.origin,
        problem=workload.problem,
        forward=dict(forward),
        backward=dict(backward),
        again=again,
        update=sum(_muon_flops(trained[name]) for name, algorithm in algorithms.items() if algorithm == "muon"),
        memory=_memory(module, algorithms, list(works.values()), samples, devices=devices, half=half, bits=bits),
    )


def _muon_flops(matrix: Tensor) -> int:
    """x x^T, its square, and that times x, in each iteration; x lies on its longer side."""
    short, long = sorted(matrix.shape)
    return MUON_ITERATIONS * (4 * short**2 * long + 2 * short**3)


def _memory(
    module: VLM | Retriever,
    algorithms: Mapping[str, str],
    works: Sequence[Work],
    samples: Sequence[SampleShape],
    *,
    devices: int,
    half: bool,
    bits: Bits | None,
) -> Memory:
    """algorithms: of each tensor that trains, by name. bits: of frozen linear layers."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    stored: float = FLOAT32 * sum(sizes.values()) / devices
    few: dict[str, int] = {}
    if bits is not None:  # codes are no parameters: each device has them all
        names = [f"{layer}.weight" for layer in quantizable(module, bits, keep=algorithms)]
        few = {name: sizes[name] for name in names}
        stored += sum(few.values()) * (BITS_STORED[bits] / 8 - FLOAT32 / devices)
    if devices > 1:
        copies = _gathered(module, half=half, without=few)
    else:
        # What is made of codes for a product is dropped after it, and made again on the way back.
        tower = any(work.backward["vision"] for work in works)
        dropped = sum(size for name, size in few.items() if tower or not name.startswith("vision."))
        copies = HALF * (max(work.multiplied for work in works) - dropped) if half else 0
        copies += (HALF if half else FLOAT32) * max(few.values(), default=0)
    logits = 0
    if isinstance(module, VLM):
        taught = sum(sample.num_supervised for sample in samples)
        logits = 2 * FLOAT32 * min(CHUNK_ELEMENTS, taught * module.config.decoder.vocab_size)
    return Memory(
        weights=round(stored),
        gradients=FLOAT32 * sum(sizes[name] for name in algorithms) // devices,
        optimizer=sum(OPTIMIZER_BYTES[algorithm] * sizes[name] for name, algorithm in algorithms.items()) // devices,
        activations=round(max(work.kept for work in works)),
        activations_checkpointed=round(max(work.kept_between + work.largest_block for work in works)),
        working=copies + logits + max(work.ahead for work in works),
    )


def _gathered(module: nn.Module, *, half: bool, without: Collection[str]) -> int:
    """Bytes of whole weights on each of several devices: the block that works and the next one, and all that is no
    block (embedding, head, connector, Q-Former, FlanT5's decoder) with its gradient, which stay for the whole pass.

    without: names of weights that are codes.
    """
    inside = {module.get_parameter(name) for name in without}
    largest = 0
    for block in blocks_of(module):
        if not isinstance(block, QFormerLayer):  # as `parallel` splits them
            element = HALF if half and not isinstance(block, EncoderLayer) else FLOAT32
            largest = max(largest, element * sum(p.numel() for p in block.parameters() if p not in inside))
            inside |= set(block.parameters())
    rest = [p for p in module.parameters() if p not in inside]
    return 2 * largest + FLOAT32 * sum(p.numel() * (2 if p.requires_grad else 1) for p in rest)


def _on(machine: Machine | None, done: StageEstimate, precision: str) -> StageEstimate:
    """With what follows from the machine."""
    if machine is None:
        return done
    memory = machine.device.memory
    reached = machine.peak(precision) * machine.utilisation * min(machine.count, done.samples) / machine.count
    return replace(
        done,
        machine=machine.name,
        utilisation=machine.utilisation,
        fits=None if memory is None else done.memory.total(checkpointing=done.checkpointing) <= memory,
        seconds_per_step=done.flops / reached,
    )
