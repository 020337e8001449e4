"""Floor 1: one file per family, data that a person reads. Imports `spec` alone, and no torch.

FAMILIES is the whole list; a new family is a new file and one more name in it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from opsin.errors import ConfigError, unknown
from opsin.families._chats import CHATS
from opsin.families._family import Family, HubConfig, Preset, Retrieval, RetrieverPreset
from opsin.families._mix import mix_of, mixed
from opsin.families.blip2 import BLIP2
from opsin.families.internvl15 import INTERNVL15
from opsin.families.llava import LLAVA
from opsin.families.llava15 import LLAVA15
from opsin.families.llava_next import LLAVA_NEXT
from opsin.families.qwen2_vl import QWEN2_VL
from opsin.families.qwen_vl import QWEN_VL
from opsin.spec.chat import ChatFormat
from opsin.spec.model import VLMConfig

FAMILIES: tuple[Family, ...] = (BLIP2, LLAVA, LLAVA15, LLAVA_NEXT, QWEN_VL, INTERNVL15, QWEN2_VL)

MIX = mix_of(FAMILIES)
"""Serves models whose parts belong to different families."""

SHIPPED = "opsin-mini"
"""The model that comes with opsin. It is a folder (`weights.shipped`) and no preset, but known by this name."""

__all__ = [
    "FAMILIES",
    "MIX",
    "SHIPPED",
    "Family",
    "HubConfig",
    "Preset",
    "Retrieval",
    "RetrieverPreset",
    "all_presets",
    "chat",
    "family",
    "family_for_hub",
    "family_of",
    "mix",
    "preset",
    "preset_of_hub",
    "retrieval_for_hub",
    "retriever_preset",
]


def all_presets() -> tuple[Preset, ...]:
    """Every published size of every family."""
    return tuple(preset for each in FAMILIES for preset in each.presets)


def preset(id: str) -> Preset:
    """The preset of that id, tiny ones included.

    Raises UnknownNameError with the nearest ids, and ConfigError for a model that only compares or that is shipped.
    """
    known = {preset.id: preset for preset in (*all_presets(), *(each.tiny for each in FAMILIES))}
    if id in known:
        return known[id]
    comparing = _retrievers()
    if any(id == each.id or id in each.hub for each in comparing):
        raise ConfigError(
            f"{id!r} compares pictures with texts and has no language model: it answers nothing. Use it with "
            "`opsin match`, or opsin.match.load; `opsin show` prints its parts"
        )
    if id == SHIPPED:
        raise ConfigError(
            f"{id!r} is no preset but the folder of a model, which comes with opsin: opsin.weights.describe({id!r}) "
            "gives its config"
        )
    raise unknown("model", id, [*known, SHIPPED, *(each.id for each in comparing)])


def retriever_preset(id: str) -> RetrieverPreset:
    """The model that compares pictures with texts of that id, or in that repository. Raises UnknownNameError."""
    known = {preset.id: preset for preset in _retrievers()}
    found = next((preset for preset in known.values() if id in preset.hub), None) or known.get(id)
    if found is None:
        raise unknown("model that compares pictures with texts", id, known)
    return found


def _retrievers() -> tuple[RetrieverPreset, ...]:
    return tuple(preset for each in FAMILIES if each.retrieval for preset in each.retrieval.presets)


def retrieval_for_hub(hub: HubConfig) -> Retrieval:
    """What reads a published config.json of a model that compares pictures with texts. Raises ConfigError."""
    for each in FAMILIES:
        if each.retrieval is not None and each.retrieval.matches(hub):
            return each.retrieval
    known = ", ".join(each.title for each in FAMILIES if each.retrieval)
    raise ConfigError(
        f"config.json describes a model of type {hub.get('model_type')!r} (architectures "
        f"{hub.get('architectures')!r}), none that compares pictures with texts. Known families of those: {known}"
    )


def preset_of_hub(repository: str) -> Preset | None:
    """The preset that a published repository holds, or None."""
    return next((preset for preset in all_presets() if repository in preset.hub), None)


def family(name: str) -> Family:
    """The family of that name. Raises UnknownNameError with the nearest names."""
    known = {each.name: each for each in FAMILIES}
    if name not in known:
        raise unknown("family", name, known)
    return known[name]


def family_of(config: VLMConfig) -> Family:
    """The family whose parts a config is made of: that of its preset, else the first that accepts it, else MIX."""
    for each in FAMILIES:
        if any(config == preset.config for preset in (*each.presets, each.tiny)):
            return each
    return next((each for each in FAMILIES if each.accepts(config)), MIX)


def _preset_config(id: str) -> VLMConfig:
    return preset(id).config


def mix(
    data: Mapping[str, Any], *, where: str = "mix", config_of: Callable[[str], VLMConfig] = _preset_config
) -> VLMConfig:
    """The config that plain data (YAML) describes, parts of it taken from presets: see `_mix.mixed`.

    config_of: gives the config of a name that parts are taken from.
    """
    if isinstance(chat_name := data.get("chat"), str):
        chat(chat_name)  # names the nearest where there is none
    return mixed(data, where=where, config_of=config_of)


def family_for_hub(hub: HubConfig) -> Family:
    """The family that a published config.json describes. Raises ConfigError where none does."""
    for each in FAMILIES:
        if each.matches(hub):
            return each
    titles = ", ".join(each.title for each in FAMILIES)
    raise ConfigError(
        f"config.json describes a model of type {hub.get('model_type')!r} (architectures "
        f"{hub.get('architectures')!r}), which no family here reads. Known families: {titles}"
    )


def chat(name: str) -> ChatFormat:
    """The chat format of that name. Raises UnknownNameError with the nearest names."""
    if name not in CHATS:
        raise unknown("chat format", name, CHATS)
    return CHATS[name]
