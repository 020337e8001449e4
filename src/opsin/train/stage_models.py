"""What a run leaves behind of each stage: its model whole, or as adapters of another one."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin import families, weights
from opsin.errors import TrainError
from opsin.nn.lora import merge
from opsin.nn.retriever import Retriever
from opsin.nn.vlm import VLM
from opsin.spec.recipe import BASE, BEST, RunConfig
from opsin.train.folder import write_tensors
from opsin.train.trainable import Trainable
from opsin.weights import Model, RetrievalModel
from opsin.weights.hub import is_preset
from opsin.weights.shipped import is_shipped

CONNECTOR_FILE = "connector.safetensors"
"""What a stage that trains nothing but the connector writes besides the model: the next run's `init.connector`."""


def put_module(model: Model | RetrievalModel, module: nn.Module) -> None:
    """Give a model another module in place of its own."""
    if isinstance(model, RetrievalModel):
        assert isinstance(module, Retriever)
        model.retriever = module
    else:
        assert isinstance(module, VLM)
        model.vlm = module


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

    def save(self, number: int, model: Model | RetrievalModel, trainable: Trainable) -> None:
        """Write the model of a stage that is done."""
        folder = self.output / self.config.stages[number].name
        self._write(folder, number, model, trainable)
        if self.config.stages[number].lora is None and all(name.startswith("connector.") for name in trainable.names):
            connector = [name for name, _ in model.module.named_parameters() if name.startswith("connector.")]
            write_tensors(folder / CONNECTOR_FILE, _tensors(model.module, connector))

    def save_best(self, number: int, model: Model | RetrievalModel, trainable: Trainable) -> None:
        """Write what a stage has made of the model so far, as the best of it."""
        self._write(self.output / BEST / self.config.stages[number].name, number, model, trainable)
        if self._ends_with_best(number):
            # The model's folder may hold them in another layout, and several adapters as one.
            write_tensors(self._best_tensors(number), _tensors(model.module, trainable.names))

    @torch.no_grad()
    def finish(self, number: int, model: Model | RetrievalModel, *, step: int, say: Callable[[str], None]) -> None:
        """Where a stage is to end with its best weights, put them in place of the last ones.

        step: of its best evaluation; 0 where none was. Raises TrainError where there is no best, or it cannot be read.
        """
        if not self._ends_with_best(number):
            return
        name, file = self.config.stages[number].name, self._best_tensors(number)
        if not step:
            raise TrainError(
                f"stage {name!r} is to finish with its best weights, but no evaluation gave a finite number; see "
                f"{self.output / 'log.jsonl'}"
            )
        own = dict(model.module.named_parameters())
        try:
            best = load_file(file)
        except (OSError, SafetensorError) as error:
            raise TrainError(
                f"stage {name!r} is to finish with its best weights, but {file} cannot be read: {error}"
            ) from None
        for key, tensor in best.items():
            own[key].copy_(tensor)
        say(f"stage {name!r} ends with its best weights, those after step {step}")

    def _ends_with_best(self, number: int) -> bool:
        evaluation = self.config.stages[number].evaluate
        return evaluation is not None and evaluation.finish == "best"

    def _best_tensors(self, number: int) -> Path:
        return self.output / BEST / f"{self.config.stages[number].name}.safetensors"

    def tell(self, number: int, *, say: Callable[[str], None]) -> None:
        """Where the model of a stage that is done can be found."""
        stage = self.config.stages[number]
        made = "model" if stage.lora is None else "adapter"
        say(f"stage {stage.name!r} is done; its {made} is in {self.output / stage.name}")
        if (best := self.output / BEST / stage.name).exists():
            say(f"the {made} of its best evaluation is in {best}")

    def _write(self, folder: Path, number: int, model: Model | RetrievalModel, trainable: Trainable) -> None:
        lora = self.config.stages[number].lora
        if isinstance(model, RetrievalModel):
            shutil.rmtree(folder, ignore_errors=True)  # a checkpoint holds it all, or leads to it again
            weights.export_retriever(folder, model.retriever, tokenizer=model.tokenizer)
        elif lora is None:
            weights.save_native(folder, model.vlm, model.config, model.tokenizer)
        else:
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


def _tensors(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Some of a module's tensors, on the CPU."""
    own = dict(module.named_parameters())
    return {name: own[name].detach().cpu().contiguous() for name in names}


def published_name(name: str) -> str:
    """A model's name that leads to it from anywhere: a whole path, a repository, or the shipped model's."""
    if is_shipped(name):
        return name
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser().resolve())
    return families.preset(name).hub[0] if is_preset(name) else name
