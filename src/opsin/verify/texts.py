"""Recorded texts and their ids, by the published tokenizers that cases name."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from opsin.errors import ConfigError
from opsin.text.render import ControlSpan, Span, TextSpan
from opsin.text.tokenise import tokenise
from opsin.text.tokenizer import Tokenizer, load_tokenizer
from opsin.verify.cases import Case

DEFAULT_TOKENIZER = {"llava": "vicuna", "qwen2_vl": "qwen2"}


def tokenizer_of(case: Case, legacy: bool | None) -> Tokenizer:
    """The tokenizer that the case names: a published one, or one that lies in `tokenizers` beside the case.

    Raises ConfigError where neither folder is there.
    """
    match = re.search(r"tokenizers/([\w.-]+)", str(case.data.get("tokenizer", "")))
    name = match[1] if match else DEFAULT_TOKENIZER[case.family]
    beside = case.folder.parent / "tokenizers"
    for folder in (case.tokenizers or beside, beside):
        if (folder / name).is_dir():
            return _load(folder / name, legacy)
    raise ConfigError(f"no tokenizer {name!r} in {case.tokenizers or beside}: say where it lies with --tokenizers")


@cache
def _load(folder: Path, legacy: bool | None) -> Tokenizer:
    return load_tokenizer(folder, legacy=legacy)


def rows_of(case: Case) -> list[dict[str, Any]]:
    """Rows stand in `case.json` or beside it; there `rows` may be their number."""
    rows = case.data.get("rows")
    return rows if isinstance(rows, list) else case.json("rows.json")


def id_keys(row: dict[str, Any]) -> list[tuple[str, bool | None]]:
    """Where a row's ids stand, and which behaviour of the tokenizer each was recorded with."""
    keys: list[tuple[str, bool | None]] = [
        (f"{name}_legacy_{flag}", flag == "true") for name in ("input_ids", "ids") for flag in ("false", "true")
    ]
    keys += [("input_ids", row.get("legacy")), ("ids", row.get("legacy"))]
    return [(key, legacy) for key, legacy in keys if key in row]


def tokenised(case: Case) -> Iterator[tuple[str, list[int], list[int]]]:
    """(what, our ids, recorded ids) of a case of kind `tokenizer`.

    Control tokens in recorded texts, which that tokenizer recognised, are given to ours as such.
    """
    rows = [] if any(key.startswith("ids_legacy_") for key in case.data) else list(rows_of(case))
    for flag in ("false", "true"):
        texts = case.data.get(f"ids_legacy_{flag}", {})
        rows += [{"text": text, f"ids_legacy_{flag}": ids} for text, ids in texts.items()]
    for number, row in enumerate(rows):
        for key, legacy in id_keys(row):
            tokenizer = tokenizer_of(case, legacy)
            spans = _recognised(row["text"], tokenizer)
            starts_with_bos = bool(spans) and isinstance(spans[0], ControlSpan) and spans[0].token == "<s>"
            if row[key][: 1 + starts_with_bos] == [tokenizer.controls.get("<s>")] * (1 + starts_with_bos):
                spans.insert(0, ControlSpan("<s>", False, "begin"))  # the tokenizer's own, not spelt by the text
            yield f"row {number}: {row['text']!r}, {key}", list(tokenise(spans, tokenizer).ids), row[key]


def _recognised(text: str, tokenizer: Tokenizer) -> list[Span]:
    names = sorted(tokenizer.controls, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return [
        ControlSpan(part, False) if part in tokenizer.controls else TextSpan(part, False, "template")
        for part in parts
        if part
    ]
