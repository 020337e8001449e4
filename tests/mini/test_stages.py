"""The recipe of opsin-mini at a few steps: what it feeds, what it writes, and that the result can be talked to."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opsin.demo.drawn import draw
from opsin.demo.fit import Fit
from opsin.demo.scene import COLORS
from opsin.encode import Encoder
from opsin.generate import Chat
from opsin.media.image import open_image
from opsin.media.prepare import prepare
from opsin.mini import connect, labels, language, recipe, ship, tower, words
from opsin.mini.labels import FIELDS, NUM_WAVES, patch_labels
from opsin.mini.model import CHAT, config
from opsin.mini.practice import PRACTICE
from opsin.mini.samples import sample, with_practice
from opsin.mini.talk import conversation, encoded
from opsin.text.tokenizer import load_tokenizer
from opsin.weights import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a recipe of a few steps has put everything."""
    folder = tmp_path_factory.mktemp("mini")
    words.write(folder)

    def few(run: Fit) -> Fit:
        return replace(run, steps=2, warmup_steps=1, log_every=1, measure_every=5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "PATCHES", 600)
        patch.setattr(language, "BATCH", 4)
        patch.setattr(recipe, "SAMPLES", 4)
        for part in (tower, language, connect):
            patch.setattr(part, "measure", lambda *given: {"measured": 1.0}, raising=False)
            part.run(folder, seed=0, settings=few(part.RUN))
        recipe.run(folder, seed=0, steps=2)
        ship.ship(folder)
    return folder


def test_of_what_is_practised_only_what_is_found_is_taught(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(config(tokenizer), tokenizer)
    seen = set()
    for index in range(60):
        one = sample(0, index, "train", num_questions=12, tasks=with_practice(1.0))
        for question in (question for question in one.questions if question.task in PRACTICE):
            seen.add(question.task)
            shown = encoded(replace(one, questions=(question,)), encoder, painted=False)
            taught = tokenizer.decode(shown.ids[shown.supervised].tolist())
            # Of a name the colour says which is meant; the shape follows from it.
            parts = question.told or tuple((name, "") for name, _ in question.boxes)
            words = [" ".join([*given.split()[1:], found]) for given, found in parts]
            if question.boxes:
                assert not set(COLORS) & set(taught.split())
                assert all(word.strip() in taught for word in words)
                assert taught.count("(") == 2 * len(question.boxes)
            else:
                assert taught.split() == (" ".join(words) or question.answer).split()
    assert seen == set(PRACTICE)


def test_pictures_are_cut_as_the_library_prepares_them() -> None:
    scene = next(s for s in (sample(0, n, "train").pictures[0] for n in (1, 2, 3)) if not any(x % 16 for x in s.size))
    picture = draw(scene)
    model = config(load_tokenizer(_tokenizer()))
    plan = model.plan(picture.size)
    prepared = prepare(open_image(picture, mode="display"), plan, model.vision)
    ours = tower.to_patches(np.stack([np.asarray(picture)] * 2))
    np.testing.assert_allclose(ours.numpy(), prepared.patches, atol=1e-5)
    # One row of labels for each slot of the picture.
    codes, numbers = patch_labels(scene).in_blocks()
    assert len(codes) == len(numbers) == plan.num_slots


def test_labels_stand_for_rows() -> None:
    tokenizer = load_tokenizer(_tokenizer())
    encoder, speller = Encoder(config(tokenizer), tokenizer), language.Speller(tokenizer)
    for index in range(30):  # pictures, pairs of pictures and clips
        one = language.labelled(0, index, encoder, speller)
        assert one.shown.codes.shape == (one.encoded.num_image_tokens, 4 * len(FIELDS))
        assert one.shown.waves.shape == (one.encoded.num_image_tokens, NUM_WAVES)
        shown = sample(0, index, "train", num_questions=language.QUESTIONS)
        painted = encoder.encode(conversation(shown), mode="train")
        assert painted.ids.tolist() == one.encoded.ids.tolist()


def test_reaches_lead_from_the_middle_of_a_patch_to_the_sides_of_the_box() -> None:
    pages = tower.batch(0, 3, "train")
    here = pages.codes[:, labels.DOWN] > 0
    far = (pages.reaches(here) + 1) * tower.REACH
    height, width = (pages.grids[0, 1:] * tower.PATCH).tolist()
    sides = pages.numbers[here, 4] * labels.UNIT
    torch.testing.assert_close(far[:, 0] + far[:, 2], sides)
    torch.testing.assert_close(far[:, 1] + far[:, 3], sides)
    left = pages.places[here, 1] * width - far[:, 0]
    torch.testing.assert_close(left, pages.numbers[here, 0] * width, atol=1e-3, rtol=0)
    thirds = (pages.numbers[here][:, [1, 3]].mean(1) * 3).long().clamp(max=2) + 1
    assert torch.equal(thirds, pages.codes[here, labels.DOWN])
    assert height % tower.TOKEN == 0


def test_every_stage_writes_its_part_and_its_log(folder: Path) -> None:
    for name in ("tower", "language", "connect"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        assert len(rows[1]) > len(rows[0])
    start = load_file(folder / connect.START / "model.safetensors")
    assert start["vision.patch.weight"].dtype == torch.float32
    torch.testing.assert_close(start["vision.patch.weight"].half(), load_file(folder / tower.FILE)["patch.weight"])
    trained = load_file(folder / recipe.TRAINED / "model.safetensors")
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    assert {name.split(".")[0] for name in moved} == {"connector", "decoder"}
    shipped = load_file(folder / ship.SHIPPED / "model.safetensors")
    assert all(torch.equal(tensor, trained[name].half()) for name, tensor in shipped.items())


def test_the_trained_model_reads_pictures_and_clips(folder: Path) -> None:
    model = load(folder / ship.SHIPPED)
    picture = sample(0, 4, "train").pictures[0]
    chat = Chat(model)
    assert isinstance(chat.ask("What do you see?", draw(picture)).text, str)
    clip = next(one.clip for one in (sample(0, n, "train") for n in range(40)) if one.clip)
    assert isinstance(Chat(model).ask("What moves?", videos=[tuple(draw(f) for f in clip.frames)]).text, str)


def test_names_and_boxes_are_control_tokens() -> None:
    tokenizer = load_tokenizer(_tokenizer())
    assert CHAT.grounding is not None
    assert set(CHAT.grounding.marks) <= set(tokenizer.controls)
    assert tokenizer.decode(tokenizer.encode("Find the red circle.", "start").ids) == "Find the red circle."
    assert len(tokenizer.encode("Find the red circle.", "start").ids) == 5


def _tokenizer() -> Path:
    return Path(words.__file__).parent.parent / "shipped" / "opsin-mini"
