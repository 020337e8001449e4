"""Finds the recorded cases and hands them to the tests that ask for `golden`."""

from pathlib import Path

import pytest

from parity.case import ROOT, SHARED, find_cases

DEFAULT_FOLDERS = (ROOT / "tests" / "goldens", SHARED / "goldens")


def _folders(config: pytest.Config) -> list[Path]:
    given = config.getoption("--goldens")
    if not given:
        return [folder for folder in DEFAULT_FOLDERS if folder.is_dir()]
    folders = [config.invocation_params.dir / folder for folder in given]
    for folder in folders:
        if not folder.is_dir():
            raise pytest.UsageError(f"--goldens {folder} is not a folder")
    return folders


def _label(folder: Path, roots: list[Path]) -> str:
    for root in roots:
        if folder.is_relative_to(root):
            return folder.relative_to(root).as_posix()
    return folder.as_posix()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        roots = _folders(metafunc.config)
        found = find_cases(roots)
        if not found:
            raise pytest.UsageError(f"no case.json below {', '.join(map(str, roots)) or 'tests/goldens'}")
        metafunc.parametrize("golden", found, ids=[_label(folder, roots) for folder in found])


@pytest.fixture(scope="session")
def tokenizers(pytestconfig: pytest.Config) -> Path:
    """Folder of published tokenizers; it may not exist."""
    given = pytestconfig.getoption("--tokenizers")
    return pytestconfig.invocation_params.dir / given if given else SHARED / "tokenizers"
