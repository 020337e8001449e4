"""From a run file to objects: the model to start from, and each stage with its data, checked before the first step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from opsin import families, weights
from opsin.data.feed import Feed
from opsin.data.source import Source, open_data
from opsin.encode import Encoded, Encoder
from opsin.errors import ConfigError, DataError, OpsinError
from opsin.spec.model import VLMConfig
from opsin.spec.recipe import PARTS, RANDOM, PartSources, RunConfig, Stage
from opsin.text.messages import Conversation
from opsin.text.tokenizer import Tokenizer
from opsin.train.trainable import Trainable, choose, idle_tensors
from opsin.weights import Model
from opsin.weights.config import describe

NO_LIMIT = 2**31
"""Longest prompt of the encoder while training: the stage's own limit decides there, which may shorten instead."""


@dataclass(frozen=True)
class PreparedStage:
    """A stage that could begin."""

    stage: Stage
    feed: Feed
    trainable: Trainable


def describe_model(name: str) -> VLMConfig:
    """What a preset (tiny ones too), folder or repository is. No weights are read, and for a preset nothing is."""
    return describe(name) if "/" in name or Path(name).exists() else families.preset(name).config


def start_model(config: RunConfig) -> Model:
    """The model to start from, in float32 on the CPU; one that will be quantised in the dtype of its files."""
    tokenizer = _tokenizer_folder(config)
    if config.init == "model":
        dtype = torch.float32 if config.quantize is None else None
        return weights.load(config.model, dtype=dtype, tokenizer=tokenizer)
    description = describe_model(config.model)
    vlm = weights.build(description, seed=config.seed)
    if isinstance(config.init, PartSources):
        for part in PARTS:
            source = getattr(config.init, part)
            if source != RANDOM:
                weights.load_part(vlm, part, source)  # type: ignore[arg-type]
    return Model(vlm=vlm, config=description, name=config.model, tokenizer_folder=tokenizer)


def stage_config(model: VLMConfig, stage: Stage) -> VLMConfig:
    """The model's description with the chat format and resolution of one stage. Raises ConfigError."""
    if stage.chat is not None:
        model = model.replace(chat=families.chat(stage.chat) if isinstance(stage.chat, str) else stage.chat)
    if stage.resolution is None:
        return model
    if stage.resolution.uses_newline and not model.uses_newline:
        raise ConfigError(
            f"resolution {stage.resolution.kind} ends rows with a newline, which this model does not have"
        )
    try:
        return model.replace(resolution=stage.resolution)
    except ValueError as error:
        raise ConfigError(f"resolution {stage.resolution.kind}: {error}") from None


def prepare_stage(
    stage: Stage,
    *,
    module: nn.Module,
    model: VLMConfig | None,
    tokenizer: Tokenizer | None,
    seed: int,
    source: Source | None = None,
) -> PreparedStage:
    """Open the data and name the tensors of one stage.

    model: description of the VLM that `module` is; None for a module of another kind, whose source encodes for itself.
    source: used instead of the stage's own `data`.
    """
    try:
        config = None if model is None else stage_config(model, stage)
        idle = {} if config is None else idle_tensors(module, config)
        trainable = choose(module, stage.trainable, idle=idle, lora=stage.lora)
        if source is None:
            if not stage.data:
                raise ConfigError("no data is named; list files under data")
            source = open_data(stage.data, seed=seed)
        limit = stage.max_tokens or (NO_LIMIT if model is None else model.decoder.max_positions)
        encode = _encoder(config, tokenizer)
        feed = Feed(source, stage, encode=encode, max_tokens=limit, seed=seed)
    except OpsinError as error:
        raise type(error)(f"stage {stage.name!r}: {error}") from None
    return PreparedStage(stage, feed, trainable)


def parameter_table(module: nn.Module, trainable: Trainable) -> list[tuple[str, int, int]]:
    """(part, parameters, of them trained) for each part of the module."""
    totals: dict[str, list[int]] = {}
    names = set(trainable.names)
    for name, parameter in module.named_parameters():
        counts = totals.setdefault(name.split(".")[0], [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if name in names else 0
    return [(part, total, trained) for part, (total, trained) in totals.items()]


def describe_trainable(module: nn.Module, trainable: Trainable) -> Sequence[str]:
    """Lines that say what trains, and what was named but cannot."""
    lines = [f"{'part':<12}{'parameters':>16}{'trained':>16}"]
    table = parameter_table(module, trainable)
    table.append(("all", sum(row[1] for row in table), sum(row[2] for row in table)))
    lines += [f"{part:<12}{total:>16,}{trained:>16,}" for part, total, trained in table]
    reasons: dict[str, list[str]] = {}
    for name, reason in trainable.idle.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"not trained, {len(names)} tensors from {names[0]}: {why}" for why, names in reasons.items()]
    return lines


def check_names(config: RunConfig, given: Mapping[str, object], what: str) -> None:
    """Refuse what is given for a stage that does not exist."""
    names = [stage.name for stage in config.stages]
    for name in given:
        if name not in names:
            raise ConfigError(f"{what} are given for stage {name!r}, but the stages are {', '.join(names)}")


def _encoder(config: VLMConfig | None, tokenizer: Tokenizer | None) -> Callable[[Conversation], Encoded]:
    if config is None or tokenizer is None:

        def refuse(conversation: Conversation) -> Encoded:
            raise DataError(
                f"{conversation.id}: no tokenizer was given to encode conversations with; give one, or samples that "
                "are Encoded already"
            )

        return refuse
    unlimited = config.replace(decoder=config.decoder.replace(max_positions=NO_LIMIT))
    return partial(Encoder(unlimited, tokenizer).encode, mode="train")


def tokenizer_name(config: RunConfig) -> str | None:
    """Where the tokenizer is, when it is not the model's own: as configured, or with the language model."""
    if config.tokenizer is None and isinstance(config.init, PartSources) and config.init.decoder != RANDOM:
        return config.init.decoder
    return config.tokenizer


def _tokenizer_folder(config: RunConfig) -> Path | None:
    name = tokenizer_name(config)
    return None if name is None else weights.resolve(name)
