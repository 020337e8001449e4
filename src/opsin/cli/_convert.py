"""`opsin data convert`: any shape in, the neutral form out."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opsin.data.files import FileSource
from opsin.errors import ConfigError, DataError, OpsinError
from opsin.media.source import DEFAULT_LIMITS, read, sniff
from opsin.spec.recipe import DataFile
from opsin.text.record import to_record


def convert_files(files: Sequence[str], to: Path, image_root: str | None) -> tuple[int, int]:
    """Write all records; returns their number and that of pictures that were written beside. Raises at a bad record.

    There is never half a file: it gets its name when it is complete.
    """
    if to.exists():
        raise ConfigError(f"{to} exists already; name a new file")
    if not to.parent.is_dir():
        raise ConfigError(f"there is no folder {str(to.parent)!r}")
    sources = [FileSource.of(DataFile(path=path, image_root=image_root)) for path in files]
    keeper = _Keeper(to)
    temporary = to.with_name(to.name + ".tmp")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as out:
            for source in sources:
                for index in range(len(source)):
                    sample = replace(source.sample(index, 0), id=source.own_id(index))
                    try:
                        record = to_record(sample, place=keeper.place)
                    except OpsinError as error:
                        raise DataError(f"{source.where(index)}: {error}") from None
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    count += 1
        os.replace(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)
    return count, keeper.written


class _Keeper:
    """Says how pictures are named in the new file, and writes down those that are bytes."""

    def __init__(self, to: Path) -> None:
        self.home = to.parent.resolve()
        self.folder = to.with_name(to.stem + "-pictures")
        self.written = 0

    def place(self, source: Any) -> Any:
        """A path as text; a list of paths for the frames of a video."""
        if isinstance(source, tuple):
            return [self.place(frame) for frame in source]
        if isinstance(source, Path) or (isinstance(source, str) and source[:5].lower() != "data:"):
            path = Path(source).resolve()
            return path.relative_to(self.home).as_posix() if path.is_relative_to(self.home) else str(path)
        if isinstance(source, str | bytes):
            return self._write(source)
        raise DataError(f"a picture of type {type(source).__name__} cannot be written down")

    def _write(self, source: str | bytes) -> str:
        data, name = read(source, DEFAULT_LIMITS, "")
        suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind := sniff(data, name), kind.lower())
        file = self.folder / f"{hashlib.sha256(data).hexdigest()[:24]}.{suffix}"
        if not file.exists():
            self.folder.mkdir(exist_ok=True)
            file.write_bytes(data)
            self.written += 1
        return f"{self.folder.name}/{file.name}"
