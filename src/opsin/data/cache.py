"""Where things lie that can be made or fetched again: `OPSIN_CACHE`, `XDG_CACHE_HOME/opsin`, or `~/.cache/opsin`."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for one kind of thing; it need not exist yet. Raises OSError where the user has no home."""
    own, shared = os.environ.get("OPSIN_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).expanduser().absolute() / kind
    if os.path.isabs(shared):  # others are to be ignored (XDG Base Directory Specification)
        return Path(shared) / "opsin" / kind
    try:
        return Path.home() / ".cache" / "opsin" / kind
    except RuntimeError:
        raise FileNotFoundError(0, "there is no home folder; set OPSIN_CACHE") from None


def write_whole(path: Path, text: str) -> None:
    """A file, whole or not there, whoever else writes it at the same time. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
