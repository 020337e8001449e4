"""What a run would do, without doing it: the whole config, what trains, and what each stage takes."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from opsin.spec.machine import Machine
from opsin.spec.recipe import RunConfig
from opsin.train.config import to_yaml
from opsin.train.estimate import StageEstimate, estimate, walk
from opsin.train.log import duration
from opsin.train.prepare import describe_trainable

NO_DATA = "the data cannot be used yet"


def preview(config: RunConfig, machine: Machine | None = None) -> Iterator[str]:
    """Lines to print. Raises for what is wrong with the config; data that is not here yet is told of."""
    yield to_yaml(config).rstrip()
    for number, (stage, module, trainable) in enumerate(walk(config, machine), start=1):
        yield ""
        yield f"stage {number} of {len(config.stages)}: {stage.stage}"
        yield from describe_trainable(module, trainable)
        yield from _describe(stage)
        if machine is not None:
            yield _verdict(stage, machine, config.precision)


def preview_json(config: RunConfig, machine: Machine | None = None) -> str:
    """The same for programs: the config and the estimate of each stage."""
    stages = [{**asdict(stage), "flops": stage.flops, "seconds": stage.seconds} for stage in estimate(config, machine)]
    return json.dumps({"config": config.model_dump(mode="json"), "stages": stages}, indent=1)


def _describe(stage: StageEstimate) -> Iterator[str]:
    if stage.problem:
        yield stage.problem
    if stage.steps is None:
        yield f"{stage.samples:,} samples per step; steps are not known: the data is not here and has no `count`"
    elif stage.epoch_samples is None:
        yield f"{stage.samples:,} samples per step: {stage.steps:,} steps"
    else:
        epochs = stage.steps / -(-stage.epoch_samples // stage.samples)
        published = "by the published counts: " if stage.problem.startswith(NO_DATA) else ""
        yield (
            f"{published}{stage.epoch_samples:,} samples per epoch, {stage.samples:,} per step: {stage.steps:,} steps, "
            f"{epochs:.2f} epochs"
        )
    shares = f"{stage.image_tokens:,} of pictures, {stage.taught_tokens:,} taught"
    yield f"about {stage.tokens:,} tokens per step ({shares}), {stage.tokens_from}"
    forward, backward = sum(stage.forward.values()), sum(stage.backward.values())
    parts = ", ".join(f"{part} {_flop(flops + stage.backward[part])}" for part, flops in stage.forward.items())
    more = f", blocks again {_flop(stage.again)}" if stage.checkpointing else ""
    more += f", update {_flop(stage.update)}" if stage.update else ""
    yield f"{_flop(stage.flops)} per step: forwards {_flop(forward)}, backwards {_flop(backward)}{more} ({parts})"
    memory = stage.memory
    yield (
        f"weights, gradients and optimizer take {_gib(memory.state)} on each device, activations "
        f"{_gib(memory.activations)} ({_gib(memory.activations_checkpointed)} where blocks are computed again), "
        f"working copies {_gib(memory.working)}"
    )


def _verdict(stage: StageEstimate, machine: Machine, precision: str) -> str:
    """Whether it fits, and how long it takes."""
    fits = f"{_gib(stage.memory.total(checkpointing=stage.checkpointing))} of memory"
    if machine.device.memory is not None:
        fits = fits.replace("memory", f"{machine.device.memory / 2**30:.0f} GiB on each device")
    if stage.checkpointing:
        fits += ", blocks computed again"
    if stage.fits is False:
        fits += f", which does NOT fit: {_help(stage, machine.device.memory or 0)}"
    assert stage.seconds_per_step is not None
    total = "" if stage.seconds is None else f", {readable(stage.seconds)} in all"
    return (
        f"on {machine.name}: {fits}; {stage.seconds_per_step:.3g} s per step{total}, at {machine.utilisation:.0%} of "
        f"{_flop(machine.peak(precision))}/s [{machine.device.source}; the share is ours]"
    )


def _help(stage: StageEstimate, memory: int) -> str:
    """What to do about a device that is too small."""
    recomputed = stage.memory.total(checkpointing=True)
    if not stage.checkpointing and recomputed <= memory:
        return f"set activations=recompute ({_gib(recomputed)})"
    return f"take more devices, or {'train less' if stage.memory.state > memory else 'lower batch.micro_tokens'}"


def readable(seconds: float) -> str:
    """1:02:03, 7.0 hours or 3.2 days."""
    if seconds < 2 * 3600:
        return duration(seconds)
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _flop(number: float) -> str:
    """Three digits: 4.85 PFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}FLOP"
        number /= 1000
    return f"{number:.3g} EFLOP"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
