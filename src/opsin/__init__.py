"""opsin: published vision-language models from shared parts.

    import opsin

    chat = opsin.chat("llava-hf/llava-1.5-7b-hf")
    print(chat.ask("What is this?", "photo.jpg").text)

    opsin.plan("photo.jpg", model="llava-next-vicuna-7b").num_slots

Importing the package imports neither torch nor any model: everything is looked up when it is asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.families import Preset
    from opsin.generate.sampling import Sampling
    from opsin.generate.session import Chat
    from opsin.media.image import ImageMode, ImageSource
    from opsin.spec.model import VLMConfig
    from opsin.spec.plan import ImagePlan, Size
    from opsin.weights import Model

__all__ = ["__version__", "chat", "load", "plan", "preset"]


def preset(id: str) -> "Preset":
    """A published model's description by its id, such as `llava-1.5-7b`. Raises UnknownNameError with the nearest."""
    from opsin import families

    return families.preset(id)


def plan(
    picture: "ImageSource | Size", *, model: "str | VLMConfig", image_mode: "ImageMode" = "display"
) -> "ImagePlan":
    """How a model would see a picture: canvases, tiles, token slots. Reads the picture's header only.

    picture: a path, bytes, a PIL image, or (width, height). model: a preset's id, opsin-mini, a folder, or a config.
    """
    from opsin.media.image import check_plan, image_size

    if isinstance(picture, tuple):
        size, name = picture, f"{picture[0]}x{picture[1]}"
    else:
        size, name = image_size(picture, mode=image_mode), str(picture)[:80] if isinstance(picture, str | Path) else ""
    if isinstance(model, str):
        from opsin.weights.config import describe_here

        model = describe_here(model)
    planned = model.plan(size)
    check_plan(planned, name=name or "picture")
    return planned


def load(name: str | Path, **options: Any) -> "Model":
    """Load a model: a folder, opsin-mini, a preset or a hub repository. Options are those of `opsin.weights.load`."""
    from opsin import weights

    return weights.load(name, **options)


def chat(model: "str | Path | Model" = "opsin-mini", *, sampling: "Sampling | None" = None, **options: Any) -> "Chat":
    """Start a conversation. `model` is a name as for `load`, or a loaded model; options are those of `generate.Chat`.

    A model loaded here is made ready for this machine (`generate.ready`); one that was loaded before is left as it is.
    """
    from opsin.generate.sampling import Sampling
    from opsin.generate.session import Chat

    if isinstance(model, str | Path):
        from opsin.generate.ready import load_ready

        model = load_ready(model)
    return Chat(model, sampling=sampling or Sampling(), **options)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("opsin")
    raise AttributeError(f"module 'opsin' has no attribute {name!r}")
