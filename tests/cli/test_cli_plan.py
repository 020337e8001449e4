"""`opsin plan`: token counts without torch, at once."""

import json
import os
import subprocess
import sys

import pytest

from opsin import families
from opsin.cli.plan import count_text
from opsin.errors import TokenizerError


def planned(done):
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_llava_15_gives_576_tokens_for_any_picture(opsin):
    sizes = ["1x1", "640x480", "480x640", "1920x1080", "333x500", "3000x100"]
    rows = planned(opsin("plan", *sizes, "--model", "llava-1.5-7b", "--json"))
    assert [row["tokens"] for row in rows] == [576] * len(sizes)
    assert [(row["width"], row["height"]) for row in rows] == [tuple(map(int, size.split("x"))) for size in sizes]
    assert {row["tiles"] for row in rows} == {1}
    assert {row["kv_bytes"] for row in rows} == {576 * 512 * 1024}


@pytest.mark.parametrize(
    ("size", "tiles", "original", "hf"),
    # From the recorded size table of LLaVA-NeXT: (tokens, tokens of the -hf variant).
    [("640x480", 5, 2340, 2340), ("250x300", 3, 1276, 1080), ("1920x1080", 5, 1948, 1948), ("5000x50", 4, 576, 576)],
)
def test_llava_next_gives_the_recorded_counts(opsin, size, tiles, original, hf):
    rows = planned(opsin("plan", size, "-m", "llava-next-vicuna-7b", "-m", "llava-next-vicuna-7b-hf", "--json"))
    assert [(row["tiles"], row["tokens"]) for row in rows] == [(tiles, original), (tiles, hf)]


def test_all_lists_every_published_model_once(opsin):
    rows = planned(opsin("plan", "640x480", "--model", "all", "--json"))
    assert [row["model"] for row in rows] == [preset.id for preset in families.all_presets()]
    for row in rows:
        assert row["prompt_tokens"] == row["tokens"] + row["text_tokens"]
    assert planned(opsin("plan", "640x480", "--json")) == rows, "all is the default"


def test_pictures_are_measured_as_people_see_them_or_as_files_hold_them(opsin, pictures):
    shown, stored = (
        planned(opsin("plan", pictures / "turned.jpg", "-m", "llava-1.5-7b", "--json", "--mode", mode))[0]
        for mode in ("display", "reference")
    )
    assert (shown["width"], shown["height"]) == (60, 80)
    assert (stored["width"], stored["height"]) == (80, 60)


def test_a_repository_of_a_preset_is_planned_without_a_download(opsin):
    rows = planned(opsin("plan", "640x480", "-m", "llava-hf/llava-1.5-7b-hf", "-m", "llava-1.5-7b-hf", "--json"))
    assert rows[0] == {**rows[1], "model": "llava-hf/llava-1.5-7b-hf"}


def test_a_folder_is_planned_with_its_own_tokenizer(opsin, model):
    row = planned(opsin("plan", "80x60", "-m", model, "--json"))[0]
    assert row["text_tokens_from"] == "tokenizer"
    # A byte per token: `<s>`, `[INST]` and `[/INST]` with spaces, the line break after the picture, the question.
    assert row["text_tokens"] == 1 + len("[INST] ") + len("\nWhat is shown in this image?") + len(" [/INST]")


def test_the_estimate_is_within_5_of_vicunas_tokenizer(shared):
    from opsin.text.tokenizer import load_tokenizer

    folder = shared / "tokenizers" / "vicuna"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    tokenizer = load_tokenizer(folder)
    compared = 0
    for preset in families.all_presets():
        try:
            exact, source = count_text(preset.config, tokenizer)
        except TokenizerError:  # the format needs control tokens that Vicuna does not have
            continue
        assert source == "tokenizer"
        assert abs(exact - count_text(preset.config, None)[0]) <= 5, preset.id
        compared += 1
    assert compared >= 10


def test_the_table_says_what_json_says(opsin, pictures):
    done = opsin("plan", "640x480", pictures / "good.png", "-m", "llava-next-vicuna-7b")
    assert done.code == 0
    for word in ("llava-next-vicuna-7b", "good.png 80x60", "672x504", "672x672", "2340", "~2388", "1.1 GiB"):
        assert word in done.out
    by_picture = opsin("plan", "640x480", "1x1", "--model", "all").out
    assert by_picture.index("640x480") < by_picture.index("1x1")
    assert max(map(len, by_picture.splitlines())) > 80 or "llava-next-vicuna-13b-hf" in by_picture


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("20000x1",), ("20000x1", "one side is longer than 16384 px")),
        (("9000x10",), ("9000x10", "ratio")),
        (("0x10",), ("0x10", "no pixels")),
        (("nothing.jpg",), ("nothing.jpg", "no such file")),
        (("640x480", "-m", "llava-15-7b"), ("unknown model 'llava-15-7b'", "did you mean 'llava-1.5-7b'")),
        (("640x480", "--modle", "all"), ("no option --modle", "'--model'")),
        (("640x480", "--mode", "refrence"), ("refrence", "reference")),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(opsin, arguments, words):
    message = opsin("plan", *arguments).refused()
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("huge.png", ("15000x15000",)),
        ("line.png", ("20000x1",)),
        ("ribbon.png", ("9000x10",)),
        ("text.jpg", ("text.jpg",)),
        ("empty.png", ("empty.png",)),
        ("folder.png", ("folder.png", "folder")),
    ],
)
def test_a_picture_that_cannot_be_read_is_one_clear_error(opsin, pictures, name, words):
    message = opsin("plan", pictures / name, "-m", "llava-1.5-7b").refused()
    for word in words:
        assert word in message


def test_planning_imports_no_torch_and_takes_less_than_a_second(pictures):
    program = (
        "import sys; from opsin.cli.app import run\n"
        "code = run(sys.argv[1:])\n"
        "loaded = [name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules]\n"
        "sys.exit(str(loaded) if loaded else code)"
    )
    command = [sys.executable, "-c", program, "plan", str(pictures / "good.png"), "640x480", "--model", "all"]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    after = os.times()
    assert done.returncode == 0, done.stderr
    # Processor time, start of Python included, because the clock also counts what else this machine does: 0.4 s here.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0
