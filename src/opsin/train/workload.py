"""The samples that a stage would train on, as far as costs go: taken from the data, or assumed where it is not here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from opsin.data.feed import Feed
from opsin.errors import OpsinError, PlanError
from opsin.spec.model import VLMConfig
from opsin.spec.plan import Size
from opsin.spec.qformer import RetrieverConfig
from opsin.spec.recipe import RunConfig, Stage
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.text.tokenizer import Tokenizer, load_tokenizer
from opsin.train.flops import SampleShape
from opsin.train.prepare import Described, prepare_stage, published_samples, stage_config, tokenizer_name

SQUARES = (448, 224, 112, 56)
"""Sides of smaller pictures, in pixels."""
TRIED_SAMPLES = 16
"""Samples that are encoded to estimate how long all are."""


@dataclass(frozen=True)
class Typical:
    """A sample to reckon with where the data is not here."""

    text_tokens: int
    """Of a whole conversation, its format included."""
    taught_tokens: int
    """Of these."""
    picture: Size | None = (640, 480)
    """(width, height) in pixels; None: text alone. 640x480 is COCO's most frequent size."""

    def __str__(self) -> str:
        shown = "no picture" if self.picture is None else f"a picture of {self.picture[0]}x{self.picture[1]} px"
        return f"{shown} and {self.text_tokens} tokens of text, {self.taught_tokens} of them taught"


CONVERSATION = Typical(text_tokens=350, taught_tokens=200)
"""[ours] llava_v1_5_mix665k.json holds about 1.5 kB of JSON per conversation: 350 tokens at four letters each."""
CAPTION = Typical(text_tokens=20, taught_tokens=18)
"""[ours] A sentence of a dozen words, as LAION and CC3M hold them: where the language model is frozen, stages of all
families learn from these."""


@dataclass(frozen=True)
class Workload:
    """Samples that stand for all of a stage's."""

    samples: tuple[SampleShape, ...]
    per_epoch: int | None
    """Samples of an epoch, where they are known."""
    origin: str
    """Where the numbers come from."""
    num_steps: int | None
    problem: str = ""
    """Why the data was not used."""


def find_workload(
    config: RunConfig,
    stage: Stage,
    *,
    module: nn.Module,
    model: Described,
    trained: Sequence[str],
    tokenizer: Tokenizer | None,
    missing: str,
    typical: Typical | None = None,
) -> Workload:
    """Measured on the data where it and the tokenizer are here, unless `typical` says what to assume instead.

    trained: names of the tensors that train. missing: why there is no tokenizer.
    """
    per_epoch, feed, problem = published_samples(stage), None, ""
    try:
        feed = prepare_stage(stage, module=module, model=model, tokenizer=tokenizer, seed=config.seed).feed
        per_epoch = len(feed.source)
        if tokenizer is not None and typical is None:
            return _measured(feed)
        problem = missing
    except OpsinError as error:
        problem = f"the data cannot be used yet: {error}"
    typical = typical or (CONVERSATION if any(name.startswith("decoder.") for name in trained) else CAPTION)
    typical, shape = _fitting(stage, model, typical)
    count = "" if feed is not None or per_epoch is None else "the published number of samples, each with "
    return Workload(
        samples=(shape,),
        per_epoch=per_epoch,
        origin=f"assumed: {count}{typical}",
        num_steps=_num_steps(stage, per_epoch),
        problem=problem,
    )


def local_tokenizer(config: RunConfig) -> tuple[Tokenizer | None, str]:
    """The tokenizer, where it is a folder; else why tokens cannot be counted. Nothing is downloaded for a preview."""
    name = tokenizer_name(config) or config.model
    if not Path(name).is_dir():
        return None, f"tokens are not counted: the tokenizer of {name} is not a folder here"
    try:
        return load_tokenizer(Path(name)), ""
    except OpsinError as error:
        return None, f"tokens are not counted: {error}"


def _measured(feed: Feed) -> Workload:
    count = min(TRIED_SAMPLES, len(feed.source))
    places = [number * len(feed.source) // count for number in range(count)]
    tried = tuple(SampleShape.of(feed.load_or_replace(0, place, 0).sample) for place in places)
    return Workload(tried, len(feed.source), f"estimated from {count} samples", feed.num_steps)


def _num_steps(stage: Stage, per_epoch: int | None) -> int | None:
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return None if per_epoch is None else max(1, round(stage.epochs * -(-per_epoch // stage.batch.samples)))


def _fitting(stage: Stage, model: Described, typical: Typical) -> tuple[Typical, SampleShape]:
    """The sample, with a smaller picture where the stage's limit leaves no room for text, and its shape. Raises
    PlanError."""
    try:
        return typical, _shape(stage, model, typical)
    except PlanError:
        smaller = next((side for side in SQUARES if typical.picture and side < min(typical.picture)), None)
        if smaller is None:
            raise
        return _fitting(stage, model, replace(typical, picture=(smaller, smaller)))


def _shape(stage: Stage, model: Described, typical: Typical) -> SampleShape:
    """The sample as a stage of this model would see it, cut at its limit. Raises PlanError."""
    if isinstance(model, RetrieverConfig):
        used = model if stage.resolution is None else model.replace(resolution=stage.resolution)
        plan = None if typical.picture is None else used.plan(typical.picture)
        slots, most = 0, stage.max_tokens or model.max_tokens  # queries are rows, not tokens
    else:
        plan = None if typical.picture is None else stage_config(model, stage).plan(typical.picture)
        slots, most = plan.num_slots if plan else 0, stage.max_tokens or model.decoder.max_positions
    if slots >= most:
        raise PlanError(f"stage {stage.name!r}: {typical.picture} px take {slots} tokens, and max_tokens is {most}")
    text = min(typical.text_tokens, most - slots)
    taught = text // 2 if stage.captions == "split" else min(typical.taught_tokens, text)
    reads = isinstance(model, VLMConfig) and isinstance(model.decoder, Seq2SeqConfig)
    return SampleShape(
        num_tokens=slots + text,
        num_image_tokens=slots,
        num_supervised=taught,
        grids=tuple(tile.grid for tile in plan.tiles) if plan else (),
        encoder_length=slots + text - taught if reads else 0,
    )
