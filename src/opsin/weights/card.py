"""The model card of an export: README.md with the keys of the hub, what the model is, how it was trained and is used.

Everything stands in files already: the model's config, a run's `run.yaml` and `log.jsonl`. Folders of a run are named
by their last part only, so that a published card shows nobody's disk.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from opsin.errors import WeightError
from opsin.spec.connector import LinearConnector
from opsin.spec.recipe import BEST, RANDOM, PartSources, RunConfig, Stage
from opsin.weights.config import ADAPTER, NATIVE, read_yaml
from opsin.weights.hub import REPOSITORY
from opsin.weights.loader import Model
from opsin.weights.shipped import folder_of

SMOOTH = 20
"""Steps that the first and the last loss of a card are means of."""


@dataclass(frozen=True)
class Trained:
    """The run that a model came from."""

    config: RunConfig
    folder: Path
    stages: tuple[Stage, ...]
    """Those that the model went through."""


def find_model(name: str) -> tuple[str, Trained | None]:
    """What to load for a run's folder, a stage's folder or any model; and the run, where it is one's.

    Raises WeightError for a run that has not finished.
    """
    folder = folder_of(name)
    if (folder / "run.yaml").is_file() and not (folder / NATIVE).is_file():
        config = _read_run(folder)
        last = config.stages[-1].name
        done = [stage.name for stage in config.stages if _is_done(folder / stage.name)]
        if (folder / last / "config.json").is_file():
            raise WeightError(
                f"{folder / last} compares pictures with texts (BLIP-2, stage 1) and is in a published layout already"
            )
        if last not in done:
            raise WeightError(
                f"{folder} holds a run whose last stage, {last!r}, has not finished. Go on with it, or name the folder "
                f"of a stage that is done ({', '.join(str(folder / stage) for stage in done) or 'none is'})"
            )
        return str(folder / last), Trained(config, folder, config.stages)
    if (folder / "training" / "run.yaml").is_file():  # the demo
        config = _read_run(folder / "training")
        return name, Trained(config, folder / "training", config.stages)
    stage = folder.resolve()
    run = stage.parents[1] if stage.parent.name == BEST else stage.parent  # the best evaluation's, or the last
    if _is_done(folder) and (run / "run.yaml").is_file():
        config = _read_run(run)
        names = [each.name for each in config.stages]
        if stage.name in names:
            return name, Trained(config, run, config.stages[: names.index(stage.name) + 1])
    return name, None


def _is_done(stage: Path) -> bool:
    """Whether the folder of a stage holds its model, or its adapter."""
    return (stage / NATIVE).is_file() or (stage / ADAPTER).is_file()


def _read_run(folder: Path) -> RunConfig:
    path = folder / "run.yaml"
    return RunConfig.parse(read_yaml(path, "a run file"), where=str(path))


def write_card(model: Model, title: str, layout: str, trained: Trained | None) -> str:
    """Markdown. title: the name of the export."""
    base = [name for name in _sources(trained) if REPOSITORY.fullmatch(name)]
    library = "opsin" if layout == "original" else "transformers"
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": "image-text-to-text", "tags": ["opsin"]}
    if base:
        head["base_model"] = base
    size = sum(parameter.numel() for parameter in model.vlm.parameters())
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}",
        f"{model.family.title} ({model.family.paper}), {size:,} parameters, written by opsin {version('opsin')} in "
        f"layout `{layout}`.",
        "\n\n".join(_training(trained)) if trained else "How it was trained is not known to the program that wrote it.",
        "## Use\n\n"
        + _use(
            title,
            layout,
            has_tokenizer=model.has_tokenizer,
            one_layer=isinstance(model.config.connector, LinearConnector),
        ),
        "## Licence\n\nNot chosen yet: add `license:` to the head of this file before you publish. The weights are "
        "bound by the terms of the models they started from"
        + (f" ({', '.join(_sources(trained))})" if _sources(trained) else "")
        + " and of the data they were trained on.",
    ]
    return "\n\n".join(parts) + "\n"


def _sources(trained: Trained | None) -> list[str]:
    """Models that training started from; those in folders by the folder's name."""
    if trained is None:
        return []
    config = trained.config
    if isinstance(config.init, PartSources):
        names = [name for name in config.init.model_dump().values() if name != RANDOM]
    else:
        names = [config.model] if config.init == "model" else []
    return list(dict.fromkeys(map(_named, names)))


