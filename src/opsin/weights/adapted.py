"""Loading a folder that holds an adapter: the base that it names, with the adapter merged into it."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsin.errors import OpsinError, WeightError
from opsin.families import chat, family_of
from opsin.nn.lora import merge
from opsin.text.tokenizer import has_tokenizer
from opsin.weights.account import raise_problems
from opsin.weights.adapter import OTHERS, Adapter, apply_adapter, read_adapter
from opsin.weights.config import describe, read_config
from opsin.weights.hub import Located, locate
from opsin.weights.init import on_meta
from opsin.weights.loader import Model, account_part, assign, load, main_dtype, named_dtype, read_tensors


def load_adapted(located: Located, base: str, **options: Any) -> Model:
    """The model of an adapter's folder. options: those of `load`.

    base: a whole model; or, as LLaVA's authors write it, a language model, the folder's config.json being that of the
    whole model.
    """
    missing: tuple[str, ...] = ()
    try:
        if not (located.folder / "config.json").is_file() or _is_model(base):
            model = load(base, **options)
        else:
            model, missing = _around_language_model(located, **{**options, "language": options["language"] or base})
    except OpsinError as error:
        raise type(error)(f"the adapter {located.label} belongs to {base}, which cannot be loaded: {error}") from None
    return merge_adapter(model, located, missing=missing)


def load_adapter(model: Model, name: str | Path) -> Adapter:
    """Put the adapter of a folder or repository beside the weights of a model, in place; `nn.lora.merge` adds it."""
    return _attach(model, locate(name))


def merge_adapter(model: Model, located: Located, *, missing: Collection[str] = ()) -> Model:
    """A model with the adapter of a folder merged into it, in place, and that folder's tokenizer if it has one.

    missing: tensors that the model does not have yet, and that have to come with the adapter.
    """
    adapter = _attach(model, located)
    if left := [name for name in missing if name not in adapter.whole]:
        raise WeightError(
            f"{located.label} lacks {len(left)} tensors that its base has not either, such as {left[0]}. LLaVA's "
            f"authors keep them in {OTHERS}.bin"
        )
    merge(model.vlm)
    has_own = has_tokenizer(located.folder)
    return replace(model, name=located.label, tokenizer_folder=located.folder if has_own else model.tokenizer_folder)


def _attach(model: Model, located: Located) -> Adapter:
    adapter = read_adapter(located.folder, model.vlm, model.family.layouts(model.config), label=located.label)
    apply_adapter(model.vlm, adapter)
    return adapter


def _is_model(name: str) -> bool:
    """Whether a name leads to a model of a family here, and not to a part of one."""
    try:
        describe(name)
    except OpsinError:
        return False
    return True


def _around_language_model(
    located: Located,
    *,
    language: str,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    tower: str | Path | None = None,
    tokenizer: Path | None = None,
    chat_format: str | None = None,
    **_: Any,
) -> tuple[Model, tuple[str, ...]]:
    """The model that the folder's config.json describes, made of a language model and a tower.

    Also the names of the tensors that neither has; they hold nothing yet.
    """
    config, published = read_config(located)
    if chat_format is not None:
        config = config.replace(chat=chat(chat_format))
    vlm, family = on_meta(config), family_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in vlm.state_dict().items()}
    layouts = (*family.layouts(config), *family.part_layouts(config))
    accounts = dict(
        account_part(source, prefix, layouts, shapes, located.label)
        for prefix, source in (("decoder.", language), ("vision.", tower or family.tower(published)))
    )
    raise_problems(accounts)
    kept = main_dtype(next(iter(accounts.values()))) if dtype in (None, "auto") else named_dtype(dtype)
    state: dict[str, Tensor] = {}
    for each in accounts.values():
        state |= read_tensors(each, dtype=kept, device=device)
    missing = tuple(name for name in shapes if name not in state)
    assign(vlm, state | {name: torch.zeros(shapes[name], dtype=kept, device=device) for name in missing})
    folder = tokenizer or locate(language).folder
    return Model(vlm=vlm.eval(), config=config, name=located.label, tokenizer_folder=folder), missing
