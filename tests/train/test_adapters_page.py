"""docs/adapters.md is true: its commands run one after the other, and its Python gives what it says."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import toys
from opsin import families, weights
from opsin.cli.app import run as opsin
from opsin.nn.mask import CAUSAL
from opsin.weights import Model, hub

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
PUBLISHED = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: pictures with conversations, a photo, and the published weights, played by a tiny model."""
    folder = tmp_path_factory.mktemp("page")
    records = []
    (folder / "pictures").mkdir()
    for number in range(6):
        toys.picture((40, 30), seed=number).save(folder / "pictures" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "abc" * (number + 1)}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    toys.picture((60, 40)).save(folder / "photo.jpg")
    (folder / "lora.yaml").write_text(PAGE.split("```yaml\n")[1].split("```")[0])
    config = families.preset("llava-1.5-tiny").config
    tokenizer = toys.tokenizer_folder(folder / "tokenizer")
    model = Model(vlm=weights.build(config), config=config, name="tiny", tokenizer_folder=tokenizer)
    weights.export(folder / "published", model)
    return folder


@pytest.fixture
def reader(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def download(repository: str, revision: str | None, known: object) -> hub.Located:
        assert repository == PUBLISHED
        return hub.Located(place / "published", repository)

    monkeypatch.setattr(hub, "_download", download)
    monkeypatch.chdir(place)
    return place


def test_the_page_from_its_first_command_to_its_last_line_of_python(reader: Path, capsys) -> None:
    commands = [line.split("#")[0] for line in PAGE.splitlines() if line.startswith("opsin ")]
    assert len(commands) == 8
    for command in commands:
        assert opsin(shlex.split(command)[1:]) == 0, command
    out = capsys.readouterr().out
    assert "decoder        7,058,231,296     319,815,680" in out
    settings = json.loads((reader / "runs/lora/tune/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == PUBLISHED
    assert settings["modules_to_save"] == ["model.multi_modal_projector"]
    assert "connector, LoRA of rank 16" in (reader / "exported/README.md").read_text()
    assert list((reader / "runs/features").rglob("*.safetensors"))
    pytest.importorskip("peft")
    first, second = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(first.replace(PUBLISHED, str(reader / "published")), "adapters.md", "exec"), names)
    theirs = names["model"].eval()
    exec(compile(second, "adapters.md", "exec"), names)
    merged = weights.load("merged")
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    for vlm in (
        names["model"].vlm,
        merged.vlm,
        *(weights.load(name).vlm for name in ("merged-hf", "exported", "runs/lora/tune")),
    ):
        with torch.no_grad():
            states = vlm.decoder(vlm.decoder.embed(ids), positions=torch.arange(4)[None, :, None], mask=CAUSAL)
            torch.testing.assert_close(vlm.logits(states), wanted, atol=1e-5, rtol=1e-5)


def test_files_and_tests_that_the_page_names_exist() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"\btests/[\w/]+\.py", PAGE)
    assert named
    assert all((root / name).is_file() for name in named)
