from pathlib import Path

import pytest

from opsin.text.tokenizer import Tokenizer, load_tokenizer
from text.makers import MAKERS, TINY


@pytest.fixture(scope="session", params=[False, True], ids=["not legacy", "legacy"])
def tiny(request: pytest.FixtureRequest) -> Tokenizer:
    """The tiny sentencepiece model."""
    return load_tokenizer(TINY, legacy=request.param)


@pytest.fixture(scope="session", params=MAKERS, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Every kind of tokenizer."""
    return MAKERS[request.param]()


@pytest.fixture(scope="session")
def vicuna_folder(shared: Path) -> Path:
    folder = shared / "tokenizers" / "vicuna"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder
