"""What a family is: a value made of presets, chat formats, weight rules and the reading of published config files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from opsin.errors import ConfigError
from opsin.spec.base import Spec
from opsin.spec.chat import ChatFormat
from opsin.spec.model import VLMConfig
from opsin.spec.qformer import RetrieverConfig
from opsin.spec.rules import Layout
from opsin.spec.vision import VisionConfig

HubConfig = Mapping[str, Any]
"""A published `config.json`."""

HubFiles = dict[str, dict[str, Any]]
"""File name -> contents of the JSON files that stand beside published weights."""


class Preset(Spec):
    """One published size of a family."""

    id: str
    """What people type, such as `llava-1.5-7b`."""
    config: VLMConfig
    hub: tuple[str, ...] = ()
    """Published repositories that hold exactly this model; the first one is loaded."""
    parameters: int
    """Tensor elements of the checkpoint, the vision tower included."""
    source: str
    """Where the numbers come from."""
    tower_hub: str | None = None
    """Repository of the vision tower, for checkpoints published without it."""
    access: str = ""
    """Why no repository can be loaded as it stands and what to do instead; empty where one can."""
    twin: str | None = None
    """Preset with the same trained weights in another layout."""
    generation: dict[str, float | int | bool] = Field(default_factory=dict)
    """How its published generation_config.json samples answers."""


class RetrieverPreset(Spec):
    """One published model that compares pictures with texts."""

    id: str
    config: RetrieverConfig
    hub: tuple[str, ...] = ()
    """Published repositories that hold exactly this model; the first one is loaded."""
    parameters: int
    """Tensor elements of the whole model, the vision tower included."""
    source: str
    """Where the numbers come from."""
    access: str = ""
    """Why no repository can be loaded as it stands and what to do instead; empty where one can."""


@dataclass(frozen=True, eq=False)
class Retrieval:
    """The models of a family that compare pictures with texts instead of answering."""

    presets: tuple[RetrieverPreset, ...]
    """Every published one."""
    tiny: RetrieverConfig
    """The same parts at a size for tests."""
    matches: Callable[[HubConfig], bool]
    """Whether a published config.json describes one."""
    read: Callable[[HubConfig, HubConfig | None], RetrieverConfig]
    """config.json and, where there is one, preprocessor_config.json, to a config. Raises ConfigError."""
    write: Callable[[RetrieverConfig, str], HubFiles]
    """The JSON files for weights exported in the named layout. Raises ConfigError where the layout cannot say it."""
    layouts: Callable[[RetrieverConfig], tuple[Layout, ...]]
    """Published ways to name the tensors of a whole model."""
    tower_layouts: Callable[[VisionConfig], tuple[Layout, ...]]
    """Ways to name the tensors of a tower in a file of its own."""
    tower: Callable[[HubConfig], str | None]
    """Repository that holds the vision tower, where config.json names one."""
    text_layouts: tuple[Layout, ...]
    """Ways to name the tensors of the language encoder that training starts from."""


def _none(hub: HubConfig) -> None:
    """No repository."""


@dataclass(frozen=True, eq=False)
class Family:
    """A line of models that share a figure. Everything that differs between families is in here, and only here."""

    name: str
    """Identifier, such as `llava_next`."""
    title: str
    """What people call it."""
    paper: str
    """The publication."""
    presets: tuple[Preset, ...]
    """Every published size."""
    tiny: Preset
    """The same parts at a size for tests: random weights, milliseconds on a CPU."""
    recipes: tuple[str, ...]
    """Names of the shipped recipes that train it (`opsin train NAME`), in order of the stages."""
    matches: Callable[[HubConfig], bool]
    """Whether a published config.json describes this family."""
    accepts: Callable[[VLMConfig], bool]
    """Whether a config has this family's parts."""
    chat_for: Callable[[HubConfig], ChatFormat]
    """The chat format that a published config.json implies."""
    read: Callable[[HubConfig, HubConfig | None, ChatFormat], VLMConfig]
    """config.json and, where there is one, preprocessor_config.json, to a config. Raises ConfigError."""
    write: Callable[[VLMConfig, str], HubFiles]
    """The JSON files for weights exported in the named layout. Raises ConfigError where the layout cannot say it."""
    layouts: Callable[[VLMConfig], tuple[Layout, ...]]
    """Published ways to name the tensors of a whole model; the ones that are written come first."""
    part_layouts: Callable[[VLMConfig], tuple[Layout, ...]]
    """Ways to name the tensors of one part in a file of its own: a tower, a language model, a projector."""
    tower: Callable[[HubConfig], str | None]
    """Repository that holds the vision tower, where config.json names one."""
    language: Callable[[HubConfig], str | None] = _none
    """Repository that holds the language model, where config.json names one and the checkpoint may lack it."""
    retrieval: Retrieval | None = None
    """Its models that compare pictures with texts, made of the same parts."""

    def from_hub(
        self, hub: HubConfig, preprocessor: HubConfig | None = None, *, chat: ChatFormat | None = None
    ) -> VLMConfig:
        """The config that published files describe.

        preprocessor: the image processor's file, which decides between crop and pad. chat: the format, where it is
        known better than the files tell.
        """
        try:
            return self.read(hub, preprocessor, chat if chat is not None else self.chat_for(hub))
        except (TypeError, AttributeError, KeyError) as error:
            # Words where numbers belong, lists where tables belong: somebody edited the file.
            raise ConfigError(f"config.json or preprocessor_config.json is malformed: {error}") from error
