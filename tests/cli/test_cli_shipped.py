"""The shipped model on the command line, and how the words after `opsin chat` are told apart."""

import json
from pathlib import Path

import pytest

import mixes
from opsin.cli._words import Words, read_words
from opsin.errors import ConfigError
from shipped import put_in_place, write_shipped


@pytest.fixture(scope="session")
def shipped_folder(tmp_path_factory) -> Path:
    return write_shipped(tmp_path_factory.mktemp("shipped") / "opsin-mini")


@pytest.fixture
def mini(shipped_folder, monkeypatch) -> Path:
    put_in_place(monkeypatch, shipped_folder)
    return shipped_folder


@pytest.fixture
def here(tmp_path, monkeypatch, pictures) -> Path:
    """A working directory with two pictures, a video's beginning, and a folder of a model."""
    monkeypatch.chdir(tmp_path)
    for name, source in (("a.png", "good.png"), ("b.jpg", "tall.jpg"), ("noending", "good.png")):
        (tmp_path / name).write_bytes((pictures / source).read_bytes())
    (tmp_path / "clip.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(100))
    (tmp_path / "model").mkdir()
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], Words()),
        (["a.png"], Words(images=["a.png"])),
        (["a.png", "What is it?"], Words(images=["a.png"], prompt="What is it?")),
        (["a.png", "Describe"], Words(images=["a.png"], prompt="Describe")),
        (["noending", "b.jpg", "Which?"], Words(images=["noending", "b.jpg"], prompt="Which?")),
        (["clip.mp4", "a.png", "What?"], Words(images=["a.png"], videos=["clip.mp4"], prompt="What?")),
        (["What is it?"], Words(prompt="What is it?")),
        (["What is in a.png?", "a.png"], Words(images=["a.png"], prompt="What is in a.png?")),
        (["这是什么"], Words(prompt="这是什么")),
        (["word " * 3000], Words(prompt="word " * 3000)),
        (["opsin-mini", "Describe"], Words(prompt="Describe")),
        (["model"], Words("model")),
        (["model", "Describe"], Words("model", prompt="Describe")),
        (["./model", "a.png", "What?"], Words("./model", images=["a.png"], prompt="What?")),
        (["model", "What?", "a.png"], Words("model", images=["a.png"], prompt="What?")),
        (["llava-1.5-7b", "Hi"], Words("llava-1.5-7b", prompt="Hi")),
        (["llava-hf/llava-1.5-7b-hf@main"], Words("llava-hf/llava-1.5-7b-hf@main")),
    ],
)
def test_files_are_shown_the_first_other_name_is_the_model_the_rest_is_the_question(words, found):
    assert read_words(words) == found


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dog.png", "What?"], "no folder 'dog.png' with a model, and no picture or video of that name"),
        (["./dog", "What?"], "no folder './dog' with a model, and no picture or video of that name"),
        (["pets/dog.JPG"], "no folder 'pets/dog.JPG' with a model, and no picture or video of that name"),
        (["a.png", "dog.png"], "no picture or video 'dog.png'"),
        (["a.png", "model", "What?"], "'model' is a folder: the model stands first"),
        (
            ["a.png", "llava-1.5-7b", "What?"],
            r"'What\?' is one word too many: the model is 'opsin-mini', the question 'llava-1.5-7b'",
        ),
        (["model", "What", "is", "it?"], "'is' is one word too many.*in quotes"),
    ],
)
def test_words_that_mean_nothing_are_told_what_they_could_have_been(words, message):
    with pytest.raises(ConfigError, match=message):
        read_words(words)


def test_a_file_called_like_the_model_is_shown_where_it_is_a_path(here):
    (here / "a.png").rename(here / "opsin-mini")
    assert read_words(["opsin-mini", "What?"]) == Words(prompt="What?")
    assert read_words(["./opsin-mini", "What?"]) == Words(images=["./opsin-mini"], prompt="What?")


