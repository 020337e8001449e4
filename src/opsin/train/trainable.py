"""What trains: names to tensors, tensors that no gradient can reach, and the check that it reaches all others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from opsin.errors import ConfigError, TrainError, nearest
from opsin.nn.lora import A, B, find_targets
from opsin.spec.lora import Lora
from opsin.spec.model import VLMConfig
from opsin.spec.recipe import PARTS, matches

PICTURE_PARTS = ("vision.", "connector.", "newline")
"""Beginnings of tensors that take part only where there is a picture."""


@dataclass(frozen=True)
class Trainable:
    """The outcome of a stage's `trainable` on one module."""

    names: tuple[str, ...]
    """Tensors that train, in the module's order."""
    idle: Mapping[str, str]
    """Tensors that were named but that nothing computed depends on, with the reason. They stay as they are."""
    targets: tuple[str, ...] = ()
    """Linear layers that train by an adapter, whose tensors are among `names` before they exist."""

    @property
    def merged(self) -> tuple[str, ...]:
        """Tensors of the plain model that differ afterwards, once adapters are merged."""
        own = set(_adapter_names(self.targets))
        return (*(name for name in self.names if name not in own), *(f"{target}.weight" for target in self.targets))


def choose(
    module: nn.Module, patterns: Iterable[str], *, idle: Mapping[str, str], lora: Lora | None = None
) -> Trainable:
    """Tensors that `patterns` name. Raises ConfigError for a pattern that names none.

    patterns: parts (`connector`) or globs (`decoder.layers.*.attn.*`). idle: tensors that no gradient can reach. lora:
    what trains by adapters besides.
    """
    names = [name for name, _ in module.named_parameters()]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if matches(name, pattern)]
        if not found:
            known = [*PARTS, *names]
            raise ConfigError(f"trainable {pattern!r} names no tensor of the model{nearest(pattern, known)}")
        if all(name in idle for name in found):
            raise ConfigError(f"trainable {pattern!r} would train nothing: {idle[found[0]]}")
        chosen.update(found)
    targets = () if lora is None else find_targets(module, lora.targets)
    if both := [target for target in targets if f"{target}.weight" in chosen]:
        raise ConfigError(
            f"{both[0]} is named by trainable and by lora.targets: it trains as a whole, or by an adapter"
        )
    chosen.update(f"{target}.weight" for target in targets if f"{target}.weight" in idle)
    targets = tuple(target for target in targets if f"{target}.weight" not in idle)
    if lora is not None and not targets:
        raise ConfigError(f"lora.targets {', '.join(lora.targets)} would train nothing: no output depends on them")
    return Trainable(
        names=(*(name for name in names if name in chosen and name not in idle), *_adapter_names(targets)),
        idle={name: idle[name] for name in names if name in chosen and name in idle},
        targets=targets,
    )


def _adapter_names(targets: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{target}.{own}.weight" for target in targets for own in (A, B))


def idle_tensors(module: nn.Module, config: VLMConfig) -> dict[str, str]:
    """Tensors of a VLM that no output depends on, with the reason. config: with the resolution that the stage uses."""
    vision = config.vision
    last = f"features leave the tower after block {vision.num_used_layers} of {vision.num_layers}"
    idle = {}
    for name, _ in module.named_parameters():
        path = name.split(".")
        if path[0] == "vision" and (
            path[1] == "norm_post" or (path[1] == "layers" and int(path[2]) >= vision.num_used_layers)
        ):
            idle[name] = last
        elif name == "connector.positions":
            idle[name] = "fixed sines that a checkpoint holds; the authors do not train them"
        elif path[0] == "newline" and not config.uses_newline:
            idle[name] = f"pictures are laid out without newlines (resolution {config.resolution.kind})"
    return idle


def set_trainable(module: nn.Module, trainable: Trainable) -> dict[str, nn.Parameter]:
    """Switch gradients on for exactly these tensors, off for all others. Returns them by name."""
    names = set(trainable.names)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None
    return {name: parameter for name, parameter in module.named_parameters() if name in names}


class GradientCheck:
    """Makes sure, once, that the first gradient reaches exactly the tensors that train.

    A step without pictures cannot reach tower and connector, so those wait for the first step with one.
    """

    def __init__(self, module: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        self._waiting = dict(trained)
        self._frozen = {name: p for name, p in module.named_parameters() if name not in trained}

    def __call__(self, *, with_pictures: bool) -> None:
        """Call after each backward pass, before gradients are cleared. Raises TrainError."""
        for name, parameter in self._frozen.items():
            if parameter.grad is not None:
                raise TrainError(f"the frozen tensor {name!r} received a gradient")
        self._frozen = {}
        due = [name for name in self._waiting if with_pictures or not name.startswith(PICTURE_PARTS)]
        missed = [name for name in due if self._waiting[name].grad is None]
        if missed:
            shown = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
            raise TrainError(
                f"{len(missed)} of {len(due)} tensors that should train received no gradient: {shown}. The loss does "
                "not depend on them; take them out of trainable."
            )
        for name in due:
            del self._waiting[name]
