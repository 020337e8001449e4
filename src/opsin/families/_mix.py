"""Mixes: models of parts that belong to different families, which nobody published."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from opsin.errors import ConfigError
from opsin.families._chats import CHATS, V1
from opsin.families._family import Family, HubFiles, Preset
from opsin.families._parts import CLIP_L_224, LLAMA2_7B
from opsin.spec.connector import Resampler
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import Squash
from opsin.spec.rules import Layout

PARTS = ("vision", "connector", "decoder", "resolution")
TAKEN_FROM = "from"
"""Key of a preset's id in a part of a mix's file."""

TINY = Preset(
    id="mix-tiny",
    config=VLMConfig(
        vision=CLIP_L_224.replace(image_size=28, dim=32, num_layers=2, num_heads=4, mlp_dim=64),
        connector=Resampler(side=2, num_heads=4),
        decoder=LLAMA2_7B.replace(vocab_size=384, dim=48, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96),
        resolution=Squash(tile_size=28),
        chat=V1,
    ),
    parameters=91_680,
    source="made up for tests: CLIP's tower, Qwen-VL's connector, Llama",
)


def mix_of(families: Sequence[Family]) -> Family:
    """What serves a config that none of `families` accepts: our own format only, parts read as any of them does."""

    def part_layouts(config: VLMConfig) -> tuple[Layout, ...]:
        return tuple(layout for family in families for layout in family.part_layouts(config))

    return Family(
        name="mix",
        title="A mix of parts",
        paper="published by nobody",
        presets=(),
        tiny=TINY,
        recipes=(),
        matches=lambda hub: False,
        accepts=lambda config: True,
        chat_for=_unread,
        read=_unread,
        write=_unwritten,
        layouts=lambda config: (),
        part_layouts=part_layouts,
        tower=lambda hub: None,
    )


def mixed(data: Mapping[str, Any], *, where: str, config_of: Callable[[str], VLMConfig]) -> VLMConfig:
    """The config that plain data describes. A part is written out, or taken from a preset and changed:

        vision: llava-1.5-7b
        connector: {kind: resampler, side: 12, num_heads: 32}
        decoder: {from: qwen2-vl-2b, num_layers: 12}
        resolution: {kind: squash, tile_size: 336}
        chat: qwen2_vl

    where: the file, for messages. Raises ConfigError for parts that do not agree, UnknownNameError for presets and chat
    formats that there are not.
    """
    whole = dict(data)
    for part in PARTS:
        value = whole.get(part)
        if isinstance(value, str):
            value = {TAKEN_FROM: value}
        if isinstance(value, Mapping) and TAKEN_FROM in value:
            base = getattr(config_of(str(value[TAKEN_FROM])), part).model_dump(mode="json")
            whole[part] = base | {key: changed for key, changed in value.items() if key != TAKEN_FROM}
    chat = whole.get("chat")
    if isinstance(chat, str) and chat in CHATS:
        whole["chat"] = CHATS[chat]
    return VLMConfig.parse(whole, where=where)


def _unread(*_: Any) -> NoReturn:
    raise ConfigError("a mix of parts is read from opsin's own format only")


def _unwritten(config: VLMConfig, layout: str) -> HubFiles:
    raise ConfigError(
        f"layout {layout!r} cannot hold this model: no published family has connector "
        f"{config.connector.kind!r} and resolution {config.resolution.kind!r} with such a tower and language model. "
        "Save it in opsin's own format (opsin.weights.save_native)"
    )
