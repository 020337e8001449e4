"""A sentencepiece model written as a tokenizer.json gives the ids that were recorded of the published tokenizer."""

import json
from pathlib import Path

import pytest
import tokenizers

from opsin.text._to_json import to_json


@pytest.mark.parametrize("legacy", ["true", "false"])
def test_vicunas_tokenizer_as_json_gives_the_recorded_ids(legacy: str, shared: Path) -> None:
    folder = shared / "tokenizers" / "vicuna"
    files = {
        "tokenizer.model": (folder / "tokenizer.model").read_bytes(),
        "tokenizer_config.json": json.dumps({"legacy": legacy == "true"}).encode(),
    }
    written = tokenizers.Tokenizer.from_str(json.dumps(to_json(files)))
    recorded = json.loads((folder / "tokenizer_facts.json").read_text())[f"ids_legacy_{legacy}"]
    compared = {text: ids for text, ids in recorded.items() if legacy == "true" or not text.startswith(" ")}
    assert len(compared) > 10
    for text, ids in compared.items():
        assert written.encode(text).ids == ids, text
