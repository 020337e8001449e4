"""Run files: finding and reading them, and changing single settings from the command line."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from opsin.errors import ConfigError, UnknownNameError, nearest
from opsin.spec.recipe import MACHINE_KEYS, RunConfig
from opsin.weights.config import read_yaml

RECIPES = Path(str(files("opsin") / "recipes"))
"""Folder of the recipes that ship with the library, one per published stage."""


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the library, such as `llava-1.5/finetune`."""
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A YAML file by its path, or a shipped recipe by its name. Raises UnknownNameError with the nearest names."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = recipe_names()
    if name in known:
        return RECIPES / f"{name}.yaml"
    raise UnknownNameError(
        f"there is no file {name!r} and no recipe of that name{nearest(name, known)}. Recipes: {', '.join(known)}"
    )


def read_run(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run file, with `key=value` overrides such as `stages.0.optim.lr=1e-4` or `stages.finetune.steps=100`."""
    path = find_recipe(name)
    data = read_yaml(path, "a run file: it should hold keys such as model, output and stages")
    for override in overrides:
        apply_override(data, override)
    return RunConfig.parse(data, where=str(path))


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one value of plain data. A stage is meant by its number, from 0, or by its name; the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: key=value is needed, such as stages.0.optim.lr=1e-4")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: the value is not YAML ({getattr(error, 'problem', error)})"
        ) from None
    place: Any = data
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        step = _index(place, part, key)
        # A section that the file leaves out starts empty; whether it may exist is checked with everything else.
        if isinstance(place, dict) and not isinstance(place.get(step), dict | list):
            place[step] = {}
        place = place[step]
        if not isinstance(place, dict | list):
            raise ConfigError(f"override {key!r}: {'.'.join(parents[: depth + 1])} has no settings below it")
    place[_index(place, last, key)] = value


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Settings that decide results and differ, as `key: before -> after`. Both as plain data of a RunConfig."""
    old, new = dict(_flat(before)), dict(_flat(after))
    keys = [key for key in dict.fromkeys((*old, *new)) if key.split(".")[0] not in MACHINE_KEYS]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def to_yaml(config: RunConfig) -> str:
    """The whole config, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _index(place: Any, part: str, key: str) -> str | int:
    if isinstance(place, dict):
        return part
    names = [item.get("name") if isinstance(item, dict) else None for item in place]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    known = [str(name) for name in names if name is not None]
    raise ConfigError(
        f"override {key!r}: no entry {part!r} in a list of {len(place)}{nearest(part, known)}; give its number, from 0"
        + (f", or its name: {', '.join(known)}" if known else "")
    )


def _flat(data: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(data, Mapping) and data:
        items: Iterable[tuple[Any, Any]] = data.items()
    elif isinstance(data, list | tuple) and data:
        items = enumerate(data)
    else:
        yield prefix, data
        return
    for key, value in items:
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
