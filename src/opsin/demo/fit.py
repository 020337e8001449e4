"""The training loop of the shipped parts: small, seeded, in half precision with a float32 original."""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from opsin.spec.recipe import Muon
from opsin.train.optim import Optimizer


@dataclass(frozen=True)
class Fit:
    """One run."""

    steps: int
    optim: Muon
    warmup_steps: int = 100
    decay_share: float = 0.4
    """Share of the steps, at the end, over which the rates fall to zero in a straight line."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    log_every: int = 100
    measure_every: int = 500
    save_every: int = 500

    def factor(self, step: int) -> float:
        """Factor on the learning rates at `step`, from 0."""
        rise = (step + 1) / self.warmup_steps
        fall = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return min(1.0, rise, fall)


def fit(
    module: nn.Module,
    run: Fit,
    *,
    loss: Callable[[nn.Module, int], Tensor],
    measure: Callable[[nn.Module], Mapping[str, float]],
    log: Path,
    save: Callable[[nn.Module], None],
) -> None:
    """Train `module` in place.

    loss: scalar of (a bfloat16 copy of the module, step); the step is all that its data may depend on.
    measure: figures for the log, from the float32 module.   log: one JSON object per line.
    save: writes the module's weights; called every `save_every` steps and at the end.
    """
    half = copy.deepcopy(module).bfloat16()
    pairs = list(zip(module.parameters(), half.parameters(), strict=True))
    optimizer = Optimizer(dict(module.named_parameters()), run.optim)
    started, busy, losses = time.time(), time.process_time(), []
    with log.open("w") as file:
        for step in range(run.steps):
            # The fused half-precision attention of CPUs is slower backwards than plain matrix products.
            with sdpa_kernel(SDPBackend.MATH):
                value = loss(half, step)
                value.backward()
            losses.append(value.item())
            for parameter, twin in pairs:
                parameter.grad = None if twin.grad is None else twin.grad.float()
                twin.grad = None
            nn.utils.clip_grad_norm_(module.parameters(), run.clip)
            optimizer.step(run.factor(step))
            with torch.no_grad():
                for parameter, twin in pairs:
                    twin.copy_(parameter)
            done = step + 1 == run.steps
            if (step + 1) % run.save_every == 0 or done:
                save(module)
            if (step + 1) % run.log_every == 0 or done:
                row: dict[str, float] = {"step": step + 1, "loss": sum(losses) / len(losses)}
                losses = []
                row |= {"seconds": time.time() - started, "cpu_seconds": time.process_time() - busy}
                if (step + 1) % run.measure_every == 0 or done:
                    row |= measure(module)
                file.write(json.dumps({key: round(value, 4) for key, value in row.items()}) + "\n")
                file.flush()


def save_half(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write weights in float16 (ten bits of fraction; nothing here comes near its range) as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}, path, metadata)


def spread_normal_(linear: Tensor, scale: float = 1.0) -> None:
    """Fill a (fan out, fan in) matrix so that unit inputs give outputs of size `scale`."""
    nn.init.normal_(linear, std=scale / math.sqrt(linear.shape[1]))


def spread_blocks_(blocks: nn.Module) -> None:
    """Fill all matrices of a language model's blocks; what they add to the stream is small at first."""
    for name, tensor in blocks.named_parameters():
        if tensor.ndim == 2:
            spread_normal_(tensor, 0.3 if name.endswith(("out.weight", "down.weight")) else 1.0)
