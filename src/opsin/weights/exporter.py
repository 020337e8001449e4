"""Saving: in our own format, or back in a published layout.

Files are written to a new folder beside the target, made durable, and moved into place in one step, so that a crash or
a full disk leaves what was there before. An export is read back and compared, tensor by tensor, before it is moved.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opsin.errors import WeightError, unknown
from opsin.nn.lora import adapted
from opsin.nn.vlm import VLM
from opsin.spec.base import Spec
from opsin.spec.model import VLMConfig
from opsin.spec.rules import Layout, Reshape, Split
from opsin.text.tokenizer import Tokenizer
from opsin.weights.account import account, choose_layout, raise_problems
from opsin.weights.companions import companions, generation
from opsin.weights.config import FORMAT, NATIVE, read_published
from opsin.weights.files import INDEX, SINGLE, read_headers
from opsin.weights.hub import Located
from opsin.weights.init import on_meta
from opsin.weights.loader import Model, assign, read_tensors
from opsin.weights.rules import Renamer, constant

SHARD_BYTES = 5_000_000_000
"""Largest weight file of an export, the custom of the hub."""

WRITTEN = ("original", "hf", "hf-v5")
"""Layouts that are written; every other one is only read."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote. That it exists means that every tensor was read back equal."""

    folder: Path
    layout: str
    num_tensors: int
    num_bytes: int
    changed: tuple[str, ...]
    """Settings that the layout cannot express, as `field: before -> after`; who loads the export gets the latter."""


def save_native(
    folder: str | Path,
    vlm: VLM,
    config: VLMConfig,
    tokenizer: Tokenizer | None = None,
    *,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `load` reads: `opsin.json`, `model.safetensors` under our names, the tokenizer's files.

    A model that is already there is replaced; other files of the folder stay.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise WeightError(f"{folder} holds a model in a published layout; save into another folder")
    described = {
        "format": FORMAT,
        "written_by": f"opsin {version('opsin')}",
        "config": config.model_dump(mode="json"),
    }
    files = {"generation_config.json": generation} if generation else {}
    write_folder(folder, {SINGLE: _whole_state(vlm, config)}, {**files, NATIVE: described}, tokenizer, last=NATIVE)


def write_folder(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, Mapping[str, Any]],
    tokenizer: Tokenizer | None,
    *,
    last: str,
) -> None:
    """Write tensors, JSON and a tokenizer into a folder that may hold other files, which stay.

    tensors, files: by file name. last: the JSON file without which the folder is nothing, and which is moved last.
    """
    with _staged(folder) as staging:
        for name, state in tensors.items():
            _write_tensors(staging / name, state)
        if tokenizer is not None:
            tokenizer.save(staging)
        for name, content in files.items():
            _write_json(staging / name, content)
        if folder.is_dir() and any(folder.iterdir()):
            _move_into(staging, folder, last)
        else:
            _move_whole(staging, folder)


