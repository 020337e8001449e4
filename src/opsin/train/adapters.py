"""Stages that train adapters: what their adapters belong to, and what such a stage leaves behind."""

import os
from pathlib import Path

from torch import nn

from opsin import families, weights
from opsin.data.order import derive_seed
from opsin.nn.lora import attach, merge
from opsin.nn.quantize import Bits, quantize
from opsin.spec.recipe import BASE, RunConfig
from opsin.train.prepare import PreparedStage
from opsin.train.trainable import Trainable
from opsin.weights import Model, RetrievalModel
from opsin.weights.hub import is_preset


def add_adapters(module: nn.Module, prepared: PreparedStage, *, bits: Bits | None = None) -> None:
    """Put the adapters of a stage onto the module, where it has some.

    bits: what frozen linear layers are quantised to first.
    """
    stage = prepared.stage
    if stage.lora is not None:
        if bits is not None:
            quantize(module, bits, keep=prepared.trainable.names)
        seed = derive_seed(prepared.feed.seed, stage.name, "lora")
        attach(module, stage.lora, prepared.trainable.targets, seed=seed)


class StageModels:
    """How a run writes the models of its stages: whole, or as adapters of another model."""

    def __init__(self, config: RunConfig, *, has_name: bool) -> None:
        """has_name: whether the weights that the run starts from are exactly those that `config.model` leads to."""
        self.config, self.has_name = config, has_name
        self.output = Path(config.output)

    def begin(self, number: int, model: Model | RetrievalModel) -> None:
        """Keep the model that the first stage's adapters belong to, where no name leads to it. Before any are added."""
        if self.config.stages[number].lora is None or number > 0 or self.has_name:
            return
        assert isinstance(model, Model), "models that compare train no adapters"
        if not (self.output / BASE).exists():
            weights.save_native(self.output / BASE, model.vlm, model.config, model.tokenizer)

    def save(self, folder: Path, number: int, model: Model, trainable: Trainable) -> None:
        """Write what a stage has made of the model so far."""
        lora = self.config.stages[number].lora
        if lora is None:
            weights.save_native(folder, model.vlm, model.config, model.tokenizer)
            return
        plain = set(trainable.merged)
        whole = [name for name in trainable.names if name in plain]
        weights.save_adapter(folder, model, lora, base=self._base(folder, number), trained=whole)

    def end(self, model: Model | RetrievalModel) -> None:
        """Merge adapters, so that the next stage meets a plain model. What is quantised stays as it is."""
        if self.config.quantize is None:
            merge(model.module)

    def _base(self, folder: Path, number: int) -> str:
        """What the adapters of a stage belong to: the stage before, or what the run started from."""
        if number == 0 and self.has_name:
            return published_name(self.config.model)
        base = self.output / (self.config.stages[number - 1].name if number else BASE)
        return Path(os.path.relpath(base, folder)).as_posix()


def published_name(name: str) -> str:
    """A model's name that leads to it from anywhere: a whole path, or a repository."""
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser().resolve())
    return families.preset(name).hub[0] if is_preset(name) else name
