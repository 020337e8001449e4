"""Where a number first stopped being finite: a step that failed is computed once more, with an eye on every module.

Nothing of this runs in a step that is well. When it runs nothing was updated yet, and random numbers follow from the
step's number, so the second time goes as the first one did.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from opsin.nn.batch import Batch
from opsin.train.objectives import Loss, Objective


class Watch:
    """Notes the first module whose output, or else whose gradient, is not finite."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        self.module = module
        self._objective = objective
        self._names: tuple[str, ...] = ()
        self.samples: tuple[str, ...] = ()
        """Those of the pass where it was found."""
        self.found: str | None = None
        """A clause that says where."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every call of a module is looked at. One ends after those within it, so the innermost is named."""
        handles = [
            each.register_forward_hook(partial(self._called, name)) for name, each in self.module.named_modules()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def objective(self, module: Any, batch: Batch) -> Loss:
        """The objective, with a look at what goes in and what comes out."""
        self._names = batch.names
        if batch.patches is not None:
            self._check(batch.patches, "the pixels that go in are not finite")
        loss = self._objective(module, batch)
        self._check(loss.total, "outputs of modules are finite, the loss is not", self.module)
        return loss

    def _called(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._check(tensor, f"the first output that is not finite is that of {name!r}", module)
                if tensor.requires_grad:
                    text = f"outputs are finite; the first bad one of their gradients is that of {name!r}"
                    tensor.register_hook(partial(self._check, text=text))

    def _check(self, tensor: Tensor, text: str, module: nn.Module | None = None) -> None:
        if self.found is None and not _is_finite(tensor):
            self.found = text + ("" if module is None else _own_tensors(module))
            self.samples = self._names


def _own_tensors(module: nn.Module) -> str:
    """What is wrong with a module's own tensors, if anything."""
    bad = [name for name, value in module.named_parameters() if not _is_finite(value)]
    return f", and its tensor {bad[0]!r} is not finite itself" if bad else ""


def _is_finite(tensor: Tensor) -> bool:
    """Of a tensor that processes share, each looks at its own part: one that asks the others alone waits for ever."""
    from torch.distributed.tensor import DTensor  # half a second that only a failed step pays

    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())


def bad_gradients(trained: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the tensors whose gradient is not finite."""
    return [name for name, p in trained.items() if p.grad is not None and not _is_finite(p.grad)]


def listed(names: Iterable[str]) -> str:
    """The first few names, quoted, and how many more there are."""
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:8]) + (f" and {len(quoted) - 8} more" if len(quoted) > 8 else "")
