"""The rungs of the ladder, and the comparison of two climbs of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Verdict = Literal["equal", "differs", "skipped"]

RUNGS: dict[str, str] = {
    "pixels": "how the picture is resampled (Pillow's version, a torch resize), padded or cropped, or image_mean and "
    "image_std in preprocessor_config.json",
    "ids": "the tokenizer: its normaliser, its added tokens, or a space before the first word",
    "positions": "the position rule: M-RoPE after a picture, or counting that does not begin at 0",
    "features": "the vision tower: which layer is read (off by one), the class token, its activation, its epsilon, or "
    "its weights",
    "rows": "the connector: its weights or activation; or how rows are laid out (newlines, rounding of the unpadding); "
    "or the token embeddings' width",
    "first layer": "the decoder's rotation (rope theta, NTK scaling, sections), its norm's epsilon, its grouped keys, "
    "or the weights of layer 0",
    "last layer": "the weights of a layer after the first, a mask, or the number of layers",
    "logits": "the final norm, or the head (tied or its own)",
    "greedy": "the cache or the positions of later tokens; or a tie, which rounding decides",
}
"""Every rung, in order, and what usually causes the first difference there."""

HALVES = "; in half precision also plain rounding: run it again with --dtype float32"

TOLERANCES = {"float64": 1e-9, "float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest allowed error by dtype, as a share of the largest number on the other side. Two orders of adding the same
float32 numbers differ by about 1e-6 of it, a wrong constant by more than 1e-3; half precisions carry 11 and 8 bits, and
lose some on the way through the layers."""

PIXEL_TOLERANCE = 1e-5
"""Pixels are normalised in float32 whatever the model computes in."""


@dataclass
class Trace:
    """One climb: what stood at each rung, and why a rung has nothing."""

    values: dict[str, NDArray[Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One rung compared."""

    rung: str
    verdict: Verdict
    error: float | None = None
    """Largest absolute difference; None where there is none to speak of: skipped, or shapes that differ."""
    tolerance: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Ladder:
    """All rungs, compared."""

    model: str
    reference: str
    """What it was compared with."""
    dtype: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @property
    def first_difference(self) -> Step | None:
        """The lowest rung that differs."""
        return next((step for step in self.steps if step.verdict == "differs"), None)

    @property
    def num_compared(self) -> int:
        """Rungs that were not skipped."""
        return sum(step.verdict != "skipped" for step in self.steps)

    @property
    def conclusion(self) -> str:
        """One sentence: the first rung that differs and the likely cause."""
        first = self.first_difference
        if first is None:
            return (
                f"{self.num_compared} rungs compared, all equal: {self.model} computes what {self.reference} computes."
            )
        half = HALVES if self.dtype in ("float16", "bfloat16") else ""
        return f"The first rung that differs is {first.rung}. Likely cause: {RUNGS[first.rung]}{half}."


def compare(
    ours: Trace, theirs: Trace, *, dtype: str, tolerances: Mapping[str, tuple[float, float]] = {}
) -> list[Step]:
    """Compare two climbs rung by rung.

    tolerances: (absolute, share of the other side's largest number) by rung, where they are recorded.
    """
    steps = []
    for rung in RUNGS:
        reasons = [trace.missing.get(rung, "not recorded") for trace in (ours, theirs) if rung not in trace.values]
        if reasons:
            steps.append(Step(rung, "skipped", note=reasons[0]))
            continue
        ours_here, theirs_here = ours.values[rung], theirs.values[rung]
        if ours_here.shape != theirs_here.shape:
            steps.append(Step(rung, "differs", note=f"shape {ours_here.shape} here, {theirs_here.shape} there"))
            continue
        default = (PIXEL_TOLERANCE, 0.0) if rung == "pixels" else (0.0, TOLERANCES[dtype])
        steps.append(_compare(rung, ours_here, theirs_here, *tolerances.get(rung, default)))
    return steps


def _compare(rung: str, ours: NDArray[Any], theirs: NDArray[Any], absolute: float, share: float) -> Step:
    if np.issubdtype(theirs.dtype, np.integer):
        count = int((ours != theirs).sum())
        note = f"{count} of {theirs.size} differ" if count else ""
        apart = float(np.abs(ours - theirs).max(initial=0))
        return Step(rung, "differs" if count else "equal", apart, 0.0, note)
    apart = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0))
    allowed = absolute + share * float(np.abs(theirs).max(initial=0))
    return Step(rung, "equal" if apart <= allowed else "differs", apart, allowed)  # NaN is no equality


Tap = tuple[nn.Module, str]
"""A module, and what to keep of a call: `output`, or the name of an argument."""


@contextmanager
def tapped(taps: Mapping[str, Tap]) -> Iterator[dict[str, Tensor]]:
    """What passes the tapped modules while the context is open, by the taps' names; of several calls the first."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, argument: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = (
                output if argument == "output" else signature(module.forward).bind(*args, **kwargs).arguments[argument]
            )
            value = getattr(value, "last_hidden_state", value)
            kept.setdefault(name, value[0] if isinstance(value, tuple) else value)

        return hook

    handles = [
        module.register_forward_hook(keep(name, argument), with_kwargs=True)
        for name, (module, argument) in taps.items()
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor as numpy has it; half precision widened, which numpy lacks."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor).numpy()
