"""Files of every container with the same records, written as their makers write them."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import toys


def png(seed: int = 0, size: tuple[int, int] = (30, 20)) -> bytes:
    """The bytes of a small picture."""
    out = io.BytesIO()
    toys.picture(size, seed).save(out, "PNG")
    return out.getvalue()


def write_json(path: Path, records: Sequence[Any]) -> Path:
    """A list, indented, or with a name in .jsonl one record in each line."""
    lines = path.suffix == ".jsonl"
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


def write_tar(path: Path, members: Mapping[str, bytes | str | dict[str, Any]]) -> Path:
    """A shard with members by name; an object is written as JSON."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = json.dumps(content) if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
