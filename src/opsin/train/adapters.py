"""Stages that train adapters."""

from torch import nn

from opsin.data.order import derive_seed
from opsin.nn.lora import attach
from opsin.nn.quantize import Bits, quantize
from opsin.train.prepare import PreparedStage


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
