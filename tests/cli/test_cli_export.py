"""`opsin export` as a user types it: a run of `opsin train` goes out and answers alike in transformers."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import toys
from opsin import families, weights
from opsin.cli.app import run as opsin
from opsin.encode import Encoder
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.media.image import open_image
from opsin.text.messages import ask

QUESTION = "What is this?"
NEW = 12


def trained(folder: Path, preset: str, **tune: Any) -> Path:
    """The output of `opsin train` on a tiny preset, in two stages. tune: settings of the second."""
    toys.tokenizer_folder(folder / "tokenizer")
    (folder / "images").mkdir()
    records = []
    for number in range(6):
        toys.picture((56, 56), seed=number).save(folder / "images" / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "a bird " * 3}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (folder / "mine.json").write_text(json.dumps(records))
    stage = {
        "data": [{"path": str(folder / "mine.json"), "image_root": str(folder / "images")}],
        "batch": {"samples": 3},
        "optim": {"kind": "adamw", "lr": 3e-3},
    }
    run = {
        "model": preset,
        "init": "random",
        "tokenizer": str(folder / "tokenizer"),
        "output": str(folder / "run"),
        "device": "cpu",
        "stages": [
            {"name": "align", "trainable": ["connector"], "steps": 2, **stage},
            {"name": "tune", "trainable": ["connector", "decoder"], "steps": 12, **stage, **tune},
        ],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    assert opsin(["train", str(folder / "run.yaml")]) == 0
    return folder / "run"


def our_answer(folder: Path, picture: Path) -> str:
    """What opsin says, greedily."""
    model = weights.load(folder)
    prompt = Encoder(model.config, model.tokenizer, image_mode="reference").encode(ask(QUESTION, picture))
    answer = generate(model.vlm, [prompt], None, Sampling(max_new_tokens=NEW, temperature=0.0))[0]
    return model.tokenizer.decode(list(answer.ids))


@torch.inference_mode()
def their_answer(folder: Path, picture: Path) -> str:
    """What transformers says with the folder's own processor, greedily."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()
    opened = open_image(picture, mode="reference").pixels
    messages = [{"role": "user", "content": [{"type": "image", "image": opened}, {"type": "text", "text": QUESTION}]}]
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (ImportError, ValueError):
        inputs = without_torchvision(transformers, folder, messages)
    else:
        if processor.chat_template:
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:  # BLIP-2 has none; OPT's tokenizer begins texts with </s>, the toy does not
            inputs = processor(images=opened, text=f"</s>Question: {QUESTION} Answer:", return_tensors="pt")
    new = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return str(tokenizer.decode(new, skip_special_tokens=True))


