"""Saving adapters in PEFT's layout (see `weights.adapter`), so that `peft` loads them on transformers' model."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from opsin.errors import WeightError
from opsin.nn.lora import A, B, adapted
from opsin.spec.lora import Lora
from opsin.spec.rules import Layout, Split, targets_of
from opsin.weights.adapter import MODULES, PREFIX, TENSORS, Factors
from opsin.weights.config import ADAPTER
from opsin.weights.exporter import to_layout, write_folder
from opsin.weights.init import on_meta
from opsin.weights.loader import Model
from opsin.weights.rules import Renamer, identity


def save_adapter(
    folder: str | Path, model: Model, lora: Lora, *, base: str | None = None, trained: Collection[str] = ()
) -> None:
    """Write the adapters of a model, and the tensors that were `trained` as a whole, with a pointer to the base model.

    lora: their settings. base: folder or repository of the model without them, relative to `folder` where it begins
    with a dot; by default what the model was loaded as. A saved adapter that is already there is replaced.
    """
    folder = Path(folder)
    layers = {
        name: Factors(layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), layer.lora_scale)
        for name, layer in adapted(model.vlm).items()
    }
    if not layers:
        raise WeightError("this model has no adapter to save (nn.lora.attach gives it one)")
    state = {name: tensor.detach() for name, tensor in model.vlm.state_dict().items()}
    plain = list(on_meta(model.config).state_dict())
    layout = module_layout(model.family.layouts(model.config), plain)
    fused = _fuse(layers, Renamer(layout))
    whole = to_layout({name: state[name] for name in _with_siblings(trained, layout)}, layout)
    names = _layout_names(plain, layout)
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.name if base is None else base,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": lora.dropout,
        "r": lora.rank,
        "lora_alpha": _plain_number(lora.alpha),
        "use_rslora": lora.scaling == "sqrt_rank",
        "target_modules": sorted(fused),
        "modules_to_save": whole_modules(whole, names) or None,
        **_patterns(fused, lora),
    }
    tensors = {f"{PREFIX}{layer}.{A}.weight": factors.a for layer, factors in fused.items()}
    tensors |= {f"{PREFIX}{layer}.{B}.weight": factors.b for layer, factors in fused.items()}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}
    tokenizer = model.tokenizer if model.has_tokenizer else None
    write_folder(folder, {f"{TENSORS}.safetensors": tensors}, {ADAPTER: settings}, tokenizer, last=ADAPTER)


def module_layout(layouts: Iterable[Layout], ours: Iterable[str]) -> Layout:
    """The layout whose names an adapter carries: transformers' modules where it has the model; ours for a mix."""
    known = {layout.name: layout for layout in layouts}
    return next((known[name] for name in MODULES if name in known), identity(ours))


def whole_modules(trained: Collection[str], names: Collection[str]) -> list[str]:
    """The largest modules all of whose tensors were trained, as PEFT's `modules_to_save` names them.

    names: every tensor of the model. Lists of layers are no modules to PEFT, so their members are named instead; single
    tensors (a newline, learned queries) are in the file without being named.
    """
    below: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts)):
            below[".".join(parts[:length])].append(name)
    lists = {path.rpartition(".")[0] for path in below if path.rpartition(".")[2].isdecimal()}
    full = {path for path, inside in below.items() if path not in lists and all(name in trained for name in inside)}

    def parents(path: str) -> Iterable[str]:
        while path := path.rpartition(".")[0]:
            yield path

    return sorted(path for path in full if not any(parent in full for parent in parents(path)))


def _fuse(layers: Mapping[str, Factors], renamer: Renamer) -> dict[str, Factors]:
    """Adapters by the layers of a layout, of which one may be several of ours."""
    fused: dict[str, Factors] = {}
    pieces: dict[str, dict[int, Factors]] = defaultdict(dict)
    splits: dict[str, Split] = {}
    for name, factors in layers.items():
        match = renamer.from_target(f"{name}.weight")
        assert match is not None, f"layout {renamer.layout.name!r} has no name for {name!r}"
        source = match.source.removesuffix(".weight")
        if isinstance(match.rule, Split):
            pieces[source][match.piece] = factors
            splits[source] = match.rule
        else:
            fused[source] = factors
    return fused | {source: _stacked(found, splits[source]) for source, found in pieces.items()}


def _stacked(pieces: Mapping[int, Factors], split: Split) -> Factors:
    """One change for a layer that is several of ours: their A on top of one another, each B in its rows and columns.

    Pieces that share one A, because they came from such a layer, share it again.
    """
    parts = list(pieces.values())
    first = parts[0]
    shared = len(parts) > 1 and all(torch.equal(part.a, first.a) and part.scale == first.scale for part in parts)
    rank = len(first.a) if shared else sum(len(part.a) for part in parts)
    b = first.b.new_zeros(split.groups, sum(split.rows), rank)
    column = 0
    for piece, part in pieces.items():
        begin, rows = sum(split.rows[:piece]), split.rows[piece]
        own = part.b if part.scale == first.scale else part.b * (part.scale / first.scale)
        b[:, begin : begin + rows, column : column + len(part.a)] = own.unflatten(0, (split.groups, rows))
        column += 0 if shared else len(part.a)
    a = first.a if shared else torch.cat([part.a for part in parts])
    return Factors(a, b.flatten(0, 1), first.scale)


def _with_siblings(trained: Collection[str], layout: Layout) -> list[str]:
    """Our names of everything that is in one tensor of the layout with something trained."""
    renamer, found = Renamer(layout), dict[str, None]()
    for name in trained:
        match = renamer.from_target(name)
        siblings = renamer.from_source(match.source) if match is not None and len(targets_of(match.rule)) > 1 else ()
        found |= dict.fromkeys([name, *(sibling.target for sibling in siblings)])
    return list(found)


def _layout_names(ours: Iterable[str], layout: Layout) -> set[str]:
    renamer = Renamer(layout)
    return {match.source for name in ours if (match := renamer.from_target(name)) is not None}


def _patterns(fused: Mapping[str, Factors], lora: Lora) -> dict[str, Any]:
    """Ranks and alphas that are not everyone's."""
    ranks = {layer: len(factors.a) for layer, factors in fused.items() if len(factors.a) != lora.rank}
    alphas = {}
    for layer, factors in fused.items():
        usual = lora.replace(rank=len(factors.a))
        if factors.scale != usual.scale:
            alphas[layer] = _plain_number(lora.alpha * factors.scale / usual.scale)
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _plain_number(value: float) -> int | float:
    return int(value) if value == int(value) else value
