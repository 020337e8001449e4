"""`opsin chat`: one question or many, and everything that people type wrongly."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from opsin.cli.chat import printable


def answered(done):
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_one_question_is_answered_on_standard_output(opsin, model, pictures):
    done = opsin("chat", model, "What is it?", "--image", pictures / "good.png", "--max-new-tokens", 12)
    assert done.code == 0
    assert done.err == "", "remarks are for terminals"
    as_json = answered(
        opsin("chat", model, "What is it?", "-i", pictures / "good.png", "--max-new-tokens", 12, "--json")
    )
    assert done.out == as_json["text"] + "\n"


def test_json_holds_the_answer_and_what_it_took(opsin, model, pictures):
    images = [pictures / "good.png", pictures / "tall.jpg"]
    found = answered(opsin("chat", model, "Compare", "-i", images[0], "-i", images[1], "--max-new-tokens", 5, "--json"))
    plans = {row["picture"]: row for row in json.loads(opsin("plan", *images, "-m", model, "--json").out)}
    assert [picture["picture"] for picture in found["pictures"]] == [str(image) for image in images]
    for picture in found["pictures"]:
        planned = plans[picture["picture"]]
        assert (picture["tokens"], picture["tiles"]) == (planned["tokens"], planned["tiles"])
        assert picture["size"] == [planned["width"], planned["height"]]
    usage = found["usage"]
    assert usage["image_tokens"] == sum(picture["tokens"] for picture in found["pictures"])
    assert usage["prompt_tokens"] == usage["text_tokens"] + usage["image_tokens"]
    assert 1 <= usage["new_tokens"] <= 5
    assert found["finish"] in ("stop_token", "length")
    assert found["model"] == str(model)


def test_a_seed_repeats_an_answer(opsin, model):
    def answer(seed):
        options = ("--temperature", 1.0, "--top-p", 0.95, "--top-k", 50, "--seed", seed, "--max-new-tokens", 12)
        return opsin("chat", model, "Hello", *options).out

    assert answer(1) == answer(1) != answer(2)


def test_questions_can_be_piped_in(converse, model, pictures):
    lines = [
        "Hello",
        f"/image {pictures / 'good.png'}",
        "And this?",
        "",
        "Sure?",
        "/reset",
        "Hello",
        "/quit",
        "not this",
    ]
    done = converse(lines, model, "--max-new-tokens", 6)
    assert (done.code, done.err) == (0, "")
    answers = done.out.split("\n")
    assert answers.pop() == ""
    assert answers[0] == answers[-1], "after /reset the first question gets the first answer"


def test_pictures_given_at_the_start_stand_in_the_first_question(converse, opsin, model, pictures):
    options = ("--image", pictures / "good.png", "-i", pictures / "tall.jpg", "--max-new-tokens", 6)
    piped = converse(["What?"], model, *options)
    assert piped.out == opsin("chat", model, "What?", *options).out
    assert piped.code == 0


def test_an_error_in_a_conversation_ends_only_its_turn(converse, model, pictures):
    lines = [
        "/imag x",
        f"/image {pictures / 'nothing.png'}",
        "/image",
        "/video clip.mp4",
        f"/image {pictures / 'cut.jpg'}",
        "What?",
        "Hello",
    ]
    done = converse(lines, model, "--max-new-tokens", 6)
    assert done.code == 0
    errors = done.err.splitlines()
    assert len(errors) == 5
    assert all(error.startswith("error: ") for error in errors)
    assert "no command '/imag' (did you mean '/image'?)" in errors[0]
    assert "nothing.png" in errors[1]
    assert "needs the path of a picture" in errors[2]
    assert "reads pictures only" in errors[3]
    assert "cut.jpg" in errors[4]
    assert len(done.out.splitlines()) >= 1, "the last question is answered, without the broken picture"


def test_help_lists_the_commands(converse, model):
    done = converse(["/help"], model)
    for command in ("/image", "/video", "/reset", "/help", "/quit"):
        assert command in done.err


def test_control_tokens_and_image_marks_that_a_user_types_stay_text(opsin, model):
    def text_tokens(question):
        return answered(opsin("chat", model, question, "--max-new-tokens", 1, "--json"))["usage"]

    plain = text_tokens("ab")
    for typed in ("</s>", "<s>", "<image>", "[INST]", "<|im_end|>"):
        usage = text_tokens(f"a{typed}b")
        # The toy tokenizer gives each byte a token, and a control token would be one.
        assert usage["text_tokens"] == plain["text_tokens"] + len(typed)
        assert usage["image_tokens"] == 0


@pytest.mark.parametrize(("name", "note"), [("animated.gif", "first"), ("cmyk.jpg", "CMYK"), ("deep.png", "16-bit")])
def test_odd_pictures_are_read_and_what_was_done_is_said(opsin, model, pictures, name, note):
    found = answered(opsin("chat", model, "What?", "-i", pictures / name, "--max-new-tokens", 1, "--json"))
    assert note in " ".join(found["notes"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing.png", ("no such file",)),
        ("text.jpg", ()),
        ("empty.png", ()),
        ("huge.png", ("15000x15000",)),
        ("line.png", ("20000x1",)),
        ("ribbon.png", ("9000x10",)),
        ("folder.png", ("folder",)),
        ("cut.jpg", ("cut off",)),
    ],
)
def test_a_picture_that_cannot_be_read_is_one_clear_error(opsin, model, pictures, name, words):
    message = opsin("chat", model, "What?", "-i", pictures / "good.png", "-i", pictures / name).refused()
    for word in (name, *words):
        assert word in message


def test_a_prompt_that_is_too_long_is_one_clear_error_with_the_numbers(opsin, model):
    message = opsin("chat", model, "word " * 3000).refused()
    assert "15016 tokens" in message
    assert "4096" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("llava-1.5-7", "Hi"), ("no model 'llava-1.5-7'", "did you mean 'llava-1.5-7b'")),
        (("./nowhere", "Hi"), ("no folder './nowhere'",)),
        (("MODEL", "Hi", "--temprature", "1"), ("no option --temprature", "'--temperature'")),
        (("MODEL", "Hi", "--temperature", "warm"), ("--temperature", "number")),
        (("MODEL", "Hi", "--temperature", "-1"), ("temperature is -1.0",)),
        (("MODEL", "Hi", "--top-p", "0.9"), ("top_p has no effect at temperature 0",)),
        (("MODEL", "Hi", "--max-new-tokens", "0"), ("max_new_tokens is 0",)),
        (("MODEL", "Hi", "--device", "tpu"), ("device 'tpu'", "cpu")),
        (("MODEL", "Hi", "--dtype", "float8"), ("dtype 'float8'", "bfloat16")),
        (("MODEL", "--json"), ("PROMPT",)),
    ],
)
def test_wrong_arguments_are_one_clear_error(opsin, model, arguments, words):
    message = opsin("chat", *(model if each == "MODEL" else each for each in arguments)).refused()
    for word in words:
        assert word in message


def spoil_key(folder: Path) -> None:
    path = folder / "opsin.json"
    path.write_text(path.read_text().replace('"num_layers"', '"num_layer"', 1))


def spoil_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.norm.wieght"] = tensors.pop("decoder.norm.weight").clone()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def spoil_everything(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_key, ("num_layer", "num_layers")),
        (spoil_weights, ("model.safetensors",)),
        (spoil_tensor, ("decoder.norm.wieght", "decoder.norm.weight")),
        (spoil_tokenizer, ("tokenizer.model", "tokenizer.json")),
        (spoil_everything, ("config.json", "opsin.json")),
    ],
)
def test_a_model_that_cannot_be_read_is_a_clear_error(opsin, model, tmp_path, spoil, words):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    spoil(folder)
    done = opsin("chat", folder, "Hi")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


def test_ctrl_c_stops_the_answer_and_not_the_program(model):
    command = [sys.executable, "-m", "opsin.cli", "chat", str(model), "--max-new-tokens", "4000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("Hello\n")
        process.stdin.flush()
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdin.write("/help\n")
        out, err = process.communicate(timeout=60)
    assert first
    assert process.returncode == 0, err
    assert "(stopped)" in err
    assert "/reset" in err, "the next line was read"
    assert len(out) < 3000


def test_control_characters_do_not_reach_a_terminal():
    assert printable("a\x1b[2Jb\n\tc\x07\x9b\x7fd é🙂") == "a[2Jb\n\tcd é🙂"