@pytest.mark.usefixtures("mini", "here")
def test_a_picture_and_a_question_are_answered_without_naming_a_model(opsin):
    short = opsin("chat", "a.png", "b.jpg", "What?", "--max-new-tokens", 3, "--json")
    assert short.code == 0, short.err
    found = json.loads(short.out)
    assert found["model"] == "opsin-mini"
    assert [each["picture"] for each in found["pictures"]] == ["a.png", "b.jpg"]
    options = ("-i", "b.jpg", "--max-new-tokens", 3)
    for words in (("a.png", "What?"), ("opsin-mini", "a.png", "What?")):
        assert opsin("chat", *words, *options).out == found["text"] + "\n"
    asked = opsin("chat", "What is it?", "-i", "a.png", "--max-new-tokens", 3, "--json")
    assert json.loads(asked.out)["model"] == "opsin-mini"


@pytest.mark.usefixtures("mini", "here")
def test_without_words_one_talks_with_it(converse, opsin):
    done = converse(["/image a.png", "What?"], "--max-new-tokens", 3)
    assert (done.code, done.err) == (0, "")
    assert done.out == opsin("chat", "a.png", "What?", "--max-new-tokens", 3).out
    assert converse(["What?"], "a.png", "--max-new-tokens", 3).out == done.out


@pytest.mark.usefixtures("here")
def test_a_name_that_is_neither_model_nor_picture_is_one_error_with_both(opsin):
    message = opsin("chat", "opsin-mimi", "What?").refused()
    assert "no model 'opsin-mimi' (did you mean 'opsin-mini'?)" in message
    assert "Nor is there a picture or video 'opsin-mimi'" in message
    assert "no folder 'dog.png' with a model, and no picture" in opsin("chat", "dog.png", "What?").refused()


def test_a_file_that_is_no_picture_says_what_it_is(opsin, here):
    (here / "notes.txt").write_text("some words\n")
    assert "not a picture" in opsin("chat", "notes.txt", "What?").refused()


@pytest.mark.usefixtures("here")
def test_every_verb_says_where_it_is_missing(opsin, monkeypatch, tmp_path):
    put_in_place(monkeypatch, tmp_path / "nothing")
    for command in (
        ("chat", "a.png", "What?"),
        ("chat",),
        ("show", "opsin-mini"),
        ("plan", "64x64", "-m", "opsin-mini"),
        ("export", "opsin-mini", "out"),
        ("match", "a.png", "a cat", "-m", "opsin-mini"),
    ):
        assert "opsin-mini comes with opsin, but this installation lacks" in opsin(*command).refused()


@pytest.mark.usefixtures("mini", "here")
def test_it_is_shown_and_planned_and_compares_nothing(opsin):
    shown = opsin("show", "opsin-mini", "--image", "a.png")
    assert shown.code == 0, shown.err
    assert "patch_merger" in shown.out
    planned = opsin("plan", "64x64", "--model", "opsin-mini", "--json")
    assert json.loads(planned.out)[0]["text_tokens_from"] == "tokenizer"
    assert "`opsin chat`" in opsin("match", "a.png", "a cat", "-m", "opsin-mini").refused()


@pytest.mark.usefixtures("mini", "here")
def test_it_is_exported_and_verified_like_any_other(opsin, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    done = opsin("verify", "opsin-mini", "--json")
    assert done.code == 0, done
    assert "by way of an export" in done.out
    assert opsin("export", "opsin-mini", tmp_path / "out").code == 0


def test_verify_says_that_a_mix_has_nothing_to_be_compared_with(opsin, monkeypatch, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    put_in_place(monkeypatch, write_shipped(tmp_path / "mix", mixes.MIXES["mix-native-mlp-llama"]))
    message = opsin("verify", "opsin-mini").refused()
    assert "transformers cannot hold opsin-mini" in message
    assert "a mix of parts (connector mlp, resolution native)" in message
    assert "opsin verify --tiny" in message
