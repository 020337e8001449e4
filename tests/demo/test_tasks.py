"""Questions: right answers, honest mixture, fair scoring."""

from collections import Counter

import numpy as np

from opsin.demo.scene import COLORS, HELDOUT_PAIRS
from opsin.demo.tasks import TASKS, heldout_questions, is_right, sample, text_sample


def test_a_sample_is_a_function_of_seed_index_and_split() -> None:
    one, same, other = sample(3, 5, "train"), sample(3, 5, "train"), sample(3, 6, "train")
    assert one.questions == same.questions
    assert one.caption == same.caption
    assert np.array_equal(np.asarray(one.picture), np.asarray(same.picture))
    assert one.caption != other.caption
    assert sample(3, 5, "heldout").caption != one.caption


def test_text_samples_equal_painted_ones() -> None:
    for index in range(10):
        painted, text = sample(0, index, "train"), text_sample(0, index, "train", num_questions=8)
        assert (painted.caption, painted.questions) == (text.caption, text.questions)


def test_answers_agree_with_the_scene() -> None:
    for index in range(300):
        shown = text_sample(1, index, "train", num_questions=12)
        scene = shown.scene
        for task, text, answer in shown.questions:
            if task == "total":
                assert answer == str(len(scene.things))
            elif task == "bars":
                assert answer == str(len(scene.bars))
            elif task == "word":
                assert answer in [writing.text for writing in scene.writings]
            elif task == "count":
                thing_names = [f"{thing.color} shapes {thing.shape}s {thing.shape}es" for thing in scene.things]
                group = next(g for g in _groups() if g in text)
                assert answer == str(sum(group in name for name in thing_names))
            elif task == "exists":
                assert answer == ("yes" if any(thing.name in text for thing in scene.things) else "no")
            elif task == "height":
                assert answer == next(str(bar.value) for bar in scene.bars if f"{bar.color} bar" in text)


def _groups() -> list[str]:
    from opsin.demo.phrases import ALL_GROUPS

    return sorted(ALL_GROUPS, key=len, reverse=True)


def test_training_text_never_names_a_held_out_pair() -> None:
    names = [f"{color} {shape}" for shape, color in HELDOUT_PAIRS]
    for index in range(500):
        shown = text_sample(0, index, "train", num_questions=12)
        text = shown.caption + " ".join(f"{question.text} {question.answer}" for question in shown.questions)
        assert not [name for name in names if f"{name} " in f"{text} " or f"{name}?" in text]


def test_always_giving_the_commonest_answer_earns_at_most_a_sixth() -> None:
    questions = heldout_questions(0, per_task=40)
    assert len(questions) == 40 * len(TASKS)
    assert len(TASKS) >= 12
    shares = []
    for task in TASKS:
        answers = Counter(item.question.answer for item in questions if item.question.task == task)
        shares.append(answers.most_common(1)[0][1] / 40)
    assert sum(shares) / len(shares) <= 0.17
    # One task may be a matter of yes or no; no other lets a single answer win half the time.
    assert sorted(shares)[-2] < 0.4


def test_colours_of_shapes_are_asked_about_evenly() -> None:
    answers = Counter(
        question.answer
        for index in range(2000)
        for question in text_sample(0, index, "train", num_questions=8).questions
        if question.task == "colour"
    )
    assert set(answers) == set(COLORS)
    assert max(answers.values()) < 1.6 * min(answers.values())


def test_captions_are_full_sentences_that_name_everything() -> None:
    for index in range(200):
        shown = text_sample(2, index, "train", num_questions=1)
        assert shown.caption[0].isupper() or shown.caption[0].isdigit()
        assert shown.caption.endswith(".")
        assert all(thing.name in shown.caption for thing in shown.scene.things)
        assert all(f" {writing.text} " in shown.caption for writing in shown.scene.writings)
        assert all(f"{bar.color} {bar.value}" in shown.caption for bar in shown.scene.bars)


def test_scoring_forgives_case_articles_and_full_stops_only() -> None:
    assert is_right(" Red.", "red")
    assert is_right("the red  circle", "red circle")
    assert is_right("bake", "BAKE")
    assert is_right("A", "a")
    assert not is_right("red circle", "red")
    assert not is_right("12", "1")
    assert not is_right("", "red")
