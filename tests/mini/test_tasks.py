"""opsin-mini's samples: what they show, what is asked, and how answers are scored."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from opsin.demo.drawn import draw
from opsin.demo.labels import ANCHORS
from opsin.demo.scene import COLUMNS, HELDOUT_PAIRS, ROWS, Scene, is_heldout
from opsin.mini import scenes
from opsin.mini.evaluation import heldout, make, shown
from opsin.mini.exercises import EXERCISES
from opsin.mini.labels import ACROSS, ANCHOR, DOWN, NUM_NUMBERS, patch_labels, waves
from opsin.mini.model import PATCH, RESOLUTION, TOKEN, shown_size
from opsin.mini.practice import PRACTICE
from opsin.mini.samples import TELLING, sample
from opsin.mini.talk import conversation
from opsin.mini.tasks import LARGER, TASKS, Sample, box_of

SAMPLES = [sample(0, index, "train") for index in range(400)]
HELDOUT_NAMES = {f"{color} {shape}" for shape, color in HELDOUT_PAIRS}


def test_a_sample_follows_from_its_number() -> None:
    again = sample(0, 7, "train")
    assert again == SAMPLES[7]
    assert sample(1, 7, "train") != again
    assert sample(0, 7, "heldout") != again


def test_training_asks_every_task_and_shows_no_heldout_combination() -> None:
    asked = Counter(question.task for one in SAMPLES for question in one.questions)
    assert set(asked) == {*TASKS, *EXERCISES}
    for one in SAMPLES:
        pictures = [*one.pictures, *(one.clip.frames if one.clip else ())]
        assert not HELDOUT_NAMES & {thing.name for scene in pictures for thing in scene.things}
        for writing in (writing for scene in pictures for writing in scene.writings):
            assert not is_heldout(writing.kind, writing.text)  # type: ignore[arg-type]
        assert not any(name in question.text for question in one.questions for name in HELDOUT_NAMES)


def test_heldout_samples_show_heldout_combinations() -> None:
    shown = [sample(1, index, "heldout") for index in range(60)]
    names = [thing.name for one in shown for scene in one.pictures for thing in scene.things]
    assert sum(name in HELDOUT_NAMES for name in names) > len(names) / 4
    assert all(is_heldout(w.kind, w.text) for one in shown for s in one.pictures for w in s.writings)  # type: ignore[arg-type]


def test_things_do_not_touch_and_stay_inside() -> None:
    for scene in (scene for one in SAMPLES for scene in one.pictures if scene.kind == "objects"):
        for thing in scene.things:
            assert thing.size / 2 <= thing.x <= scene.size[0] - thing.size / 2
            assert thing.size / 2 <= thing.y <= scene.size[1] - thing.size / 2
        for a, b in zip(scene.things, scene.things[1:], strict=False):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2


def test_answers_are_those_of_the_scene() -> None:
    for one in SAMPLES:
        for question in one.questions:
            if question.task == "count" and " shapes" not in f" {question.text}":
                (scene,) = one.pictures
                names = [thing.shape for thing in scene.things]
                group = next(
                    word
                    for word in question.text.rstrip(".?").split()
                    if word.rstrip("es")
                    and word[:-1]
                    in {
                        *names,
                        "circle",
                        "square",
                        "triangle",
                        "diamond",
                        "star",
                        "heart",
                        "ring",
                        "moon",
                        "arrow",
                        "crosse",
                    }
                )
                assert question.answer == str(names.count("cross" if group == "crosses" else group[:-1]))
            if question.task == "value":
                (scene,) = one.pictures
                color = next(bar.color for bar in scene.bars if f" {bar.color} " in question.text)
                assert question.answer == next(str(bar.value) for bar in scene.bars if bar.color == color)
            if question.task == "direction":
                assert one.clip
                first, last = one.clip.frames[0].things[0], one.clip.frames[-1].things[0]
                across, down = scenes.STEPS[one.clip.direction]
                assert (last.x - first.x) * across + (last.y - first.y) * down > 20
                assert question.answer == one.clip.direction


def test_labels_stand_where_things_are() -> None:
    scene = next(one.pictures[0] for one in SAMPLES if one.pictures and len(one.pictures[0].things) > 2)
    labels, (width, height) = patch_labels(scene), shown_size(scene)
    assert labels.grid == (height // PATCH, width // PATCH)
    assert labels.numbers.shape == (*labels.grid, NUM_NUMBERS)
    tokens, _ = labels.in_blocks()
    for thing in scene.things:
        row = int(thing.y * height / scene.size[1] // PATCH)
        column = int(thing.x * width / scene.size[0] // PATCH)
        assert ANCHORS[labels.codes[row, column, ANCHOR]] == thing.shape
        assert (labels.codes[row, column, DOWN] - 1, labels.codes[row, column, ACROSS] - 1) == thing.cell
        left, _, right, _, side = labels.numbers[row, column]
        assert (right - left) * scene.size[0] == pytest.approx(thing.size, rel=1e-5) == side * 40
        # The block that holds this patch is the token that shows it.
        token = tokens[(row // 2) * (width // TOKEN) + column // 2]
        assert ANCHORS[token[(row % 2) * 2 + column % 2, ANCHOR]] == thing.shape


def test_waves_tell_numbers_apart_and_nothing_is_none() -> None:
    numbers = np.full((3, NUM_NUMBERS), 0.5, np.float32)
    numbers[1, 0], numbers[2] = 0.51, 0
    half, near, none = waves(numbers)
    assert 0.5 < np.linalg.norm(half - near) < 0.7
    assert not none.any()


def test_what_tells_much_often_comes_last() -> None:
    last = [sorted(tells) == tells for tells in ([q.task in TELLING for q in one.questions] for one in SAMPLES)]
    assert 200 < sum(last) < 380


def test_exercises_say_what_the_scene_shows() -> None:
    seen = Counter()
    for one in SAMPLES:
        for question in one.questions:
            if question.task not in ("counts", "sizes", "relations"):
                continue
            things = {thing.name: thing for thing in one.pictures[0].things}
            first = next((thing for name, thing in things.items() if name in question.text), None)
            for part in question.answer.rstrip(".").replace(" and ", ", ").split(", "):
                seen[question.task] += 1
                if question.task == "counts":
                    name, number = part.split()
                    shown = [name in (thing.color, thing.shape) for thing in one.pictures[0].things]
                    assert sum(shown) == int(number)
                    continue
                color, shape, said = part.split(" ", 2)
                other = things[f"{color} {shape}"]
                assert first
                if question.task == "sizes":
                    assert (other.size > first.size) == (said == "larger")
                else:
                    dx, dy = other.x - first.x, other.y - first.y
                    far = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}
                    assert far[said] == max(far.values())
    assert min(seen.values()) > 20


def is_said_rightly(task: str, one: Sample, text: str, name: str, said: str) -> bool:
    """Whether a practised answer says of `name` what is so."""
    if task == "pictures":
        shows = [name in {thing.name for thing in scene.things} for scene in one.pictures]
        return said == {(True, False): "first", (False, True): "second", (True, True): "two"}[tuple(shows)]
    if task == "moves":
        assert one.clip
        return said == (one.clip.direction if name == one.clip.mover else "place")
    scenes = one.clip.frames[:1] if one.clip else one.pictures
    everything = [thing for scene in scenes for thing in scene.things]
    if task == "counts":
        return sum(name in (thing.color, thing.shape) for thing in everything) == int(said)
    if task == "colours":
        return [thing.color for thing in everything if thing.shape == name] == [said]
    (thing,) = (thing for thing in everything if thing.name == name)
    other = next((each for each in everything if each.name in text), thing)
    size = scenes[0].size
    row, column = int(3 * thing.y / size[1]), int(3 * thing.x / size[0])
    dx, dy = thing.x - other.x, thing.y - other.y
    if task == "edges":
        side = ("left", "top", "right", "bottom").index(text.split()[3])
        return float(said) == box_of(thing, size).sides[side]
    return {
        "rows": lambda: said == ROWS[row],
        "columns": lambda: said == COLUMNS[column],
        "places": lambda: said == f"{ROWS[row]} {COLUMNS[column]}",
        "across": lambda: said == ("right" if dx > 0 else "left"),
        "down": lambda: said == ("below" if dy > 0 else "above"),
        "widths": lambda: said == str(thing.size),
        "sizes": lambda: said == ("larger" if thing.size > other.size else "smaller"),
        "relations": lambda: {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[said] == max(abs(dx), abs(dy)),
    }[task]()


def is_compared_rightly(scene: Scene, text: str, said: str) -> bool:
    """Whether the thing named first in `text` is as much larger or smaller than the other as is said."""
    first, second = sorted((t for t in scene.things if f" {t.name}" in text), key=lambda t: text.index(t.name))
    by = first.size / second.size
    return by >= LARGER if said == "larger" else said == "smaller" and 1 / by >= LARGER


def test_what_is_practised_is_what_the_scene_shows() -> None:
    seen = Counter()
    for one in (sample(3, index, "train", tasks=PRACTICE) for index in range(200)):
        for question in one.questions:
            if question.told:
                assert question.answer == f"{', '.join(' '.join(part) for part in question.told)}."
                for name, said in question.told:
                    assert is_said_rightly(question.task, one, question.text, name, said), (question, name, said)
                seen[question.task] += len(question.told)
            elif question.task == "compared":
                assert is_compared_rightly(one.pictures[0], question.text, question.answer), question
                seen[question.task] += 1
    assert set(seen) == PRACTICE.keys() - {"outlines", "larger of two"}
    assert min(seen.values()) > 20


def test_a_moving_thing_is_labelled_half_way() -> None:
    clip = scenes.clip(random.Random(3), "train")
    first, second = clip.frames[:2]
    between = clip.between(0)
    assert between.things[0].x == pytest.approx((first.things[0].x + second.things[0].x) / 2)
    assert between.things[1:] == first.things[1:]


def test_pictures_have_the_size_of_their_scene() -> None:
    for one in SAMPLES[:40]:
        for scene in one.pictures:
            assert draw(scene).size == scene.size
            assert np.prod(shown_size(scene)) <= RESOLUTION.max_pixels


def test_a_box_is_told_in_steps() -> None:
    scene = next(one.pictures[0] for one in SAMPLES if one.pictures and one.pictures[0].things)
    for value, side in zip(box_of(scene.things[0], scene.size).sides, scene.size * 2, strict=True):
        assert value % 20 == 0
        assert 0 <= value <= 1000
        assert side > 0


def test_heldout_questions_are_even() -> None:
    items = heldout(20)
    assert Counter(question.task for _, question in items) == dict.fromkeys(TASKS, 20)
    places = Counter(question.answer for _, question in items if question.task == "position")
    assert max(places.values()) <= 3
    index, question = items[0]
    assert question in shown(index).questions
    assert [(each.question, each.reference) for each in make(20).examples] == [(q.text, (q.answer,)) for _, q in items]


def test_a_conversation_shows_pictures_once() -> None:
    two = next(one for one in SAMPLES if len(one.pictures) == 2 and len(one.questions) > 1)
    talk = conversation(two)
    assert [len(message.images) for message in talk.messages[::2]] == [2, *[0] * (len(two.questions) - 1)]
    clip = next(one for one in SAMPLES if one.clip)
    assert len(conversation(clip).videos[0]) == len(clip.clip.frames)  # type: ignore[union-attr, arg-type]
    blank = conversation(replace(two, questions=two.questions[:1]), painted=False)
    assert [picture.size for picture in blank.images] == [scene.size for scene in two.pictures]  # type: ignore[union-attr]
    assert isinstance(two, Sample)