def export(
    folder: str | Path,
    model: Model,
    *,
    layout: str = "hf",
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> ExportReport:
    """Write a model under published names, with the files that belong to them, and check it.

    layout: `original` for the authors' code, `hf` for transformers, `hf-v5` for the names that its version 5 gives the
    same tensors, where the family has them. card: text of README.md. check: looks at the folder before it is moved into
    place, and raises where something is wrong. Raises ConfigError when the layout cannot hold the
    model, and WeightError when the folder is not empty or what was written does not read back equal.
    """
    if layout not in WRITTEN:
        raise unknown("layout", layout, WRITTEN)
    files: dict[str, Mapping[str, Any] | bytes] = {}
    files |= model.family.write(model.config, layout)  # refuses models that the layout has no words for
    for_hf = layout != "original"
    if answers := generation(model) if for_hf else model.generation:
        files["generation_config.json"] = answers
    if for_hf:
        files |= companions(model)
    if card is not None:
        files["README.md"] = card.encode()
    rules = pick_layout(model.family.layouts(model.config), layout)
    state = to_layout(_whole_state(model.vlm, model.config), rules)
    return write_published(
        Path(folder),
        rules,
        state,
        files,
        tokenizer=model.tokenizer if model.has_tokenizer else None,
        shard_bytes=shard_bytes,
        verify=lambda staging: _verify(staging, model, check),
    )


def pick_layout(layouts: Iterable[Layout], name: str) -> Layout:
    """The layout of that name among those that are written. Raises UnknownNameError."""
    known = {each.name: each for each in layouts if each.name in WRITTEN}
    if name not in known:
        raise unknown("layout", name, known)
    return known[name]


def write_published(
    folder: Path,
    layout: Layout,
    state: dict[str, Tensor],
    files: Mapping[str, Mapping[str, Any] | bytes],
    *,
    tokenizer: Tokenizer | None,
    verify: Callable[[Path], tuple[str, ...]],
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write tensors, tokenizer and other files into a new folder, which `verify` checks before it is moved into place.

    verify: reads the folder back, raises WeightError where it differs, and lists settings that came back otherwise.
    """
    check_target(folder)
    with _staged(folder) as staging:
        _write_shards(staging, state, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(staging)
        for name, content in files.items():
            if isinstance(content, bytes):
                (staging / name).write_bytes(content)
            else:
                _write_json(staging / name, content)
        changed = verify(staging)
        _move_whole(staging, folder)
    return ExportReport(
        folder=folder,
        layout=layout.name,
        num_tensors=len(state),
        num_bytes=sum(tensor.nbytes for tensor in state.values()),
        changed=changed,
    )


def check_target(folder: Path) -> None:
    """Refuse a folder that holds something. Raises WeightError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightError(f"{folder} exists and is not empty; name a new folder")


def with_image_token(model: Model) -> Model:
    """The model with one id more, which means nothing: transformers marks slots by an id, the authors of LLaVA do not.

    Only the two tables are copied.
    """
    rows = model.config.decoder.vocab_size
    config = model.config.replace(decoder=model.config.decoder.replace(vocab_size=rows + 1), image_token_id=rows)
    state = dict(model.vlm.state_dict())
    for name in state.keys() & {"decoder.embed.weight", "decoder.head.weight"}:
        state[name] = F.pad(state[name], (0, 0, 0, 1))
    return remade(model, config, state)


def remade(model: Model, config: VLMConfig, state: dict[str, Tensor]) -> Model:
    """The model with another config and its tensors."""
    vlm = on_meta(config)
    assign(vlm, state)
    return replace(model, vlm=vlm.eval(), config=config)


def _whole_state(vlm: VLM, config: VLMConfig) -> dict[str, Tensor]:
    """Every tensor of a model that is what its config says. Raises WeightError for one that is not."""
    state = {name: tensor.detach() for name, tensor in vlm.state_dict().items()}
    if adapted(vlm):
        raise WeightError("this model has adapters: merge them (opsin.nn.lora.merge), or save_adapter saves them alone")
    wanted = {name: tensor.shape for name, tensor in on_meta(config).state_dict().items()}
    wrong = [name for name, shape in wanted.items() if name not in state or state[name].shape != shape]
    if wrong or len(state) != len(wanted):
        raise WeightError(
            f"this model is not what its config says: {len(wrong)} of {len(wanted)} tensors are missing or of another "
            f"shape ({', '.join(wrong[:3])}). A model that was packed for inference cannot be saved; load it again"
        )
    return state


def to_layout(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors of a model under the names and in the shapes of a published layout."""
    renamer, renamed = Renamer(layout), {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        match = renamer.from_target(name)
        if match is None:
            fill = renamer.fills(name)
            assert fill is not None, f"layout {layout.name!r} has no name for {name!r}"
            if (tensor != fill.value).any():
                raise WeightError(
                    f"layout {layout.name!r} does not store {name!r}, because it is always {fill.value} "
                    f"({fill.reason}); in this model it is not"
                )
        elif isinstance(match.rule, Split):
            parts = pieces.setdefault(match.source, {})
            parts[match.piece] = tensor.detach().unflatten(0, (match.rule.groups, -1))
            if len(parts) == len(match.rule.targets):
                renamed[match.source] = torch.cat([parts[i] for i in sorted(parts)], dim=1).flatten(0, 1)
        else:
            shape = match.rule.source_shape if isinstance(match.rule, Reshape) else tuple(tensor.shape)
            renamed[match.source] = tensor.detach().reshape(shape)
    for name, rule in renamer.constants.items():
        if rule.beside in state:
            renamed[name] = constant(rule, state[rule.beside].dtype)
    return renamed


def _verify(folder: Path, model: Model, check: Callable[[Path], None] | None) -> tuple[str, ...]:
    """Read an export back, compare every tensor bit by bit, and list the settings that came back otherwise."""
    config, _ = read_published(Located(folder, str(folder)))
    verify_tensors(folder, model.family.layouts(config), model.vlm.state_dict())
    if check is not None:
        check(folder)
    return changed_settings(model.config, config)


def verify_tensors(folder: Path, layouts: Iterable[Layout], state: Mapping[str, Tensor]) -> None:
    """Read a folder in a published layout back and compare every tensor bit by bit. Raises WeightError."""
    checkpoint = read_headers(folder, str(folder))
    layout = choose_layout(layouts, checkpoint)
    found = account(checkpoint, layout, {name: tuple(tensor.shape) for name, tensor in state.items()})
    raise_problems({str(folder): found})
    for name, tensor in read_tensors(found, dtype=None, device="cpu").items():
        ours = state[name].cpu()
        if tensor.dtype != ours.dtype or not torch.equal(_bits(tensor), _bits(ours)):
            raise WeightError(f"{name!r} does not read back as it was written; the disk or memory is faulty")


def changed_settings(written: Spec, read: Spec) -> tuple[str, ...]:
    """What a layout had no words for, as `field: before -> after`."""
    before, after = _flat(written.model_dump(mode="json")), _flat(read.model_dump(mode="json"))
    return tuple(
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    )


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals NaN, and 0 is not -0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted path."""
    if not isinstance(data, dict):
        return {path: data}
    return {key: value for name in data for key, value in _flat(data[name], f"{path}.{name}".lstrip(".")).items()}


def _write_shards(folder: Path, state: dict[str, Tensor], limit: int) -> None:
    """One file, or several of at most `limit` bytes (or one tensor) with an index, as the hub expects."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in state.items():
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    if len(shards) == 1:
        _write_tensors(folder / SINGLE, state)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tensors(file: Path, state: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into. Whatever is left of it afterwards is removed."""
    staging = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    try:
        staging.mkdir(parents=True)
        yield staging
    except (OSError, SafetensorError) as error:
        raise WeightError(f"{folder} cannot be written: {error}. Nothing that was there has changed") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_whole(staging: Path, folder: Path) -> None:
    """Make the new folder the target, which is absent or empty."""
    for file in staging.iterdir():
        _flush(file)
    _flush(staging)
    if folder.is_dir():
        folder.rmdir()
    staging.rename(folder)
    _flush(folder.parent)


def _move_into(staging: Path, folder: Path, last: str) -> None:
    """Replace the files of a folder that holds others too, `last` at the end: without it there is no model."""
    old, new = folder / last, staging / last
    for file in staging.iterdir():
        _flush(file)
    try:
        if old.is_file() and old.read_bytes() != new.read_bytes():
            old.unlink()  # so that a crash on the way cannot leave new weights under an old config
        for file in sorted(staging.iterdir(), key=lambda each: each.name == last):
            file.replace(folder / file.name)
        _flush(folder)
    except OSError as error:
        raise WeightError(f"{folder} was replaced only in part: {error}. Save the model again") from None


def _flush(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
