"""Options and fixtures that every folder of tests may use."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Asserts of helper modules are to show their values like those of tests; this must stand before they are imported.
pytest.register_assert_rewrite("parity")

from parity.case import SHARED  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("opsin")
    group.addoption(
        "--goldens",
        action="append",
        metavar="DIR",
        help="folder searched for case.json files, may be repeated (default: tests/goldens and ../shared/goldens)",
    )
    group.addoption(
        "--tokenizers",
        metavar="DIR",
        help="folder with published tokenizers, one folder each (default: ../shared/tokenizers)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, unless marks are asked for (`-m slow`)."""
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_collection_finish(session: pytest.Session) -> None:
    """One thread, so that sums are taken in the same order everywhere. Runs without torch must stay without it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_reaches_the_tests() -> Iterator[None]:
    """A shell that starts the tests in the background (`pytest &`) has them ignore Ctrl-C, which some of them press."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test fetches or works out is left in the user's cache, or found there."""
    before = os.environ.get("OPSIN_CACHE")
    os.environ["OPSIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["OPSIN_CACHE"]
    else:
        os.environ["OPSIN_CACHE"] = before


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository that holds goldens, tokenizers and data; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: this test needs the shared data beside the repository")
    return SHARED
