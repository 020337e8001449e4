"""Adding up what a pass computes and keeps: FLOPs forwards and backwards, and bytes held for the way back.

Sizes stand in place of tensors. Each value knows whether a gradient will flow into it, by autograd's own rule: it does
where something that trains lies below. So a frozen tower costs its way forwards only, a frozen decoder above a trained
connector half of its way backwards, and a stack below the lowest trained tensor keeps nothing.

    product         forwards            backwards
    x W             2 rows in out       as much again for x, if a gradient flows there; and for W, if it trains
    q k^T, p v      2 T S H E each      as much again for each factor that a gradient flows into
    everything else is not counted: norms, activations, rotations and additions take well under 1 %

Attention is counted in full squares per conversation, as `torch.utils.flop_counter` and PaLM's appendix B
(arXiv:2204.02311) do; a kernel that leaves out what a causal mask hides does about half of it.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from opsin.nn.lora import WithLoRA

FLOAT32, HALF = 4, 2


@dataclass(eq=False, slots=True)
class Value:
    """A tensor (rows, width) as far as costs go."""

    rows: int
    width: int
    grad: bool = False
    """Whether a gradient flows into it."""
    half: bool = False
    """Whether it is what a product gave: in half precision where the run has that."""
    kept: bool = False
    """Whether something keeps it for the way back already."""


@dataclass
class Work:
    """The sum over a pass."""

    forward: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """FLOPs by part: vision, connector, decoder, head."""
    backward: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    again: float = 0
    """FLOPs of computing blocks again on the way back, where the run does that to keep less: all that a gradient flows
    through, up to the last tensor that is needed."""
    kept: float = 0
    """Bytes of activations kept for the way back."""
    kept_between: float = 0
    """The same where blocks are computed again: what goes into them, and all that lies outside of blocks."""
    largest_block: float = 0
    """What the block that keeps most keeps inside: there once more while it is computed again."""
    ahead: int = 0
    """Bytes of gradients that the loss makes together with its logits, before the way back begins."""
    multiplied: int = 0
    """Elements of matrices whose products a gradient flows through: half precision keeps a copy of them."""

    @property
    def flops(self) -> float:
        """Forwards and backwards, without computing blocks again."""
        return sum(self.forward.values()) + sum(self.backward.values())


class Tape:
    """Adds up the work of what is called, as the modules call it."""

    def __init__(self, *, half: bool) -> None:
        """half: whether products are in half precision (autocast), and everything else in float32."""
        self.work = Work()
        self.half = half
        self.part = ""
        self._inside = False
        self._unkept = 0.0
        """FLOPs of the last product, where nothing behind it was kept: torch does not compute it again."""

    # ---- bookkeeping -------------------------------------------------------------------------------------------------

    def keep(self, *values: Value) -> None:
        """Something on the way back needs these."""
        self._unkept = 0
        for value in values:
            if not value.kept:
                value.kept = True
                self._add_bytes(self._size(value))

    def block(self, x: Value, run: Callable[[Value], Value]) -> Value:
        """A block that can be computed again on the way back, from `x` alone."""
        known, kept, flops = x.kept, self.work.kept, sum(self.work.forward.values())
        self._inside = True
        out = run(x)
        self._inside = False
        if out.grad:
            self.work.kept_between += 0 if known else self._size(x)
            self.work.largest_block = max(self.work.largest_block, self.work.kept - kept)
            self.work.again += sum(self.work.forward.values()) - flops - self._unkept
        return out

    def product(self, flops: float, *factors: bool) -> None:
        """A product; factors: which of its two a gradient flows into."""
        self.work.forward[self.part] += flops
        self.work.backward[self.part] += flops * sum(factors)
        self._unkept = flops

    def _size(self, value: Value) -> int:
        return value.rows * value.width * (HALF if value.half and self.half else FLOAT32)

    def _add_bytes(self, size: float) -> None:
        self.work.kept += size
        self.work.kept_between += 0 if self._inside else size

    # ---- what models are made of -------------------------------------------------------------------------------------

    def linear(self, x: Value, layer: Any) -> Value:
        """A linear layer, or the embedding that stands for one."""
        out = self.matmul(x, layer.weight, getattr(layer, "bias", None))
        if not isinstance(layer, WithLoRA):
            return out
        change = self.linear(self.linear(self.dropout(x, layer.lora_dropout), layer.lora_A), layer.lora_B)
        return Value(out.rows, out.width, out.grad or change.grad, half=True)

    def matmul(self, x: Value, weight: Any, bias: Any = None) -> Value:
        """x (rows, in) times weight (out, in) or, square, (in, out)."""
        trains = bool(weight.requires_grad)
        if trains:
            # Autocast makes a copy in half precision of what is not, anew for each product.
            self.keep(x if x.half or not self.half else Value(x.rows, x.width, half=True))
        self.product(2 * x.rows * weight.numel(), x.grad, trains)
        if x.grad or trains:
            self.work.multiplied += weight.numel()
        return Value(x.rows, weight.shape[0], x.grad or trains or _trains(bias), half=True)

    def norm(self, x: Value, layer: Any) -> Value:
        """A LayerNorm or RMSNorm, or None or the identity."""
        if layer is None or isinstance(layer, nn.Identity):
            return x
        trains = any(p.requires_grad for p in layer.parameters())
        if x.grad or trains:
            self.keep(x)
            self._add_bytes(FLOAT32 * x.rows * (1 if isinstance(layer, nn.RMSNorm) else 2))  # its scale and its mean
        return Value(x.rows, x.width, x.grad or trains)

    def elementwise(self, x: Value, *, keeps: int = 1) -> Value:
        """An activation. keeps: 1 its input; 2 one more value as large; 0 its output (ReLU)."""
        out = Value(x.rows, x.width, x.grad, x.half)
        if x.grad:
            self.keep(*(x, Value(x.rows, x.width, half=x.half))[:keeps] or (out,))
        return out

    def dropout(self, x: Value, share: float) -> Value:
        """Keeps one byte per element: what was dropped."""
        if share and x.grad:
            self._unkept = 0
            self._add_bytes(x.rows * x.width)
        return Value(x.rows, x.width, x.grad, x.half)

    def scale(self, x: Value, layer: Any) -> Value:
        """A learned factor per channel, or the identity."""
        if isinstance(layer, nn.Identity):
            return x
        if _trains(layer.weight):
            self.keep(x)
        if x.grad:
            self._unkept = 0  # the factor is kept
        return Value(x.rows, x.width, x.grad or _trains(layer.weight))

    def add(self, x: Value, other: Value) -> Value:
        """A sum, in float32: the residual stream."""
        return Value(x.rows, x.width, x.grad or other.grad)

    def attention(self, q: Value, k: Value, v: Value, *, pairs: int, apart: bool = False) -> Value:
        """Softmax attention. pairs: queries times keys, over all that look at each other; apart: stretch by stretch,
        whose results are then put side by side."""
        flops = 2 * pairs * q.width
        self.product(flops, q.grad, k.grad)  # scores
        self.product(flops, q.grad or k.grad, v.grad)  # what is read
        out = Value(q.rows, q.width, q.grad or k.grad or v.grad, half=True)
        if out.grad:
            self.keep(q, k, v, out)
        return Value(out.rows, out.width, out.grad, half=True) if apart else out

    def mlp(self, x: Value, mlp: Any, *, keeps: int = 1) -> Value:
        """down(activation(up(x))); keeps: as of `elementwise`."""
        return self.linear(self.elementwise(self.linear(x, mlp.up), keeps=keeps), mlp.down)

    def gated(self, x: Value, mlp: Any) -> Value:
        """down(activation(gate(x)) * up(x))."""
        gate, up = self.linear(x, mlp.gate), self.linear(x, mlp.up)
        opened = self.elementwise(gate)
        if up.grad:
            self.keep(opened)
        if opened.grad:
            self.keep(up)
        return self.linear(Value(x.rows, gate.width, gate.grad or up.grad, half=True), mlp.down)


def _trains(parameter: Any) -> bool:
    return parameter is not None and bool(parameter.requires_grad)


def of_parameter(parameter: Any, *, rows: int = 1) -> Value:
    """A learned row, or table."""
    return Value(rows, 0 if parameter is None else parameter.shape[-1], _trains(parameter))
