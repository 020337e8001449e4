"""Both climbs, and their comparison."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from opsin import weights
from opsin.errors import ConfigError
from opsin.families import MIX, family
from opsin.media.image import ImageSource, open_image
from opsin.text.tokenizer import load_tokenizer
from opsin.verify import ours, theirs
from opsin.verify.rungs import Ladder, compare
from opsin.weights import Model
from opsin.weights.exporter import with_image_token

SHARPEN = 4.0
"""Random matrices are multiplied by it: as drawn, attention is nearly even, and a wrong rotation would hardly show."""


@dataclass(frozen=True)
class Question:
    """What both are asked, and how precisely they compute."""

    image: ImageSource | None = None
    """None is a drawn one."""
    prompt: str | None = None
    """Where there is a tokenizer; None is a fixed question."""
    dtype: str = "float32"
    max_new_tokens: int = 16


def verify(
    name: str | Path,
    question: Question = Question(),
    *,
    against: Path | None = None,
    tokenizer: Path | None = None,
) -> Ladder:
    """Compare a model here with the same model in transformers.

    against: folder that transformers reads; by default the model's own, or an export where it is in another layout.
    Raises ConfigError where the two cannot be compared, and what loading raises.
    """
    theirs.load_transformers()  # before anything large is loaded
    model = weights.load(name, dtype=question.dtype, tokenizer=tokenizer)
    if model.family is MIX and against is None:
        raise ConfigError(
            f"transformers cannot hold {model.name}, so there is nothing to compare it with: it is a mix of parts "
            f"(connector {model.config.connector.kind}, resolution {model.config.resolution.kind}) that no published "
            "family has. `opsin verify --tiny FAMILY` compares the parts as a family puts them together, "
            "`opsin verify --case FOLDER` with recorded outputs"
        )
    own = weights.resolve(name) if model.layout.startswith("hf") else None
    if reference := against or own:
        return _compare(model, reference, question)
    with TemporaryDirectory() as folder:
        written = write_for_transformers(model, Path(folder) / "hf")
        note = f"{model.name} is in layout {model.layout!r}; compared by way of an export to the layout of transformers"
        return _compare(written, Path(folder) / "hf", question, notes=(note,))


def verify_tiny(
    name: str,
    question: Question = Question(),
    *,
    tokenizer: Path | None = None,
) -> Ladder:
    """Compare a family's tiny preset with random weights. Raises UnknownNameError, or ConfigError as `verify` does."""
    preset = family(name).tiny
    theirs.load_transformers()
    with TemporaryDirectory() as folder:
        own = write_tiny(name, Path(folder) / "hf", num_ids=load_tokenizer(tokenizer).vocab_size if tokenizer else 0)
        loaded = weights.load(own, dtype=question.dtype, tokenizer=tokenizer)
        loaded.name = preset.id
        return _compare(loaded, own, question)


def write_tiny(name: str, folder: Path, *, num_ids: int = 0) -> Path:
    """A family's tiny preset with sharp random weights, in the layout of transformers. Returns the folder.

    num_ids: ids of the tokenizer; where they are more than the preset has, marks of pictures go behind them.
    """
    preset = family(name).tiny
    config = preset.config
    if num_ids + 2 > config.decoder.vocab_size:
        marks: dict[str, Any] = {"image_token_id": num_ids + 1}
        if config.video_token_id is not None:
            marks["video_token_id"] = num_ids
        config = config.replace(decoder=config.decoder.replace(vocab_size=num_ids + 2), **marks)
    vlm = weights.build(config, seed=1)
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SHARPEN)
    write_for_transformers(Model(vlm, config, preset.id), folder)
    return folder


def write_for_transformers(model: Model, folder: Path) -> Model:
    """Write a model so that transformers reads it. Returns what it is to be compared with, which may have one id more.

    Raises ConfigError for a model that transformers has not.
    """
    if model.config.image_token_id is None:
        model = with_image_token(model)
    try:
        weights.export(folder, model, layout="hf")
    except ConfigError as error:
        raise ConfigError(
            f"transformers cannot hold {model.name}, so there is nothing to compare it with ({error}). Recorded "
            "outputs of its authors' code can verify it: opsin verify --case FOLDER"
        ) from None
    return model


def _compare(model: Model, folder: Path, question: Question, *, notes: tuple[str, ...] = ()) -> Ladder:
    name, dtype = theirs.class_name(folder), question.dtype
    source = ours.drawn_picture() if question.image is None else question.image
    sample = ours.encode(model.config, model.tokenizer if model.has_tokenizer else None, source, question.prompt)
    here = ours.climb(model.vlm, sample, max_new_tokens=question.max_new_tokens)
    there = theirs.climb(
        folder,
        sample,
        open_image(source, mode="reference").pixels,
        model.config.vision,
        dtype=next(model.vlm.parameters()).dtype,
        device="cpu",
        max_new_tokens=question.max_new_tokens,
        tokenizer=model.tokenizer_folder if model.has_tokenizer else None,
    )
    return Ladder(model.name, f"transformers' {name}", dtype, tuple(compare(here, there, dtype=dtype)), notes)
