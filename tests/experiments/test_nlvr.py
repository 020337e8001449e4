"""The experiment on NLVR: its sentences are true of its pictures, and it runs from end to end on a toy data set."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from experiments.nlvr import data, exercises, labels, language, read, run, scenes, score, sentences  # noqa: E402

sentences.BANK = 600  # enough here, and made in a second
SCENES = [scenes.draw_scene(random.Random(seed)) for seed in range(60)]
NUMBERS = {word: number for number, word in enumerate(sentences.WORDS)} | {str(n): n for n in range(10)}


def test_sentences_that_a_regular_expression_can_check_are_true() -> None:
    pattern = r"there (?:is|are) (no|exactly|at least) ?(\w+)? (black|blue|yellow) (?:block|item|object)s?"
    checked = 0
    for number, scene in enumerate(SCENES):
        for each in sentences.sentences(scene, random.Random(number), 24, slips=0):
            found = re.fullmatch(pattern, each.text)
            if not found:
                continue
            word, amount, color = found.groups()
            wanted = 0 if word == "no" else NUMBERS.get(amount, 1)
            count = sum(item.color == color for item in scene.items)
            assert each.answer == ("yes" if (count >= wanted if word == "at least" else count == wanted) else "no")
            checked += 1
    assert checked > 20


def test_half_of_the_statements_are_true() -> None:
    answers = Counter(
        each.answer
        for number, scene in enumerate(SCENES)
        for each in sentences.sentences(scene, random.Random(number), 16, questions=0)
    )
    assert answers.keys() == {"yes", "no"}
    assert 0.45 < answers["yes"] / answers.total() < 0.55


def test_things_of_a_drawn_box_lie_inside_it_and_apart() -> None:
    for scene in SCENES:
        for box in scene.boxes:
            taken = np.zeros((scenes.BOX, scenes.BOX), np.int64)
            for item in box:
                taken[item.y : item.y + item.size, item.x : item.x + item.size] += 1
            assert taken.sum() == sum(item.size**2 for item in box)
            assert taken.max() == 1


def test_accounts_count() -> None:
    scene = next(scene for scene in SCENES if scene.kind == "scattered")
    facts = labels.row_facts(scene)
    assert facts.shape == (64, labels.NUM_FACTS)
    start = 20  # behind the key: thermometers of how many there are, up to eight
    for place, items in enumerate((*scene.boxes, scene.items)):
        for number, (color, shape) in enumerate(labels.SETS):
            count = sum(color in ("", item.color) and shape in ("", item.shape) for item in items)
            assert facts[labels.PATCHES[place, number], start : start + 8].sum() == min(8, count)
    assert sorted(labels.PATCHES.ravel()) == list(range(64))
    assert labels.patch_facts(scene)[..., 9:12].sum() <= len(scene.items)


def test_facts_of_an_account_are_among_those_that_it_can_have() -> None:
    for scene in SCENES:
        assert not labels.row_facts(scene)[:, 20:][~labels.relevant()[:, 20:]].any()


def test_numbers_in_exercises_are_right() -> None:
    checked = 0
    for number, scene in enumerate(SCENES):
        for exercise in exercises.exercises(scene, random.Random(number), 10):
            if exercise.text != "count":
                continue
            for name, found in exercise.facts:
                if match := re.fullmatch(r"(black|blue|yellow) (?:item|object|block)s", name):
                    assert int(found) == min(9, sum(item.color == match[1] for item in scene.items))
                    checked += 1
    assert checked > 20


def test_only_what_stands_behind_an_equals_sign_and_plain_answers_is_taught(tmp_path: Path) -> None:
    data.write_words(tmp_path, [], scenes=20)
    _, encoder = language.fresh(tmp_path, seed=0)
    encoded = language.encoded([("count", "blue items =2; circles =0"), ("there is a box", "yes")], encoder)
    taught = [encoder.tokenizer.decode([token]) for token in encoded.ids[encoded.supervised].tolist()]
    assert [each.strip() for each in taught[:3]] == ["2", "0", "yes"]
    assert len(taught) == 4  # the end of the last answer


def test_a_drawn_picture_is_read_as_what_was_drawn(tmp_path: Path) -> None:
    for number, scene in enumerate(SCENES[:20]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(scenes.render(scene)).save(path)
        found = read.read_scene(path)
        if scene.kind == "towers":
            assert [[i.color for i in box] for box in found.boxes] == [[i.color for i in box] for box in scene.boxes]
        for box, wanted in zip(found.boxes, scene.boxes, strict=True):
            touching = {i.color for i in wanted if any(_touch(i, j) for j in wanted if j is not i)}
            alone = Counter((i.shape, i.color, i.size) for i in wanted if i.color not in touching)
            assert all(Counter((i.shape, i.color, i.size) for i in box)[key] >= n for key, n in alone.items())


def _touch(a: scenes.Item, b: scenes.Item) -> bool:
    return max(a.x, b.x) <= min(a.x + a.size, b.x + b.size) and max(a.y, b.y) <= min(a.y + a.size, b.y + b.size)


def test_no_sentence_is_asked_about_its_own_picture_in_the_shuffled_control() -> None:
    groups = [str(number // 4) for number in range(40)]
    partners = score.derangement(groups, random.Random(0))
    assert sorted(partners) == list(range(40))
    assert all(groups[number] != groups[partner] for number, partner in enumerate(partners))


def write_toy(folder: Path) -> Path:
    """A data set in the layout of the real one, of drawn pictures."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, scene in enumerate(SCENES[:24]):
        name = f"images/{'test' if number % 3 == 0 else 'dev'}-{number}-0-0.png"
        Image.fromarray(scenes.render(scene)).convert("RGBA").save(folder / name)
        is_true = scene.kind == "towers"
        rows.append(
            {
                "image": name,
                "split": name[7:].split("-")[0],
                "sentence": "There is a Tower.",
                "label": str(is_true).lower(),
            }
        )
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_experiment_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = write_toy(tmp_path / "toy")
    splits = data.read_examples(toy)
    assert len(splits["test"]) == 8
    assert not {each.group for each in splits["train"]} & {each.group for each in splits["choose"]}
    small = ["stages.real.steps=2", "stages.real.batch.samples=2"]
    steps = [f"--{part}-steps=2" for part in ("tower", "language", "connect")]
    run.main([str(toy), str(tmp_path / "out"), *small, *steps, "--pictures", "4"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["rows"].keys() == {"start", "training/real", "text-only/real", "from exact facts, before real"}
    assert results["rows"]["training/real"][0].keys() >= {"own", "shuffled", "blank"}
    assert results["rows"]["training/real"][0]["sentences"] == 8
    assert "training/real, split test" in capsys.readouterr().out
