"""The README is true: its commands run, its links lead somewhere, its figures are those that the programs print."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import toys
from opsin import families, weights
from opsin.cli.app import run as main
from opsin.spec.model import VLMConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every command line of the README's code blocks that begins with opsin."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("opsin ")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's reader has at hand: a photo, the demo's result, published weights in the cache.

    Weights of published sizes are played by the family's tiny model, in the layout that is published.
    """
    monkeypatch.chdir(tmp_path)
    toys.picture((640, 480)).save("photo.jpg")
    shutil.copytree(ROOT / "docs" / "images", "docs/images")
    tokenizer = toys.byte_tokenizer(tmp_path / "tokenizer")

    def save(folder: str, config: VLMConfig) -> Path:
        weights.save_native(tmp_path / folder, weights.build(config), config, tokenizer)
        return tmp_path / folder

    llava15 = save("cache/llava15", families.preset("llava-1.5-tiny").config)
    llava_next = save("cache/llava-next", families.preset("llava-next-tiny").config)
    save("opsin-demo", families.preset("llava-1.5-tiny").config)
    (tmp_path / "opsin-demo/pictures").mkdir()
    toys.picture((96, 96)).save("opsin-demo/pictures/01-colour.png")
    qwen2_vl = save("cache/qwen2-vl", families.preset("qwen2-vl-tiny").config)
    cached = {
        "qwen2-vl-2b-instruct": qwen2_vl,
        "llava-1.5-7b-hf": llava15,
        "llava-hf/llava-v1.6-mistral-7b-hf": llava_next,
    }
    real_load = weights.load

    def load(name: str, **options: object) -> weights.Model:
        return real_load(str(cached.get(name, name)), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "load", load)
    return tmp_path


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(("opsin demo", "opsin serve"))])
def test_commands_of_the_readme_run(
    command: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "typed").write_text("What is this?\n")
    monkeypatch.setattr("sys.stdin", (place / "typed").open())
    assert main(shlex.split(command)[1:]) == 0
    assert any(text.strip() for text in capsys.readouterr())


def test_the_python_of_the_readme_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().splitlines()[-1] == "2340"  # photo.jpg is 640x480, as in the plan it shows


def test_the_first_command_of_the_readme_is_the_demo() -> None:
    first = re.search(r"^python3 -m venv \.venv && (.*)$", README, re.MULTILINE)
    assert first is not None
    assert first[1] == ".venv/bin/pip install . && .venv/bin/opsin demo"


def test_printed_plans_are_what_opsin_plan_prints(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(r"^opsin plan ([^\n]*)\n```\n\n```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert main(["plan", *shlex.split(shown[1])]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line.rstrip() for line in shown[2].splitlines() if line.strip()] == printed


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/families").glob("*.md")), ids=lambda page: page.stem)
def test_tests_and_files_that_a_family_page_names_exist(page: Path) -> None:
    """Names behind a single colon are `test_boxes_of_the_figure_name_code_that_exists`' matter."""
    text = page.read_text()
    proofs = re.findall(r"\b(tests/[\w./-]*\w)(?:::(\w+))?", text)
    assert proofs
    for path, name in proofs:
        assert (ROOT / path).exists(), f"{page.name}: {path}"
        if name:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{page.name}: {path}::{name}"
    for path in re.findall(r"(?<![\w./-])\w+/[\w/]+\.py\b", text):  # a file without a folder may be the authors'
        assert (ROOT / path).exists() or (ROOT / "src/opsin" / path).exists(), f"{page.name}: {path}"


def test_the_family_table_names_every_family_and_its_page() -> None:
    for family in families.FAMILIES:
        assert f"](docs/families/{family.name}.md)" in README, family.name


def test_ci_runs_the_readme_test_command() -> None:
    """`.ci/run` reads the command from the README, so that the two cannot differ."""
    script = (ROOT / ".ci/run").read_text()
    assert "README.md" in script
    after: Callable[[str], str] = lambda text: text.split("<!-- tests -->", 1)[1]  # noqa: E731
    assert re.search(r"^python3 .*pytest -n 2 --dist loadfile$", after(README), re.MULTILINE)