def _named(source: str) -> str:
    """A repository as it is, of a path its last part."""
    return source if REPOSITORY.fullmatch(source) else Path(source).name


def _training(trained: Trained) -> Iterator[str]:
    config = trained.config
    yield f"## Training\n\nDescription: `{_named(config.model)}`. Started from: {_started(config)}."
    rows = _log(trained.folder / "log.jsonl")
    lines = [
        "| stage | trained | data | steps | conversations per step | learning rate | taught tokens | loss | hours |",
        "|---|---|---|---:|---:|---|---:|---|---:|",
    ]
    for stage in trained.stages:
        mine = [row for row in rows if row.get("stage") == stage.name and "loss" in row]
        data = ", ".join(f"{Path(each.path).name}" for each in stage.data) or "given by a program"
        rates = {"all": stage.optim.lr, **stage.optim.part_lr}
        told = ", ".join(f"{part} {rate:g}" if len(rates) > 1 else f"{rate:g}" for part, rate in rates.items())
        low = [] if stage.lora is None else [f"LoRA of rank {stage.lora.rank}"]
        cells = [stage.name, ", ".join([*stage.trainable, *low]), data]
        cells += [f"{len(mine):,}", str(stage.batch.samples), f"{stage.optim.kind} {told}"]
        cells += [f"{sum(row['supervised'] for row in mine):,}", _losses([row["loss"] for row in mine])]
        cells.append(f"{sum(row['seconds'] for row in mine) / 3600:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    yield "\n".join(lines)
    for stage in trained.stages:
        ends_with_best = stage.evaluate is not None and stage.evaluate.finish == "best"
        mine = [row for row in rows if "evaluation" in row and row["stage"] == stage.name]
        if row := next((row for row in reversed(mine) if row["best"] or not ends_with_best), None):
            which = "Best evaluation of {}, which it ended with," if ends_with_best else "Last evaluation of {},"
            told = ", ".join(f"{metric} {value:.4g}" for metric, value in row["evaluation"].items())
            yield f"{which.format(stage.name)} after step {row['step']}: {told} ({row['samples']} samples)."
    yield (
        f"Arithmetic {config.precision}, seed {config.seed}. Losses are means per taught token over the first and the "
        f"last {SMOOTH} steps, on the training data."
    )


def _started(config: RunConfig) -> str:
    if isinstance(config.init, PartSources):
        return ", ".join(f"{part} {_named(source)}" for part, source in config.init.model_dump().items())
    return "its own weights" if config.init == "model" else "random weights"


def _losses(losses: list[float]) -> str:
    if not losses:
        return "not logged"
    first, last = losses[:SMOOTH], losses[-SMOOTH:]
    return f"{sum(first) / len(first):.3g} to {sum(last) / len(last):.3g}"


def _log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a last line that was cut short is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _use(title: str, layout: str, *, has_tokenizer: bool, one_layer: bool) -> str:
    parts = [f"With opsin:\n\n```\nopsin chat {title} --image photo.jpg\n```"]
    if layout == "original":
        return parts[0] + "\n\nThe files are in the layout of the model's authors, for their code."
    if not has_tokenizer:
        return parts[0] + "\n\nThe folder has no tokenizer: it was exported without one."
    parts.append(
        "With transformers:\n\n```python\nfrom PIL import Image\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f'processor = AutoProcessor.from_pretrained("{title}")\n'
        f'model = AutoModelForImageTextToText.from_pretrained("{title}", dtype="auto")\n'
        'content = [{"type": "image", "image": Image.open("photo.jpg")}, {"type": "text", "text": "What is this?"}]\n'
        "inputs = processor.apply_chat_template(\n"
        '    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,\n'
        '    return_dict=True, return_tensors="pt",\n)\n'
        "new = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs.input_ids.shape[1] :]\n"
        "print(processor.decode(new, skip_special_tokens=True))\n```"
    )
    if one_layer:
        parts.append(
            "vLLM does not serve it: its list of activations has no `linear`, which stands between the one layer of "
            "this model's connector and a second one that does nothing."
        )
        return "\n\n".join(parts)
    parts.append(
        f"Served, with the interface of OpenAI (not tried by the program that wrote this):\n\n```\nvllm serve {title}\n"
        f"python -m sglang.launch_server --model-path {title}\n```"
    )
    return "\n\n".join(parts)
