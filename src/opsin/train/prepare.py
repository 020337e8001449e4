"""From a run file to objects: the model to start from, and each stage with its data, checked before the first step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsin import families, weights
from opsin.data.captions import SplitCaptions
from opsin.data.feed import Feed
from opsin.data.source import Source, open_data
from opsin.encode import Encoded, Encoder
from opsin.errors import ConfigError, DataError, OpsinError
from opsin.match import PairEncoder
from opsin.nn.retriever import Retriever
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.spec.qformer import RetrieverConfig
from opsin.spec.recipe import PARTS, RANDOM, PartSources, RunConfig, Stage
from opsin.spec.resolution import Squash
from opsin.spec.rules import Layout
from opsin.text.messages import Conversation
from opsin.text.tokenizer import Tokenizer
from opsin.train.objectives import Objective, next_token
from opsin.train.stage1 import begin_stage2, caption_pair, check_pairs, pictures_by_name, stage1
from opsin.train.trainable import Trainable, choose, idle_tensors
from opsin.weights import Model, RetrievalModel
from opsin.weights.config import describe, read_json
from opsin.weights.init import on_meta as meta_vlm
from opsin.weights.retrieval import describe_retriever, load_retriever_part
from opsin.weights.retrieval import on_meta as meta_retriever
from opsin.weights.rules import Renamer
from opsin.weights.shipped import is_here

NO_LIMIT = 2**31
"""Longest prompt of the encoder while training: the stage's own limit decides there, which may shorten instead."""


@dataclass(frozen=True)
class PreparedStage:
    """A stage that could begin."""

    stage: Stage
    feed: Feed
    trainable: Trainable
    objective: Objective
    """What it minimises, unless the caller has something else."""


Described = VLMConfig | RetrieverConfig
"""What a run may train: a model that answers, or one that compares pictures with texts."""


def describe_run(config: RunConfig) -> Described:
    """What a run's model is. No weights are read, and for a preset nothing is."""
    return describe_retriever(config.model) if config.compares else describe_model(config.model)


def on_meta(model: Described) -> VLM | Retriever:
    """The model without storage."""
    return meta_retriever(model) if isinstance(model, RetrieverConfig) else meta_vlm(model)


def stage_trainable(module: nn.Module, model: Described | None, stage: Stage) -> Trainable:
    """What a stage trains of a module."""
    idle: dict[str, str] = {}
    if isinstance(model, VLMConfig):
        idle = _constants(module, families.family_of(model).layouts(model))
        idle |= idle_tensors(module, stage_config(model, stage))
    elif model is not None:
        retrieval = next(each.retrieval for each in families.FAMILIES if each.retrieval is not None)
        idle = _constants(module, retrieval.layouts(model))
    return choose(module, stage.trainable, idle=idle, lora=stage.lora)


def _constants(module: nn.Module, layouts: Sequence[Layout]) -> dict[str, str]:
    """Tensors that the authors' own layout does not store, because they never change, with the reason."""
    renamers = [Renamer(layout) for layout in layouts[:1]]
    fills = [(name, renamer.fills(name)) for renamer in renamers for name, _ in module.named_parameters()]
    return {name: fill.reason for name, fill in fills if fill is not None}


def published_samples(stage: Stage) -> int | None:
    """Samples of an epoch by the published counts; None where one of the files has none."""
    counts = [file.count if file.limit is None else min(file.limit, file.count or file.limit) for file in stage.data]
    if not counts or any(count is None for count in counts):
        return None
    return sum(round(file.repeat * (count or 0)) for file, count in zip(stage.data, counts, strict=True))


def describe_model(name: str) -> VLMConfig:
    """What a preset (tiny ones too), folder, repository or the shipped model is. No weights are read."""
    return describe(name) if "/" in name or is_here(name) else families.preset(name).config


def start_model(config: RunConfig) -> Model | RetrievalModel:
    """The model to start from, in float32 on the CPU; one that will be quantised in the dtype of its files."""
    tokenizer = _tokenizer_folder(config)
    if isinstance(config.init, PartSources):
        foreign = ("connector", "newline", "decoder") if config.compares else ("qformer",)
        for part in foreign:
            if getattr(config.init, part) != RANDOM:
                raise ConfigError(f"init.{part}: this run's model has no such part")
    if config.compares:
        return _start_retriever(config, tokenizer)
    if config.init == "model":
        dtype = torch.float32 if config.quantize is None else None
        return weights.load(config.model, dtype=dtype, tokenizer=tokenizer)
    description = describe_model(config.model)
    vlm = weights.build(description, seed=config.seed)
    if isinstance(config.init, PartSources):
        for part in PARTS:
            source = getattr(config.init, part)
            if source == RANDOM:
                continue
            if part == "connector" and _compares(source):
                begin_stage2(vlm, weights.load_retriever(source, dtype=torch.float32).retriever)
            else:
                weights.load_part(vlm, part, source)  # type: ignore[arg-type]
    return Model(vlm=vlm, config=description, name=config.model, tokenizer_folder=tokenizer)


def _start_retriever(config: RunConfig, tokenizer: Path | None) -> RetrievalModel:
    if config.init == "model":
        return weights.load_retriever(config.model, dtype=torch.float32, tokenizer=tokenizer)
    description = describe_retriever(config.model)
    retriever = weights.build_retriever(description, seed=config.seed)
    if isinstance(config.init, PartSources):
        for part in ("vision", "qformer"):
            if (source := getattr(config.init, part)) != RANDOM:
                load_retriever_part(retriever, part, source)
    return RetrievalModel(retriever, description, config.model, tokenizer_folder=tokenizer)


