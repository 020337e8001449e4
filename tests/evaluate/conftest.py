"""Rows in files, and a model folder."""

from pathlib import Path

import pytest

import toys
from evaluations import Writer, writer
from opsin import families, weights


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes rows beside three pictures."""
    return writer(tmp_path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that writes boxes as shares of the padded square."""
    folder = tmp_path_factory.mktemp("model")
    config = families.preset("llava-1.5-tiny").config
    tokenizer = toys.byte_tokenizer(folder / "tokenizer")
    weights.save_native(folder / "tiny", weights.build(config, seed=1), config, tokenizer)
    return folder / "tiny"
