"""What `opsin data` works on: the files of a run's stages, or files by their names, and what a model asks of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opsin import families
from opsin.cli._options import tokenizer_of
from opsin.data.check import Rules
from opsin.encode import Encoder
from opsin.errors import ConfigError
from opsin.spec.model import VLMConfig
from opsin.spec.recipe import DataFile, RunConfig, Stage
from opsin.text.tokenizer import Tokenizer, load_tokenizer
from opsin.train.config import read_run, recipe_names
from opsin.train.prepare import describe_model, smaller_pictures, stage_config, tokenizer_name, training_encoder
from opsin.weights.shipped import is_here


@dataclass(frozen=True)
class Dataset:
    """Files that are read with the same rules."""

    name: str
    """Of the stage; empty for files by their names."""
    files: tuple[DataFile, ...]
    rules: Rules
    note: str = ""
    """What cannot be looked at, and why."""
    held_out: tuple[DataFile, ...] = ()
    """What must not be among them."""


@dataclass(frozen=True)
class ModelOptions:
    """What the command line says about the model."""

    model: str | None = None
    tokenizer: str | None = None
    image_root: str | None = None
    max_tokens: int | None = None
    decode: bool = False


def find_datasets(paths: Sequence[str], options: ModelOptions) -> list[Dataset]:
    """The stages of a run file, or one set of the files that are named. Raises ConfigError."""
    runs = [path for path in paths if Path(path).suffix in (".yaml", ".yml") or path in recipe_names()]
    if not runs:
        files = tuple(DataFile(path=path, image_root=options.image_root) for path in paths)
        if options.model is None:
            note = "what depends on a model (length, order of speakers, what is taught) is not looked at: give --model"
            return [Dataset("", files, Rules(decode=options.decode), note)]
        config = _model(options.model)
        return [_dataset("", files, config, _tokenizer(options, options.model), None, options)]
    if len(paths) > 1:
        raise ConfigError("a run file stands alone: it names its data itself")
    run = read_run(runs[0])
    found = [each for stage in run.stages for each in _of_stage(run, stage, options)]
    if not found:
        raise ConfigError(f"{runs[0]}: no stage names data")
    return found


def _of_stage(run: RunConfig, stage: Stage, options: ModelOptions) -> Iterator[Dataset]:
    """The data that a stage trains on, and what it is judged on, which must not be among it."""

    def with_root(files: Sequence[DataFile]) -> tuple[DataFile, ...]:
        return tuple(file.replace(image_root=file.image_root or options.image_root) for file in files)

    judged_on = with_root(stage.evaluate.data) if stage.evaluate else ()
    sets = ((stage.name, with_root(stage.data), judged_on), (f"{stage.name} evaluation", judged_on, ()))
    for name, files, held_out in sets:
        if not files:
            continue
        if run.compares:
            note = "this model compares pictures with texts: tokens are not counted"
            yield Dataset(name, files, Rules(decode=options.decode), note, held_out)
            continue
        model = options.model or run.model
        config = stage_config(_model(model), stage)
        dataset = _dataset(name, files, config, _tokenizer(options, model, run), stage, options)
        yield replace(dataset, held_out=held_out)


def encoder_of(dataset: Dataset) -> Encoder:
    """Its encoder. Raises ConfigError where model or tokenizer are not known."""
    if dataset.rules.encoder is None:
        raise ConfigError(f"{dataset.note}; give --model and --tokenizer")
    return dataset.rules.encoder


def _dataset(
    name: str,
    files: tuple[DataFile, ...],
    config: VLMConfig,
    tokenizer: Tokenizer | None,
    stage: Stage | None,
    options: ModelOptions,
) -> Dataset:
    if tokenizer is None:
        note = "tokens are not counted: no tokenizer is at hand; give its folder with --tokenizer"
        return Dataset(name, files, Rules(decode=options.decode), note)
    overlong = stage.overlong if stage else "error"
    limit = options.max_tokens or (stage.max_tokens if stage else None) or config.decoder.max_positions
    rules = Rules(
        encoder=training_encoder(config, tokenizer),
        max_tokens=limit,
        overlong=overlong,
        smaller=smaller_pictures(config, tokenizer) if overlong == "shrink_picture" else (),
        decode=options.decode,
    )
    return Dataset(name, files, rules)


def _model(name: str) -> VLMConfig:
    preset = None if is_here(name) else families.preset_of_hub(name)
    return preset.config if preset is not None else describe_model(name)


def _tokenizer(options: ModelOptions, model: str, run: RunConfig | None = None) -> Tokenizer | None:
    """From the folder that is named, or the model's own; nothing is downloaded."""
    if options.tokenizer is not None:
        return load_tokenizer(Path(options.tokenizer))
    return tokenizer_of((tokenizer_name(run) if run else None) or model)