def _compares(source: str) -> bool:
    """Whether a folder or repository holds a model that compares: stage 1's, whose Q-Former stage 2 goes on with."""
    folder = weights.resolve(source)
    hub = read_json(folder / "config.json") if folder.is_dir() else None
    return hub is not None and any(each.retrieval and each.retrieval.matches(hub) for each in families.FAMILIES)


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
    model: Described | None,
    tokenizer: Tokenizer | None,
    seed: int,
    source: Source | None = None,
) -> PreparedStage:
    """Open the data and name the tensors of one stage.

    model: description of the model that `module` is; None for a module of another kind, whose source encodes for
    itself.
    source: used instead of the stage's own `data`.
    """
    try:
        trainable = stage_trainable(module, model, stage)
        if source is None:
            if not stage.data:
                raise ConfigError("no data is named; list files under data")
            keep = stage.bad_samples.policy == "skip"
            source = open_data(stage.data, seed=seed, on_bad="keep" if keep else "raise")
        if stage.captions == "split":
            source = SplitCaptions(source, seed=seed)
        objective: Objective = next_token
        smaller: list[Callable[[Conversation], Encoded]] = []
        if isinstance(model, RetrieverConfig):
            pairs = _pair_encoder(model, stage, tokenizer)
            objective, limit = stage1(pairs.caption_id, image_ids=pictures_by_name), pairs.config.max_tokens
            encode: Callable[[Conversation], Encoded] = partial(caption_pair, encoder=pairs)
            check_pairs(len(source), stage.batch)
        else:
            config = None if model is None else stage_config(model, stage)
            limit = stage.max_tokens or (NO_LIMIT if model is None else model.decoder.max_positions)
            encode = _encoder(config, tokenizer)
            if stage.overlong == "shrink_picture":
                smaller = smaller_pictures(config, tokenizer)
        feed = Feed(source, stage, encode=encode, max_tokens=limit, seed=seed, smaller=smaller)
    except OpsinError as error:
        raise error.within(f"stage {stage.name!r}") from None
    return PreparedStage(stage, feed, trainable, objective)


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


def check_kind(config: RunConfig, model: Model | RetrievalModel) -> None:
    """Refuse a model of another kind than the run's objectives train."""
    if config.compares != isinstance(model, RetrievalModel):
        kind = "compares pictures with texts" if config.compares else "answers"
        raise ConfigError(f"objective {config.stages[0].objective} trains a model that {kind}; {model.name} does not")


def check_names(config: RunConfig, given: Mapping[str, object], what: str) -> None:
    """Refuse what is given for a stage that does not exist."""
    names = [stage.name for stage in config.stages]
    for name in given:
        if name not in names:
            raise ConfigError(f"{what} are given for stage {name!r}, but the stages are {', '.join(names)}")


def training_encoder(config: VLMConfig, tokenizer: Tokenizer) -> Encoder:
    """The encoder of a stage, which leaves long conversations to the stage's own limit."""
    return Encoder(config.replace(decoder=config.decoder.replace(max_positions=NO_LIMIT)), tokenizer)


def _encoder(config: VLMConfig | None, tokenizer: Tokenizer | None) -> Callable[[Conversation], Encoded]:
    if config is None or tokenizer is None:

        def refuse(conversation: Conversation) -> Encoded:
            raise DataError(
                f"{conversation.id}: no tokenizer was given to encode conversations with; give one, or samples that "
                "are Encoded already"
            )

        return refuse
    return partial(training_encoder(config, tokenizer).encode, mode="train")


def smaller_pictures(config: VLMConfig | None, tokenizer: Tokenizer | None) -> list[Callable[[Conversation], Encoded]]:
    """Ways to encode with ever smaller pictures. Raises ConfigError where all pictures take as many tokens."""
    if config is None:
        raise ConfigError("overlong: shrink_picture needs a model that reads pictures; choose another rule")
    rules = config.resolution.smaller()
    if not rules:
        raise ConfigError(
            f"overlong: shrink_picture does not help: with resolution {config.resolution.kind} every picture takes the "
            "same number of tokens. Choose drop, truncate, trim_turns or trim_oldest_turns"
        )
    return [_encoder(config.replace(resolution=rule), tokenizer) for rule in rules]


def _pair_encoder(model: RetrieverConfig, stage: Stage, tokenizer: Tokenizer | None) -> PairEncoder:
    """What makes pairs of a stage's conversations: texts are cut where the stage says, pictures drawn as it says."""
    if not stage.compares:
        raise ConfigError("a model that compares learns by objective: itc_itm_itg")
    if tokenizer is None:
        raise DataError("no tokenizer was given to read captions with")
    if model.heads != "all":
        raise ConfigError("this model has kept no head for captions, which itc_itm_itg trains; start from one of LAVIS")
    changes: dict[str, Any] = {}
    if stage.resolution is not None:
        if not isinstance(stage.resolution, Squash):
            raise ConfigError(f"resolution {stage.resolution.kind}: a model that compares reads squashed pictures only")
        changes["resolution"] = stage.resolution
    if stage.max_tokens is not None:
        changes["max_tokens"] = stage.max_tokens
    try:
        return PairEncoder(model.replace(**changes), tokenizer)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def tokenizer_name(config: RunConfig) -> str | None:
    """Where the tokenizer is, when it is not the model's own: as configured, or with the language model."""
    if config.tokenizer is None and isinstance(config.init, PartSources) and config.init.decoder != RANDOM:
        return config.init.decoder
    return config.tokenizer


def _tokenizer_folder(config: RunConfig) -> Path | None:
    name = tokenizer_name(config)
    return None if name is None else weights.resolve(name)
