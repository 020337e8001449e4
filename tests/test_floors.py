"""The house stands on floors: imports point down only, and what needs no torch does not load it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import opsin

SOURCE = Path(opsin.__file__).parent
FLOORS = {
    "errors": 0,
    "lazy": 0,
    "spec": 0,
    "text": 1,
    "media": 1,
    "nn": 1,
    "families": 1,
    "weights": 2,
    "encode": 3,
    "collate": 3,
    "generate": 4,
    "data": 4,
    "train": 5,
    "match": 5,
    "evaluate": 5,
    "inspect": 5,
    "demo": 5,
    "mini": 5,
    "serve": 5,
    "verify": 5,
    "cli": 6,
    "__init__": 7,  # the public face, which imports what it shows only when it is asked for
}
WITHOUT_TORCH = ("errors", "lazy", "spec", "text", "media", "families")
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(file: Path) -> str:
    """Top-level package or module of a file."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in the file, wherever it stands, relative ones resolved."""
    package = ["opsin", *file.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def parts_imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level part of opsin) of every import from within the library."""
    for line, name in imports(file):
        words = name.split(".")
        if words[0] == "opsin" and len(words) > 1 and words[1] in FLOORS:
            yield line, words[1]


def test_every_part_has_a_floor() -> None:
    assert {part_of(file) for file in FILES} <= FLOORS.keys()


def test_imports_point_down() -> None:
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {target} (floor {FLOORS[target]}) from floor {FLOORS[part]}"
        for file in FILES
        for part in [part_of(file)]
        for line, target in parts_imported(file)
        if FLOORS[target] > FLOORS[part]
    ]
    assert not wrong, "\n".join(wrong)


def test_text_media_nn_and_families_never_import_one_another() -> None:
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {target}"
        for file in FILES
        for part in [part_of(file)]
        if FLOORS[part] == 1
        for line, target in parts_imported(file)
        if FLOORS[target] == 1 and target != part
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_of_one_floor_do_not_import_one_another_in_circles() -> None:
    edges: dict[str, set[str]] = {part: set() for part in FLOORS}
    for file in FILES:
        edges[part_of(file)] |= {target for _, target in parts_imported(file)} - {part_of(file)}
    done: set[str] = set()

    def walk(part: str, path: tuple[str, ...]) -> None:
        assert part not in path, f"circle: {' -> '.join((*path, part))}"
        if part not in done:
            for target in sorted(edges[part]):
                walk(target, (*path, part))
            done.add(part)

    for part in FLOORS:
        walk(part, ())


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_parts_without_torch_do_not_import_it_even_late(part: str) -> None:
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {name}"
        for file in FILES
        if part_of(file) == part
        for line, name in imports(file)
        if name.split(".")[0] in ("torch", "transformers")
    ]
    assert not wrong, "\n".join(wrong)


def test_pictures_are_opened_in_one_place_and_nothing_is_fetched_or_unpickled() -> None:
    """One intake for pictures (media.image), one for files that a run names on web servers (data.remote), and none for
    what can run code or reach the network by itself."""
    forbidden = {"requests", "urllib", "httpx", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "transformers"}
    wrong = []
    for file in FILES:
        wrong += [
            f"{file.relative_to(SOURCE)}:{line} imports {name}"
            for line, name in imports(file)
            if name.split(".")[0] in forbidden
            and not (name.split(".")[0] == "urllib" and file == SOURCE / "data" / "remote.py")
        ]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if call in ("Image.open", "PIL.Image.open", "torch.load", "np.load", "numpy.load"):
                wrong.append(f"{file.relative_to(SOURCE)}:{node.lineno} calls {call}")
    assert not wrong, "\n".join(wrong)


def test_planning_loads_no_torch() -> None:
    """In a fresh process: everything that plans and prepares a picture, without torch."""
    program = (
        "import sys, opsin, opsin.spec, opsin.families, opsin.media, opsin.media.prepare\n"
        "assert opsin.families.preset('llava-1.5-7b').config.plan((640, 480)).num_slots == 576\n"
        "loaded = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
