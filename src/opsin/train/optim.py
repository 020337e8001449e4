"""Optimizers over named tensors, and learning rates over steps."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.errors import ConfigError, TrainError
from opsin.spec.recipe import AdamW, Muon, OptimConfig, Schedule, matches
from opsin.train.parallel import split_like

NOT_HIDDEN = (".decoder.embed.", ".decoder.head.", ".vision.patch.", ".words.", ".table.", ".positions", ".queries")
"""Parts of names of matrices that Muon leaves to AdamW: they face tokens or pixels, or are tables of places and
queries, which nothing is multiplied by."""


BEFORE_LAYERS = ("patch", "class_token", "positions", "norm_pre", "embed")
"""Second names of what a part's first layer reads, for `layer_decay`."""


def rate_factor(
    schedule: Schedule, step: int, num_steps: int, *, lr: float = 1.0, steps_per_epoch: int | None = None
) -> float:
    """Factor on every learning rate at one step, from 0.

    As in transformers' get_cosine_schedule_with_warmup, which trained LLaVA: the first step of a warm-up has rate 0,
    and the cosine ends at 0 one step after the last.
    lr: the rate that the schedule's own rates belong to. steps_per_epoch: for `cosine_of_epochs`.
    """
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(num_steps * schedule.warmup_ratio)
    if schedule.kind == "cosine_of_epochs":
        assert steps_per_epoch is not None
        epoch, num_epochs = step // steps_per_epoch, -(-num_steps // steps_per_epoch)
        warming, done = step < warmup and epoch == 0, epoch / num_epochs
    else:
        warming, done = step < warmup, (step - warmup) / max(1, num_steps - warmup)
    if warming:
        start = schedule.warmup_start_lr / lr
        return start + (1 - start) * step / warmup
    if schedule.kind == "constant":
        return 1.0
    end = schedule.min_lr / lr
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Group:
    """Tensors that share all settings."""

    label: str
    """The part, or the entry of `part_lr`, that they belong to; `/muon` is added where both optimizers have some."""
    lr: float
    decay: bool
    algorithm: str
    scale: float
    """What `layer_decay` makes of `lr`: a factor, 1 for the fastest."""
    names: tuple[str, ...]


def make_groups(trained: Mapping[str, nn.Parameter], config: OptimConfig) -> list[Group]:
    """Sort tensors into groups by rate, decay and algorithm. Raises ConfigError for a rate that no tensor gets."""
    keys: dict[str, tuple[str, float, bool, str, float]] = {}
    used: set[tuple[str, str]] = set()
    scales = _layer_scales(trained, config.rest if isinstance(config, Muon) else config)
    for name, parameter in trained.items():
        hidden = isinstance(config, Muon) and parameter.ndim == 2 and not any(part in f".{name}" for part in NOT_HIDDEN)
        settings = config.rest if isinstance(config, Muon) and not hidden else config
        pattern = next((p for p in settings.part_lr if matches(name, p)), None)
        lr = settings.lr if pattern is None else settings.part_lr[pattern]
        used.add((settings.kind, pattern or ""))
        label = (pattern or name.split(".")[0]) + ("/muon" if hidden else "")
        # Norms, biases and single vectors (class token, newline) are not decayed.
        scale = 1.0 if hidden else scales.get(name, 1.0)
        keys[name] = (label, lr, parameter.ndim >= 2, "muon" if hidden else "adamw", scale)
    for settings in (config, config.rest) if isinstance(config, Muon) else (config,):
        for pattern in settings.part_lr:
            if (settings.kind, pattern) not in used:
                raise ConfigError(
                    f"part_lr names {pattern!r}, but no tensor that {settings.kind} trains gets that rate"
                )
    return [
        Group(*key, names=tuple(name for name in keys if keys[name] == key)) for key in dict.fromkeys(keys.values())
    ]


def _layer_scales(names: Iterable[str], settings: AdamW) -> dict[str, float]:
    """Factors by `layer_decay`: with n layers, decay ** (n - i) for layer i from 0, one more for what it reads."""
    scales: dict[str, float] = {}
    for part, decay in settings.layer_decay.items():
        found = {name: re.search(r"\.layers\.(\d+)\.", name) for name in names if matches(name, part)}
        layers = [int(each[1]) for each in found.values() if each is not None]
        if not layers:
            raise ConfigError(f"layer_decay names {part!r}, but no layer of it trains")
        count = max(layers) + 1
        for name, each in found.items():
            if each is not None:
                scales[name] = decay ** (count - int(each[1]))
            elif name.split(".")[1] in BEFORE_LAYERS:
                scales[name] = decay ** (count + 1)
    return scales


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
            "lr": group.lr * group.scale,
            "base_lr": group.lr * group.scale,
            "weight_decay": weight_decay if group.decay else 0.0,
        }

    def step(self, factor: float) -> None:
        """One update with every rate times `factor`."""
        for optimizer in self._optimizers.values():
            for settings in optimizer.param_groups:
                settings["lr"] = settings["base_lr"] * factor
            optimizer.step()

    def rates(self, factor: float) -> dict[str, float]:
        """Learning rates by label, before `layer_decay`."""
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
        """Take over what `state` gave, or this process' rows of it. Raises TrainError where it is of other tensors."""
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
            owners[name].state[parameter][kind] = split_like(value, parameter)
