"""Optimizers over named tensors, and learning rates over steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.errors import ConfigError, TrainError
from opsin.spec.recipe import Muon, OptimConfig, Schedule, matches

NOT_HIDDEN = (".decoder.embed.", ".decoder.head.", ".vision.patch.", ".vision.positions")
"""Parts of names of matrices that Muon leaves to AdamW: they face tokens or pixels, not hidden states."""


def rate_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """Factor on every learning rate at one step, from 0.

    As in transformers' get_cosine_schedule_with_warmup, which trained LLaVA: the first step of a warm-up has rate 0,
    and the cosine ends at 0 one step after the last.
    """
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(num_steps * schedule.warmup_ratio)
    if step < warmup:
        return step / warmup
    if schedule.kind == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


@dataclass(frozen=True)
class Group:
    """Tensors that share all settings."""

    label: str
    """The part, or the entry of `part_lr`, that they belong to; `/muon` is added where both optimizers have some."""
    lr: float
    decay: bool
    algorithm: str
    names: tuple[str, ...]


def make_groups(trained: Mapping[str, nn.Parameter], config: OptimConfig) -> list[Group]:
    """Sort tensors into groups by rate, decay and algorithm. Raises ConfigError for a rate that no tensor gets."""
    keys: dict[str, tuple[str, float, bool, str]] = {}
    used: set[tuple[str, str]] = set()
    for name, parameter in trained.items():
        hidden = isinstance(config, Muon) and parameter.ndim == 2 and not any(part in f".{name}" for part in NOT_HIDDEN)
        settings = config.rest if isinstance(config, Muon) and not hidden else config
        pattern = next((p for p in settings.part_lr if matches(name, p)), None)
        lr = settings.lr if pattern is None else settings.part_lr[pattern]
        used.add((settings.kind, pattern or ""))
        label = (pattern or name.split(".")[0]) + ("/muon" if hidden else "")
        # Norms, biases and single vectors (class token, newline) are not decayed.
        keys[name] = (label, lr, parameter.ndim >= 2, "muon" if hidden else "adamw")
    for settings in (config, config.rest) if isinstance(config, Muon) else (config,):
        for pattern in settings.part_lr:
            if (settings.kind, pattern) not in used:
                raise ConfigError(
                    f"part_lr names {pattern!r}, but no tensor that {settings.kind} trains gets that rate"
                )
    return [
        Group(*key, names=tuple(name for name in keys if keys[name] == key)) for key in dict.fromkeys(keys.values())
    ]


class Optimizer:
    """AdamW, or Muon with AdamW for the rest. State is plain tensors by name, to be saved without pickle."""

    def __init__(self, trained: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        self.groups = make_groups(trained, config)
        self.trained = dict(trained)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        adamw = config.rest if isinstance(config, Muon) else config
        if groups := [self._settings(g, adamw.weight_decay) for g in self.groups if g.algorithm == "adamw"]:
            # Fused: one pass over memory instead of several.
            self._optimizers["adamw"] = torch.optim.AdamW(groups, betas=adamw.betas, eps=adamw.eps, fused=True)
        if groups := [self._settings(g, config.weight_decay) for g in self.groups if g.algorithm == "muon"]:
            assert isinstance(config, Muon)
            self._optimizers["muon"] = torch.optim.Muon(groups, momentum=config.momentum, adjust_lr_fn=config.scale)

    def _settings(self, group: Group, weight_decay: float) -> dict[str, object]:
        return {
            "params": [self.trained[name] for name in group.names],
            "lr": group.lr,
            "base_lr": group.lr,
            "weight_decay": weight_decay if group.decay else 0.0,
        }

    def step(self, factor: float) -> None:
        """One update with every rate times `factor`."""
        for optimizer in self._optimizers.values():
            for settings in optimizer.param_groups:
                settings["lr"] = settings["base_lr"] * factor
            optimizer.step()

    def rates(self, factor: float) -> dict[str, float]:
        """Learning rates by label."""
        return {group.label: group.lr * factor for group in self.groups}

    def state(self) -> dict[str, Tensor]:
        """`kind/name` -> tensor, such as `exp_avg/connector.layers.0.weight`; empty before the first step."""
        return {
            f"{kind}/{name}": value
            for name, parameter in self.trained.items()
            for optimizer in self._optimizers.values()
            for kind, value in optimizer.state.get(parameter, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises TrainError unless it belongs to exactly these tensors."""
        owners = {name: o for group in self.groups for name in group.names for o in [self._optimizers[group.algorithm]]}
        found = {key.split("/", 1)[1] for key in state}
        if found != set(owners):
            wrong = sorted(found ^ set(owners))
            raise TrainError(
                f"the saved optimizer state is of other tensors; {len(wrong)} differ, such as {wrong[0]!r}"
            )
        for key, value in state.items():
            kind, name = key.split("/", 1)
            parameter = self.trained[name]
            owners[name].state[parameter][kind] = value.to(parameter.device)
