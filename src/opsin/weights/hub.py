"""Names of models to folders: the shipped model, a local folder, a preset's id, or a repository of the hub."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opsin.errors import OpsinError, UnknownNameError, WeightError, nearest
from opsin.families import SHIPPED, Preset, all_presets, preset, preset_of_hub
from opsin.weights.shipped import is_shipped, shipped_folder

PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
"""What is downloaded. No pickles, no Python: nothing in a repository is ever run."""

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?", re.ASCII)
"""`organisation/name`, optionally `@revision`."""


@dataclass(frozen=True)
class Located:
    """Where a name led."""

    folder: Path
    label: str
    """What to call it in messages: the path, repository@commit, or the shipped model's name."""
    preset: Preset | None = None
    """The preset whose weights these are, where that is known."""


def resolve(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder that holds a model's files, downloaded if need be."""
    return locate(name, revision=revision).folder


def is_preset(name: str) -> bool:
    """Whether a name is a preset's id and not the path of something that exists."""
    return not Path(name).expanduser().exists() and any(each.id == name for each in all_presets())


def locate(name: str | Path, *, revision: str | None = None) -> Located:
    """Find a model: the shipped one by its name, then a folder of that path, then a preset, then a repository.

    A `Path` is always a path, and never the shipped model.

    Raises UnknownNameError with the nearest presets, or WeightError when the repository cannot be had.
    """
    if is_shipped(name):
        return Located(shipped_folder(), SHIPPED)
    path = Path(name).expanduser()
    if path.exists():
        return Located(path, str(path))
    name = str(name)
    if name.startswith((".", "~", os.sep)) or (name.count("/") > 1 and "@" not in name):
        raise WeightError(f"there is no folder {name!r} (working directory: {Path.cwd()})")
    if REPOSITORY.fullmatch(name):
        repository, _, named_revision = name.partition("@")
        return _download(repository, revision or named_revision or None, preset_of_hub(repository))
    try:
        found = preset(name)
    except UnknownNameError:
        ids = [SHIPPED, *(each.id for each in all_presets())]
        raise UnknownNameError(
            f"no model {name!r}{nearest(name, ids)}. Give a folder, a repository such as llava-hf/llava-1.5-7b-hf, or "
            f"one of these: {', '.join(ids)}"
        ) from None
    if not found.hub:
        access = found.access or "It is a size for tests without weights; opsin.weights.build draws random ones"
        raise WeightError(f"preset {name!r} cannot be downloaded. {access}")
    return _download(found.hub[0], revision, found)


def _download(repository: str, revision: str | None, known: Preset | None) -> Located:
    folder = snapshot(repository, revision, PATTERNS, refusal=WeightError)
    # A snapshot's folder is named after its commit.
    return Located(folder, f"{repository}@{folder.name[:7]}", known)


def snapshot(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    kind: Literal["model", "dataset"] = "model",
    refusal: type[OpsinError],
) -> Path:
    """The folder of a repository's files that fit the patterns, downloaded if need be. Raises `refusal`."""
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    label = f"{repository}@{revision}" if revision else repository
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    try:
        return Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=list(patterns)))
    except hub_errors.GatedRepoError:
        raise refusal(f"{label} is gated: accept its terms at {page} and log in with `hf auth login`") from None
    except hub_errors.RevisionNotFoundError:
        raise refusal(f"{repository} has no revision {revision!r}") from None
    except hub_errors.RepositoryNotFoundError:
        raise refusal(
            f"the hub has no repository {repository!r}, or it is private (log in with `hf auth login`)"
            f"{nearest(repository, [name for each in all_presets() for name in each.hub] if kind == 'model' else [])}"
        ) from None
    except hub_errors.HFValidationError as error:
        raise refusal(f"{label!r} is not a name that the hub accepts: {error}") from None
    except Exception as error:  # the client raises types of its HTTP library as well
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        reason = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({type(error).__name__})"
        raise refusal(
            f"{label} is not, or not wholly, in the local cache ({_cache()}), and {reason}. Connect once and load it "
            "again, set HF_HOME to the cache that has it, or give the path of a folder with its files"
        ) from None


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
