"""What a run would do, without doing it: the whole config, what trains, how many steps and tokens, how much memory."""

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from opsin.data.feed import Feed
from opsin.errors import OpsinError
from opsin.nn.lora import attach, detach
from opsin.nn.quantize import quantize
from opsin.spec.model import VLMConfig
from opsin.spec.recipe import RunConfig, Stage
from opsin.text.tokenizer import Tokenizer, load_tokenizer
from opsin.train.config import to_yaml
from opsin.train.optim import make_groups
from opsin.train.prepare import describe_model, describe_trainable, prepare_stage, stage_config, tokenizer_name
from opsin.train.trainable import Trainable, choose, idle_tensors
from opsin.weights.init import on_meta

TRIED_SAMPLES = 16
"""Samples that are encoded to estimate how long all are."""
BYTES_TRAINED = {"adamw": 16, "muon": 12}
"""Bytes of a trained number: itself, its gradient, and one or two averages, all in float32."""
BYTES_FROZEN = 4


def preview(config: RunConfig) -> Iterator[str]:
    """Lines to print. Raises for what is wrong with the config; data that is not here yet is told of."""
    yield to_yaml(config).rstrip()
    model = describe_model(config.model)
    module = on_meta(model)
    tokenizer, missing = _local_tokenizer(config)
    for number, stage in enumerate(config.stages, start=1):
        yield ""
        yield f"stage {number} of {len(config.stages)}: {stage.name}"
        idle = idle_tensors(module, stage_config(model, stage))
        trainable = choose(module, stage.trainable, idle=idle, lora=stage.lora)
        if stage.lora is not None:
            if config.quantize is not None:
                quantize(module, config.quantize, keep=trainable.names)
            attach(module, stage.lora, trainable.targets)
        yield from describe_trainable(module, trainable)
        yield f"weights, gradients and optimizer take {_state_bytes(module, stage, trainable) / 2**30:,.2f} GiB"
        detach(module)
        yield from _describe_data(stage, module, model, tokenizer, missing, config.seed)


def _describe_data(
    stage: Stage, module: nn.Module, model: VLMConfig, tokenizer: Tokenizer | None, missing: str, seed: int
) -> Iterator[str]:
    try:
        feed = prepare_stage(stage, module=module, model=model, tokenizer=tokenizer, seed=seed).feed
        yield (
            f"{len(feed.source):,} samples per epoch, {stage.batch.samples} per step: {feed.num_steps:,} steps, "
            f"{feed.num_steps / feed.steps_per_epoch:.2f} epochs"
        )
        yield missing if tokenizer is None else _estimate(feed)
    except OpsinError as error:
        yield f"the data cannot be used yet: {error}"


def _estimate(feed: Feed) -> str:
    """Tokens of a step, from samples spread over the data."""
    count = min(TRIED_SAMPLES, len(feed.source))
    tried = [feed.load(number * len(feed.source) // count, 0) for number in range(count)]
    per_step = min(feed.stage.batch.samples, len(feed.source)) / count
    tokens = sum(sample.num_tokens for sample in tried) * per_step
    images = sum(sample.num_image_tokens for sample in tried) * per_step
    taught = sum(sample.num_supervised for sample in tried) * per_step
    shares = f"{images:,.0f} of pictures, {taught:,.0f} taught"
    return f"about {tokens:,.0f} tokens per step ({shares}), estimated from {count} samples"


def _state_bytes(module: nn.Module, stage: Stage, trainable: Trainable) -> int:
    parameters = dict(module.named_parameters())
    trained = {name: parameters[name] for name in trainable.names}
    total = BYTES_FROZEN * sum(p.numel() for name, p in parameters.items() if name not in trained)
    total += sum(buffer.nbytes for buffer in module.buffers())
    for group in make_groups(trained, stage.optim):
        total += BYTES_TRAINED[group.algorithm] * sum(trained[name].numel() for name in group.names)
    return total


def _local_tokenizer(config: RunConfig) -> tuple[Tokenizer | None, str]:
    """The tokenizer, where it is a folder; else why tokens cannot be counted. Nothing is downloaded for a preview."""
    name = tokenizer_name(config) or config.model
    if not Path(name).is_dir():
        return None, f"tokens are not counted: the tokenizer of {name} is not a folder here"
    try:
        return load_tokenizer(Path(name)), ""
    except OpsinError as error:
        return None, f"tokens are not counted: {error}"