def without_torchvision(transformers: Any, folder: Path, messages: list[dict[str, Any]]) -> Any:
    """What processors that know videos do; without torchvision transformers does not make these."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    images = processor(images=[messages[0]["content"][0]["image"]], return_tensors="pt")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if "image_grid_thw" in images:
        mark = "<|image_pad|>"
        written = mark * (int(images["image_grid_thw"].prod()) // processor.merge_size**2)
    else:
        images.pop("num_patches", None)
        mark, known = tokenizer.context_image_token, json.loads((folder / "processor_config.json").read_text())
        slots = mark * (len(images["pixel_values"]) * known["image_seq_length"])
        written = tokenizer.start_image_token + slots + tokenizer.end_image_token
    assert text.count(mark) == 1
    inputs = tokenizer(text.replace(mark, written), return_tensors="pt")
    if "image_grid_thw" in images:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids(mark)).long()
    return {**inputs, **images}


@pytest.mark.parametrize(
    "preset",
    ["llava-tiny", "llava-1.5-tiny", "llava-next-tiny", "blip2-tiny", "qwen2-vl-tiny", "internvl-1.5-tiny"],
)
def test_a_run_goes_to_transformers_and_says_the_same(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run = trained(tmp_path, preset)
    capsys.readouterr()
    assert opsin(["export", str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    out = capsys.readouterr().out
    assert "verified: logits in a fresh process are the model's, largest error 0" in out
    picture = tmp_path / "images" / "1.png"
    assert our_answer(run / "tune", picture) == their_answer(tmp_path / "hf", picture) != ""


def test_exporting_refuses_what_it_cannot_do_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, "llava-1.5-tiny")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    assert opsin(["export", str(run), str(tmp_path / "full")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err

    monkeypatch.setattr("opsin.verify.reload.compare", lambda here, there: float("nan"))
    assert opsin(["export", str(run), str(tmp_path / "wrong")]) == 2
    assert "computes other logits in a fresh process" in capsys.readouterr().err
    monkeypatch.undo()
    assert not (tmp_path / "wrong").exists()
    assert not list(tmp_path.glob(".*"))

    os.rename(run / "tune" / "opsin.json", run / "tune" / "hidden.json")
    assert opsin(["export", str(run), str(tmp_path / "unfinished")]) == 2
    assert "whose last stage, 'tune', has not finished" in capsys.readouterr().err
    assert opsin(["export", str(run / "align"), str(tmp_path / "aligned"), "--to", "original"]) == 0
    assert "verified" in capsys.readouterr().out
    assert not (tmp_path / "aligned" / "chat_template.jinja").exists()
    assert "| tune |" not in (tmp_path / "aligned" / "README.md").read_text()


def test_the_card_has_the_numbers_of_the_run(tmp_path: Path) -> None:
    data = [{"path": str(tmp_path / "mine.json"), "image_root": str(tmp_path / "images")}]
    run = trained(tmp_path, "llava-1.5-tiny", evaluate={"every": 6, "data": data})
    assert opsin(["export", str(run), str(tmp_path / "mine-hf"), "--dtype", "bfloat16"]) == 0
    card = (tmp_path / "mine-hf" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["opsin"]}
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    taught = sum(row["supervised"] for row in rows if row["stage"] == "tune" and "supervised" in row)
    assert f"Last evaluation of tune, after step 12: loss {rows[-1]['evaluation']['loss']:.4g} (6 samples)." in card
    assert f"| tune | connector, decoder | mine.json | 12 | 3 | adamw 0.003 | {taught:,} |" in card
    assert 'from_pretrained("mine-hf"' in card
    assert "## Licence" in card
    assert str(tmp_path) not in card, "a card shows nobody's disk"


def test_a_run_of_adapters_is_exported_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "llava-1.5-tiny", trainable=["connector"], lora={"rank": 4, "alpha": 8})
    assert not (run / "tune" / "opsin.json").exists()
    assert opsin(["export", str(run), str(tmp_path / "hf")]) == 0
    assert "verified" in capsys.readouterr().out
    assert "| tune | connector, LoRA of rank 4 |" in (tmp_path / "hf" / "README.md").read_text()
    picture = tmp_path / "images" / "1.png"
    assert our_answer(run / "tune", picture) == our_answer(tmp_path / "hf", picture)


def test_a_model_without_an_id_for_pictures_gets_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = families.preset("llava-1.5-tiny").config.replace(image_token_id=None)
    tokenizer = toys.byte_tokenizer(tmp_path / "tokenizer")
    weights.save_native(tmp_path / "model", weights.build(preset), preset, tokenizer)
    assert opsin(["export", str(tmp_path / "model"), str(tmp_path / "hf")]) == 0
    assert "one id more, 384, marks pictures" in capsys.readouterr().out
    loaded = weights.load(tmp_path / "hf")
    assert loaded.config.image_token_id == loaded.tokenizer.control_id("<image>") == 384


@pytest.mark.parametrize(("name", "preset"), [("vicuna", "llava-1.5-7b-hf"), ("qwen2", "qwen2-vl-2b-instruct")])
def test_published_tokenizers_read_the_template_as_opsin_does(
    name: str, preset: str, tmp_path: Path, shared: Path
) -> None:
    """The tokenizer of the published sizes, in a model of few and narrow layers."""
    transformers = pytest.importorskip("transformers")
    published, family = families.preset(preset).config, families.family_of(families.preset(preset).config)
    small = family.tiny.config
    ids = {key: getattr(published, key) for key in ("image_token_id", "video_token_id")}
    decoder = small.decoder.replace(vocab_size=published.decoder.vocab_size)
    config = small.replace(decoder=decoder, chat=published.chat, **ids)
    model = weights.Model(weights.build(config), config, preset, tokenizer_folder=shared / "tokenizers" / name)
    weights.export(tmp_path / "hf", model)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    content = [{"type": "image"}, {"type": "text", "text": "What is this, \u00e9t\u00e9?"}]
    text = theirs.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    sample = Encoder(config, model.tokenizer).encode(ask(content[1]["text"], toys.picture((56, 56))))
    ours = [token for place, token in enumerate(sample.ids.tolist()) if place not in sample.slots[1:].tolist()]
    assert theirs(text)["input_ids"] == ours


def test_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.rename(trained(tmp_path, "llava-1.5-tiny"), tmp_path / "mine")
    (tmp_path / "runs").mkdir()
    os.rename(tmp_path / "mine", tmp_path / "runs" / "mine")
    os.symlink(tmp_path / "runs" / "mine" / "tune", tmp_path / "opsin-demo")
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    commands = re.findall(r"^(opsin export [^#\n]*)", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert opsin(shlex.split(command)[1:]) == 0, command
