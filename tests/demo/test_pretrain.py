"""The recipe of the shipped parts, at a few steps: what it feeds, what it writes, and that it can be repeated."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opsin.demo import pretrain, pretrain_language, pretrain_tower, vocabulary
from opsin.demo.drawn import draw
from opsin.demo.fit import Fit
from opsin.demo.labels import patch_labels, typed_picture
from opsin.demo.scene import draw_scene
from opsin.demo.shipped import CHAT, DECODER_FILE, TOWER, TOWER_FILE, config, tokenizer
from opsin.demo.tasks import text_sample
from opsin.media.image import open_image
from opsin.media.prepare import prepare
from opsin.nn.decoder import Decoder
from opsin.nn.vision import VisionTower


def test_pretraining_cuts_pictures_as_the_library_prepares_them() -> None:
    picture = draw(draw_scene(random.Random(3), "train"))
    model = config()
    prepared = prepare(open_image(picture, mode="display"), model.plan(picture.size), model.vision)
    ours = pretrain_tower.to_patches(np.asarray(picture)[None])
    # Both are (x / 255 - mean) / std of the same bytes; one may fold the factors, which moves the last bit or two.
    np.testing.assert_allclose(ours.numpy(), prepared.patches, atol=1e-5)


def test_a_typed_picture_takes_the_slots_of_a_real_one() -> None:
    words, model = tokenizer(), config()
    shown = text_sample(0, 1, "train", num_questions=3)
    turns = [(question.text, question.answer) for question in shown.questions]
    typed = typed_picture(patch_labels(shown.scene), random.Random(0))
    text = pretrain_language.encode(CHAT, pretrain_language.conversation(turns), typed, words)
    assert len(text.patches) == model.plan((TOWER.image_size, TOWER.image_size)).num_slots
    taught = words.decode([token for token, is_taught in zip(text.ids, text.taught, strict=True) if is_taught])
    assert taught == "".join(f" {answer}" for _, answer in turns)


def test_learning_rates_rise_stay_and_fall() -> None:
    run = replace(pretrain_tower.RUN, steps=1000, warmup_steps=100, decay_share=0.4)
    factors = [run.factor(step) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[99] == factors[599] == 1.0
    assert factors[-1] == pytest.approx(1 / 400)


def few_steps(run: Fit) -> Fit:
    return replace(run, steps=3, warmup_steps=1, log_every=1)


def test_a_tower_is_trained_logged_saved_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_tower, "BATCH", 4)
    monkeypatch.setattr(pretrain_tower, "measure", lambda module: {"shapes": 0.5})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pretrain_tower.run(tmp_path / name, seed=1, settings=few_steps(pretrain_tower.RUN))
    first, second = (load_file(tmp_path / name / TOWER_FILE) for name in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    VisionTower(TOWER).load_state_dict(first)
    rows = [json.loads(line) for line in (tmp_path / "one" / "tower.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["shapes"] == 0.5


def test_a_language_model_is_trained_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_language, "BATCH", 2)
    monkeypatch.setattr(pretrain_language, "measure", lambda module, words: {"accuracy": 0.5})
    size = vocabulary.write_tokenizer(tmp_path, vocabulary.vocabulary(vocabulary.sentences()))
    pretrain_language.run(tmp_path, seed=1, settings=few_steps(pretrain_language.RUN))
    saved = load_file(tmp_path / DECODER_FILE)
    decoder = Decoder(config().decoder)
    decoder.load_state_dict(saved)
    assert decoder.embed.weight.shape[0] == size


def test_measuring_asks_each_question_alone() -> None:
    torch.manual_seed(0)
    figures = pretrain_language.measure(pretrain_language.LanguageModel(tokenizer().vocab_size), tokenizer(), count=12)
    assert 0 <= figures["accuracy"] < 0.5  # an untrained model is right by luck at most
    assert set(figures) >= {"accuracy", "colour"}


def test_the_command_makes_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.main(["tokenizer", str(tmp_path / "parts")])
    assert "tokens" in capsys.readouterr().out
    assert (tmp_path / "parts" / "tokenizer.json").exists()
