"""What a model's folder says about it, without its weights and without torch."""

import json
from pathlib import Path
from typing import Any

import yaml

from opsin.errors import ConfigError, OpsinError, WeightError
from opsin.families import HubConfig, family_for_hub, mix, preset, preset_of_hub
from opsin.spec.model import VLMConfig
from opsin.weights.hub import Located, is_preset, locate
from opsin.weights.shipped import is_here, is_shipped

NATIVE = "opsin.json"
"""Marks a folder whose weights carry our names, and holds the config."""
ADAPTER = "adapter_config.json"
"""Marks a folder that holds an adapter in PEFT's layout."""
FORMAT = 1
"""Version of `opsin.json`."""


def describe(name: str, *, revision: str | None = None) -> VLMConfig:
    """The config of a preset, the shipped model, a folder, a repository, or a YAML file of parts (`families.mix`).

    Nothing is downloaded for a preset; no weights are read.
    """
    if name.endswith((".yaml", ".yml")):
        return mix(
            read_yaml(Path(name).expanduser(), "a model: it should hold vision, connector, ..."),
            where=name,
            config_of=_part_source,
        )
    if is_preset(name):
        return preset(name).config
    located = locate(name, revision=revision)
    while not (located.folder / "config.json").is_file() and (base := adapter_base(located)) is not None:
        located = locate(base)
    return read_config(located)[0]


def describe_here(name: str) -> VLMConfig:
    """The same without a network: a preset, a repository that holds one, or what `is_here`."""
    return describe(name) if is_here(name) else (preset_of_hub(name) or preset(name)).config


def _part_source(name: str) -> VLMConfig:
    """What a mix takes a part from."""
    return describe(name) if is_shipped(name) else preset(name).config


def adapter_base(located: Located) -> str | None:
    """What a folder with an adapter belongs to; None for a folder that holds a model. Raises WeightError."""
    folder = located.folder
    is_model = (folder / NATIVE).is_file() or any(folder.glob("model*.safetensors"))
    if is_model or not (folder / ADAPTER).is_file():
        return None
    base = (read_json(folder / ADAPTER) or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise WeightError(
            f"{located.label} holds an adapter that does not say of which model; give both to opsin merge"
        )
    return str((folder / base).resolve()) if base.startswith(".") else base


def read_config(located: Located) -> tuple[VLMConfig, HubConfig]:
    """The config of a folder, and its config.json where it is in a published layout, else an empty one.

    Raises WeightError where there is no model, ConfigError where its description does not hold together.
    """
    if not located.folder.is_dir():
        raise WeightError(f"{located.label} is a file; give the folder that holds config.json and the weights")
    return (read_native(located), {}) if (located.folder / NATIVE).is_file() else read_published(located)


def read_native(located: Located) -> VLMConfig:
    """The config of a folder in our own format."""
    path = located.folder / NATIVE
    data = read_json(path) or {}
    version = data.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise WeightError(f"{path} has format {version!r}; this opsin reads formats up to {FORMAT}. Update opsin")
    return VLMConfig.parse(data.get("config"), where=str(path))


def read_published(located: Located) -> tuple[VLMConfig, HubConfig]:
    """The config of a folder in a published layout, and its config.json. `auto_map` and its kind are never followed."""
    folder = located.folder
    hub = read_json(folder / "config.json")
    if hub is None:
        raise WeightError(f"{located.label} has neither config.json nor {NATIVE}: it is not a model's folder")
    preprocessor = read_json(folder / "preprocessor_config.json")
    if preprocessor is None:
        # transformers 5 writes one file for the whole processor.
        preprocessor = (read_json(folder / "processor_config.json") or {}).get("image_processor")
    known = located.preset.config.chat if located.preset else None
    try:
        return family_for_hub(hub).from_hub(hub, preprocessor, chat=known), hub
    except OpsinError as error:
        raise type(error)(f"{located.label}: {error}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise WeightError(f"{path} holds {type(data).__name__}, not a table of keys")
    return data


def read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """A YAML file that holds keys. Raises ConfigError with the line for what is not YAML.

    expected: what the file should be, for the message.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not {expected}")
    return data
