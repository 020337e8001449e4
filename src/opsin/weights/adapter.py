"""Adapters in PEFT's layout: read, and put onto a model.

    adapter_config.json           what it belongs to, rank, alpha, which layers
    adapter_model.safetensors     base_model.model.<layer as transformers names it>.lora_A.weight   (rank, in)
                                                                                   .lora_B.weight   (out, rank)
                                  base_model.model.<tensor that was trained as a whole>

Names are those of the model's published layouts, and go through the same rules as its weights. A layer that a layout
holds in one piece and that is several of ours (queries, keys and values) shares its A among them; B is cut by rows.

LLaVA's authors write what LoRA leaves to others into a second file, `non_lora_trainables`; it is read as well.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from opsin.errors import WeightError
from opsin.nn.lora import A, B, adapted, attach_one, find_targets
from opsin.nn.vlm import VLM
from opsin.spec.lora import Lora
from opsin.spec.rules import Layout
from opsin.weights.config import ADAPTER, read_json
from opsin.weights.files import pickles_refused
from opsin.weights.init import on_meta
from opsin.weights.rules import Renamer, constant, identity, piece_of

TENSORS, OTHERS = "adapter_model", "non_lora_trainables"
PREFIX = "base_model.model."
"""What PEFT's two wrappers put in front of every name."""
MODULES = ("hf-v5-modules", "hf-modules", "hf-v5", "hf", "original")
"""Layouts that name modules as programs that load adapters have them in memory, the best first."""
UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters")
"""Settings of PEFT under which an adapter is more, or other, than B A x; and `alora_invocation_tokens` and the like."""
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin that also change the base model's weights."""


@dataclass(frozen=True)
class Factors:
    """The change of one linear layer of ours."""

    a: Tensor
    """(rank, in)"""
    b: Tensor
    """(out, rank)"""
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter by our names."""

    label: str
    layout: str
    factors: Mapping[str, Factors]
    """By linear layer."""
    whole: Mapping[str, Tensor]
    """Tensors that replace the model's."""
    dropout: float


