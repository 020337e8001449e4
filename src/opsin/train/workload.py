"""The samples that a stage would train on, as far as costs go: taken from the data, or assumed where it is not here."""

from collections.abc import Sequence
from dataclasses import dataclass
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
from opsin.train.prepare import prepare_stage, published_samples, stage_config, tokenizer_name

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
    model: VLMConfig | RetrieverConfig,
    trained: Sequence[str],
    tokenizer: Tokenizer | None,
    missing: str,
    typical: Typical | None = None,
) -> Workload:
    """Measured on the data where it and the tokenizer are here, unless `typical` says what to assume instead.

    trained: names of the tensors that train. missing: why there is no tokenizer.
    """
    per_epoch, feed, problem = published_samples(stage), None, ""
    if isinstance(model, VLMConfig):
        try:
            feed = prepare_stage(stage, module=module, model=model, tokenizer=tokenizer, seed=config.seed).feed
            per_epoch = len(feed.source)
            if tokenizer is not None and typical is None:
                return _measured(feed)
            problem = missing
        except OpsinError as error:
            problem = f"the data cannot be used yet: {error}"
    typical = typical or (CONVERSATION if any(name.startswith("decoder.") for name in trained) else CAPTION)
    count = "" if feed is not None or per_epoch is None else "the published number of samples, each with "
    return Workload(
        samples=(_shape(stage, model, typical),),
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
    tried = [SampleShape.of(feed.load(number * len(feed.source) // count, 0)) for number in range(count)]
    return Workload(tuple(tried), len(feed.source), f"estimated from {count} samples", feed.num_steps)


def _num_steps(stage: Stage, per_epoch: int | None) -> int | None:
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return None if per_epoch is None else max(1, round(stage.epochs * -(-per_epoch // stage.batch.samples)))


def _shape(stage: Stage, model: VLMConfig | RetrieverConfig, typical: Typical) -> SampleShape:
    """The sample as a stage of this model would see it, cut at its limit. Raises PlanError."""
    if isinstance(model, RetrieverConfig):
        plan = None if typical.picture is None else model.plan(typical.picture)
        slots, most = 0, model.max_tokens  # queries are rows, not tokens
    else:
        plan = None if typical.picture is None else stage_config(model, stage).plan(typical.picture)
        slots, most = plan.num_slots if plan else 0, stage.max_tokens or model.decoder.max_positions
    if slots >= most:
        raise PlanError(f"stage {stage.name!r}: a picture takes {slots} tokens, more than max_tokens {most}")
    text = min(typical.text_tokens, most - slots)
    taught = min(typical.taught_tokens, text)
    reads = isinstance(model, VLMConfig) and isinstance(model.decoder, Seq2SeqConfig)
    return SampleShape(
        num_tokens=slots + text,
        num_image_tokens=slots,
        num_supervised=taught,
        grids=tuple(tile.grid for tile in plan.tiles) if plan else (),
        encoder_length=slots + text - taught if reads else 0,
    )
