"""`opsin export` as a user types it: a run of `opsin train` goes out and answers alike in transformers."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import toys
from opsin import weights
from opsin.cli.app import run as opsin
from opsin.encode import Encoder
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.media.image import open_image
from opsin.text.messages import ask

QUESTION = "What is this?"
NEW = 12


def trained(folder: Path, preset: str, **changes: Any) -> Path:
    """The output of `opsin train` on a tiny preset, in two stages."""
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
            {"name": "tune", "trainable": ["connector", "decoder"], "steps": 12, **stage},
        ],
        **changes,
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
    "preset", ["llava-1.5-tiny", "llava-next-tiny", "blip2-tiny", "qwen2-vl-tiny", "internvl-1.5-tiny"]
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
