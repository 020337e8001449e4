"""Evaluations from beginning to end with answers that are written here: figures, controls, stopping and going on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluations import Puppet, Writer
from opsin.errors import ConfigError, DataError
from opsin.evaluate.compare import compare
from opsin.evaluate.controls import partners
from opsin.evaluate.examples import Example
from opsin.evaluate.identity import described
from opsin.evaluate.run import Evaluation
from opsin.evaluate.tasks import Task, TaskSettings, open_task
from opsin.text.grounding import Box
from opsin.text.messages import Conversation, NamePart, TextPart


def shown(conversation: Conversation) -> str:
    """Name of the picture of a conversation, without its suffix; empty without one."""
    return Path(str(conversation.images[0])).stem if conversation.images else ""


COLOURS = {"a": "red", "b": "blue", "c": "red", "": "red"}


def rows() -> list[dict[str, Any]]:
    """Six questions about three pictures, in two groups."""
    return [
        {"image": f"{name}.png", "question": f"Colour {number}?", "answer": COLOURS[name], "group": group}
        for name in "abc"
        for number, group in enumerate(("easy", "hard"))
    ]


def looks(conversation: Conversation) -> str:
    """Answers by the picture alone."""
    return COLOURS[shown(conversation)]


def figure(results: dict[str, Any], name: str, group: str = "all", control: str = "real") -> float:
    (found,) = [each for each in results["figures"][control] if each["figure"] == name and each["group"] == group]
    return found["value"]


def test_figures_groups_and_controls(write: Writer, folder: Path, tmp_path: Path) -> None:
    task = open_task("exact", data=str(write(*rows())))
    out = tmp_path / "out"
    puppet = Puppet(looks)
    results = Evaluation(task, str(folder), out, controls=["shuffled", "text-only"], load=puppet.load)()
    assert figure(results, "exact match") == 1
    assert figure(results, "exact match", "easy") == figure(results, "exact match", "macro average") == 1
    # Shuffled, each picture is another one: blue is always wrong, and one of the two reds is shown blue.
    assert figure(results, "exact match", control="shuffled") == pytest.approx(1 / 3)
    assert figure(results, "exact match", control="text-only") == pytest.approx(2 / 3)
    assert figure(results, "exact match", control="majority") == pytest.approx(2 / 3)
    assert results["parsers"] == {"exact_match": "words"}
    assert results["bootstrap"]["pictures"] == 3
    assert results["outputs_in_this_run"] == len(puppet.asked) == 18
    assert json.loads((out / "results.json").read_text()) == results
    lines = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    assert lines[0] == {"control": "", "key": "1", "text": "red", "finish": "stop_token", "new_tokens": 3}
    scored = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(scored) == 18
    assert scored[0]["parsed"] == "red"


def test_a_stopped_evaluation_goes_on_where_it_was(write: Writer, folder: Path, tmp_path: Path) -> None:
    task = open_task("exact", data=str(write(*rows())))
    out = tmp_path / "out"
    stopping = Puppet(looks, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(task, str(folder), out, batch_size=2, load=stopping.load)()
    assert len((out / "outputs.jsonl").read_text().splitlines()) == 4
    with (out / "outputs.jsonl").open("a") as file:
        file.write('{"control": "", "key": "5", "te')  # as a crash may leave a line
    going_on = Puppet(looks)
    results = Evaluation(task, str(folder), out, batch_size=2, load=going_on.load)()
    assert len(going_on.asked) == results["outputs_in_this_run"] == 2
    at_once = Evaluation(task, str(folder), tmp_path / "other", batch_size=2, load=Puppet(looks).load)()
    assert results["figures"] == at_once["figures"]
    assert (out / "outputs.jsonl").read_bytes() == (tmp_path / "other/outputs.jsonl").read_bytes()


def test_another_parser_or_grouping_asks_nothing_again(write: Writer, folder: Path, tmp_path: Path) -> None:
    path, out = str(write(*rows())), tmp_path / "out"
    capitals = Puppet(lambda asked: looks(asked).upper())
    first = Evaluation(open_task("exact", data=path), str(folder), out, load=capitals.load)()
    assert figure(first, "exact match") == 0
    task = open_task("exact", data=path, parser="words-ignoring-case", group="question")
    again = Evaluation(task, str(folder), out, load=capitals.load)()
    assert figure(again, "exact match") == 1
    assert again["parsers"] == {"exact_match": "words-ignoring-case"}
    assert figure(again, "exact match", "Colour 0?") == 1
    assert capitals.loaded == 1


def test_other_settings_are_refused_by_name(write: Writer, folder: Path, tmp_path: Path) -> None:
    path, out = str(write(*rows())), tmp_path / "out"
    Evaluation(open_task("exact", data=path), str(folder), out, load=Puppet(looks).load)()
    changed = open_task("exact", data=path, prompt="{} Say one word.", max_new_tokens=4)
    with pytest.raises(
        ConfigError, match=r"other settings: prompt: '\{\}' -> .*decoding.max_new_tokens: 32 -> 4.*--output"
    ):
        Evaluation(changed, str(folder), out)
    with pytest.raises(ConfigError, match="is there and holds no evaluation"):
        Evaluation(changed, str(folder), folder)


def test_a_retrained_model_in_the_same_folder_is_another_one(write: Writer, folder: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(folder, model)
    task, out = open_task("exact", data=str(write(*rows()))), tmp_path / "out"
    Evaluation(task, str(model), out, load=Puppet(looks).load)()
    (file,) = model.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="other settings: model_digest"):
        Evaluation(task, str(model), out)


def test_boxes_are_read_as_the_models_family_writes_them(write: Writer, folder: Path, tmp_path: Path) -> None:
    """llava-1.5 counts on the padded square: a.png is 80x60, so y begins at 10 of 80."""
    path = write(
        {"image": "a.png", "bbox": [20, 15, 40, 30], "ref": "dog"},
        {"image": "a.png", "bbox": [20, 15, 40, 30], "ref": "cat"},
        {"image": "a.png", "bbox": [20, 15, 40, 30], "ref": "cow"},
    )
    said = {
        "dog": "[0.25, 0.31, 0.75, 0.69]",  # (20, 14.8) to (60, 45.2): nearly all of it
        "cat": "[0.25, 0.25, 0.75, 0.75]",  # (20, 10) to (60, 50): 40 * 30 of 40 * 40
        "cow": "somewhere",
    }
    puppet = Puppet(lambda asked: next(text for name, text in said.items() if name in str(asked.messages[0].parts)))
    results = Evaluation(open_task("box", data=str(path)), str(folder), tmp_path / "out", load=puppet.load)()
    assert results["parsers"] == {"iou": "first-box:model (bare, unit of the padded square)"}
    assert figure(results, "acc@0.5") == pytest.approx(2 / 3)
    assert figure(results, "unparsed") == pytest.approx(1 / 3)
    # The same numbers as shares of the picture: (20, 18.6) to (60, 41.4) is 912 of 1200; (20, 15) to (60, 45) is all.
    plain = open_task("box", data=str(path), parser="first-box:unit")
    other = Evaluation(plain, str(folder), tmp_path / "out", load=puppet.load)()
    assert figure(other, "mean IoU") == pytest.approx((912 / 1200 + 1) / 3)
    assert puppet.loaded == 1


def test_a_true_box_outside_its_picture_is_seen_before_anything_is_asked(
    write: Writer, folder: Path, tmp_path: Path
) -> None:
    """Corners taken for sizes: 40 + 60 is more than the 80 px of a.png. A pixel of rounding is cut off."""
    corners = write({"image": "a.png", "bbox": [40, 20, 60, 40], "ref": "x"})
    with pytest.raises(
        DataError, match=r"example 1: its box from \(40, 20\) to \(100, 60\) leaves .*80x60 px.*box: xyxy"
    ):
        Evaluation(open_task("box", data=str(corners)), str(folder), tmp_path / "out")
    rounded = write({"image": "a.png", "bbox": [0, 0, 80.4, 60.3], "ref": "x"})
    puppet = Puppet(lambda asked: "[0, 0, 1, 1]")
    task = open_task("box", data=str(rounded), parser="first-box:unit")
    results = Evaluation(task, str(folder), tmp_path / "out", load=puppet.load)()
    assert figure(results, "mean IoU") == 1


def test_every_other_task_runs(write: Writer, folder: Path, tmp_path: Path) -> None:
    given = {
        "vqa": ({"question": "?", "answers": ["red"] * 3 + ["x"] * 7}, "Red.", "VQA accuracy", 0.9),
        "anls": ({"question": "?", "answer": "rest"}, "test", "ANLS", 0.75),
        "relaxed": ({"question": "?", "answer": "100", "type": "human"}, "96", "relaxed accuracy", 1),
        "choice": ({"question": "?", "options": ["x", "y"], "answer": "B"}, "B.", "accuracy", 1),
        "pope": ({"question": "?", "answer": "yes"}, "Yes.", "F1", 1),
    }
    for name, (row, answer, headline, value) in given.items():
        path = write({"image": "a.png", **row}, {"image": "b.png", **row}, name=f"{name}.jsonl")
        puppet = Puppet(lambda asked, answer=answer: answer)
        results = Evaluation(open_task(name, data=str(path)), str(folder), tmp_path / name, load=puppet.load)()
        assert results["figures"]["real"][0]["figure"] == headline
        assert figure(results, headline) == pytest.approx(value)
        assert ("majority" in results["figures"]) == (name in ("vqa", "choice", "pope"))


def test_captions_are_weighed_by_all_references(write: Writer, folder: Path, tmp_path: Path) -> None:
    path = write({"image": "a.png", "caption": "A cat."}, {"image": "b.png", "caption": "a dog"})
    puppet = Puppet(lambda asked: "a cat")
    results = Evaluation(open_task("captions", data=str(path)), str(folder), tmp_path / "out", load=puppet.load)()
    assert figure(results, "CIDEr-D") == pytest.approx(2.5)  # 5 and 0 (test_captions)
    assert any("comparable only with scores on the same pictures" in note for note in results["notes"])


def test_captions_of_one_picture_alone_cannot_be_weighed(write: Writer, folder: Path, tmp_path: Path) -> None:
    path = write({"image": "a.png", "caption": "A cat."})
    with pytest.raises(DataError, match="needs at least two pictures"):
        Evaluation(open_task("captions", data=str(path)), str(folder), tmp_path / "out")


def test_groups_may_have_metrics_of_their_own(folder: Path, write: Writer, tmp_path: Path) -> None:
    """As for a task that another part of the library makes."""
    write()
    picture = tmp_path / "c.png"
    examples = [
        Example("1", "Colour?", (picture,), reference=("red",), group="colour"),
        Example("2", "Colour?", (picture,), reference=("blue",), group="colour"),
        Example("3", "dog", (picture,), box=Box.of(0, 0, 40, 40), group="place"),
    ]
    settings = TaskSettings(name="toy", metric="exact_match", group_metrics={"place": "iou"}, prompt="{}")
    puppet = Puppet(lambda asked: "[0, 0, 1, 1]" if "dog" in str(asked) else "red")
    results = Evaluation(Task(settings, examples, "1"), str(folder), tmp_path / "out", load=puppet.load)()
    assert figure(results, "exact match", "colour") == 0.5
    assert figure(results, "acc@0.5", "place") == 1
    assert figure(results, "headline", "macro average") == 0.75
    assert not any(each["group"] == "all" for each in results["figures"]["real"])
    # Where things are has no commonest answer, so there is no baseline of both groups.
    assert [(each["group"], each["value"]) for each in results["figures"]["majority"]] == [("colour", 0.5)]
    assert set(results["parsers"]) == {"exact_match", "iou"}


def test_boxes_may_be_asked_for_in_a_sentence(write: Writer, folder: Path, tmp_path: Path) -> None:
    path = write({"image": "a.png", "bbox": [0, 0, 40, 40], "ref": "Where is the dog?"})
    for by_name, kind in ((True, NamePart), (False, TextPart)):
        puppet = Puppet(lambda asked: "nowhere")
        task = open_task("box", data=str(path), prompt="{}", asks_by_name=by_name)
        Evaluation(task, str(folder), tmp_path / str(by_name), load=puppet.load)()
        assert puppet.asked[0].messages[0].parts[1:] == (kind("Where is the dog?"),)


def test_two_results_are_compared_pair_by_pair(write: Writer, folder: Path, tmp_path: Path) -> None:
    task = open_task("exact", data=str(write(*rows())))
    Evaluation(task, str(folder), tmp_path / "one", load=Puppet(looks).load)()
    Evaluation(task, str(folder), tmp_path / "two", load=Puppet(lambda asked: "red").load)()
    found = compare(tmp_path / "one", tmp_path / "two")
    (both,) = [each for each in found.figures if each.group == "all"]
    assert (both.first, both.second, both.number) == (1, pytest.approx(2 / 3), 6)
    assert both.difference == pytest.approx(1 / 3)
    # Of three pictures one differs: a resample may lack it, or hold nothing else.
    assert (both.low, both.high) == (0, 1)
    assert both.p_value == 1  # exchanging one picture gives 1/3 or -1/3
    assert found.notes == ()


def test_only_the_same_examples_are_compared(write: Writer, folder: Path, tmp_path: Path) -> None:
    first = open_task("exact", data=str(write(*rows())))
    second = open_task("exact", data=str(write(*rows()[:4], name="other.jsonl")))
    Evaluation(first, str(folder), tmp_path / "one", load=Puppet(looks).load)()
    Evaluation(second, str(folder), tmp_path / "two", load=Puppet(looks).load)()
    with pytest.raises(DataError, match="are of different examples"):
        compare(tmp_path / "one", tmp_path / "two")
    with pytest.raises(DataError, match="holds no finished evaluation"):
        compare(tmp_path / "one", tmp_path / "nowhere")


def test_shuffled_pictures_are_never_their_own_and_one_for_all_questions_about_one() -> None:
    examples = [Example(str(number), "?", (f"{number // 3}.png",)) for number in range(30)]
    found = partners(examples, seed=0)
    for index, other in enumerate(found):
        assert examples[index].cluster != examples[other].cluster
        assert examples[found[index // 3 * 3]].cluster == examples[other].cluster
    assert {examples[other].cluster for other in found} == {each.cluster for each in examples}
    assert found == partners(examples, seed=0)


def test_what_cannot_be_shuffled_says_so() -> None:
    same = [Example("1", "?", ("a.png",)), Example("2", "?", ("a.png",))]
    with pytest.raises(DataError, match="needs another picture for every example"):
        partners(same, seed=0)
    with pytest.raises(DataError, match="no example shows a picture"):
        partners([Example("1", "?"), Example("2", "?")], seed=0)
    pairs = [replace(each, images=(each.key, "x.png")) for each in same]
    assert partners([*same, Example("3", "?", ("b.png",)), *pairs], seed=0)[:3] == [2, 2, 0]


def test_the_shipped_model_keeps_its_name_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opsin-mini").mkdir()
    assert described("opsin-mini") == "opsin-mini"
    assert described("./opsin-mini") == str(tmp_path.resolve() / "opsin-mini")