def read_adapter(folder: Path, vlm: VLM, layouts: Iterable[Layout], *, label: str) -> Adapter:
    """The adapter in a folder, every tensor of it matched with the model. Raises one WeightError for all that is not.

    layouts: the published ones of the model.
    """
    settings = _read_settings(folder, label)
    stored = _read_stored(folder, label)
    shapes = {name: tuple(tensor.shape) for name, tensor in on_meta(vlm.config).state_dict().items()}
    pairs = {name.removesuffix(f".{A}.weight") for name in stored if name.endswith(f".{A}.weight")}
    plain = [name for name in stored if not name.endswith((f".{A}.weight", f".{B}.weight"))]
    wanted = [*(f"{layer}.weight" for layer in pairs), *plain]
    renamer = Renamer(max((*layouts, identity(shapes)), key=lambda layout: Renamer(layout).num_known(wanted)))
    possible = {name.removesuffix(".weight") for name in find_targets(vlm, ("*",))}
    problems: list[str] = []
    factors: dict[str, Factors] = {}
    for layer in sorted(pairs):
        a, b = stored[f"{layer}.{A}.weight"], stored.get(f"{layer}.{B}.weight")
        matches = renamer.from_source(f"{layer}.weight")
        if b is None:
            problems.append(f"{layer}   has {A} and no {B}")
        elif not matches or any(match.target.removesuffix(".weight") not in possible for match in matches):
            problems.append(f"{layer}   is no linear layer that can have an adapter{_near(layer, renamer, possible)}")
        else:
            rows, columns = matches[0].source_shape(shapes[matches[0].target])
            if a.ndim != 2 or a.shape[1] != columns or b.shape != (rows, a.shape[0]):
                problems.append(
                    f"{layer}   {A} {_sides(a)} and {B} {_sides(b)} do not fit a weight of {rows}x{columns}"
                )
                continue
            scale = _scale(settings, layer, rank=a.shape[0])
            factors |= {m.target.removesuffix(".weight"): Factors(a, piece_of(b, m), scale) for m in matches}
    whole: dict[str, Tensor] = {}
    for name in plain:
        if (rule := renamer.constants.get(name)) is not None:
            if not torch.equal(stored[name], constant(rule, stored[name].dtype)):
                problems.append(f"{name}   holds other numbers than a model like this can have there ({rule.reason})")
            continue
        matches = renamer.from_source(name)
        if not matches or any(match.target not in shapes for match in matches):
            problems.append(f"{name}   is unknown to the model{_near(name, renamer, shapes)}")
        elif stored[name].shape != (shape := matches[0].source_shape(shapes[matches[0].target])):
            problems.append(f"{name}   is {_sides(stored[name])}, the model has {'x'.join(map(str, shape))}")
        else:
            whole |= {match.target: piece_of(stored[name], match) for match in matches}
    lost = [name for name in stored if name.endswith(f".{B}.weight") and name.removesuffix(f".{B}.weight") not in pairs]
    problems += [f"{name}   has no {A}" for name in lost]
    if problems or not stored:
        many = "\n  ".join(problems[:8]) + (f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise WeightError(
            f"the adapter {label} does not fit this model (read as layout {renamer.layout.name!r}): "
            f"{len(problems)} of {len(stored)} tensors\n  {many or 'it holds none'}"
        )
    return Adapter(label, renamer.layout.name, factors, whole, float(settings.get("lora_dropout") or 0.0))


@torch.no_grad()
def apply_adapter(vlm: VLM, adapter: Adapter) -> None:
    """Put an adapter onto the model, in place. The layers keep their weights; `nn.lora.merge` adds the two."""
    if adapted(vlm):
        raise WeightError(f"this model has an adapter already; merge it before {adapter.label} is added")
    for name, factors in adapter.factors.items():
        layer = attach_one(vlm, name, rank=len(factors.a), scale=factors.scale, dropout=adapter.dropout)
        layer.lora_A.weight.copy_(factors.a)
        layer.lora_B.weight.copy_(factors.b)
    own = dict(vlm.named_parameters())
    for name, tensor in adapter.whole.items():
        own[name].copy_(tensor)


def _read_settings(folder: Path, label: str) -> dict[str, Any]:
    settings = read_json(folder / ADAPTER)
    if settings is None:
        raise WeightError(f"{label} holds no adapter: there is no {ADAPTER}")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise WeightError(f"{label} is an adapter of kind {kind!r}; only LORA is read")
    begun = str(settings.get("init_lora_weights", ""))
    wrong = [name for name in UNSUPPORTED if settings.get(name)]
    wrong += [name for name in settings if name.startswith("alora_") and settings[name]]
    wrong += [f"init_lora_weights: {begun}"] if begun.startswith(CHANGED_BASE) else []
    if wrong:
        raise WeightError(
            f"{label} uses {', '.join(wrong)}, which is more than a change of low rank. Merge it with PEFT "
            "(merge_and_unload), save the whole model, and load that"
        )
    return settings


def _read_stored(folder: Path, label: str) -> dict[str, Tensor]:
    """Every tensor, without PEFT's prefix."""
    stored: dict[str, Tensor] = {}
    for stem in (TENSORS, OTHERS):
        file, pickle = folder / f"{stem}.safetensors", folder / f"{stem}.bin"
        if file.is_file():
            try:
                stored |= load_file(file)
            except (SafetensorError, OSError) as error:
                raise WeightError(f"{file}: cannot be read ({error})") from None
        elif pickle.is_file():
            raise pickles_refused(label, [pickle], "")
        elif stem == TENSORS:
            raise WeightError(f"{label} has {ADAPTER} but no {file.name}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}


def _scale(settings: Mapping[str, Any], layer: str, *, rank: int) -> float:
    """The factor of a layer, whose alpha may differ from the others'."""
    alphas: dict[str, float] = settings.get("alpha_pattern") or {}
    alpha = next((a for key, a in alphas.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
    alpha = settings.get("lora_alpha", 8) if alpha is None else alpha
    return Lora(rank=rank, alpha=alpha, scaling="sqrt_rank" if settings.get("use_rslora") else "rank").scale


def _near(name: str, renamer: Renamer, ours: Iterable[str]) -> str:
    known = [match.source for each in ours for match in [renamer.from_target(each)] if match]
    known += [m.source.removesuffix(".weight") for each in ours for m in [renamer.from_target(f"{each}.weight")] if m]
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"   nearest: {close[0]}" if close else ""


def _sides(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a scalar"
