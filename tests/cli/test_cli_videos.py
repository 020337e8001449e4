"""Videos and beams on the command line, and bad input for models of native resolution."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsin import families, weights
from opsin.generate import Chat
from opsin.generate.beam import Beams
from toys import byte_tokenizer, picture


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    config = families.preset("qwen2-vl-tiny").config
    torch.manual_seed(0)
    weights.save_native(folder / "m", weights.build(config), config, byte_tokenizer(folder / "tokenizer"))
    return folder / "m"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Twelve frames at 4 a second."""
    av = pytest.importorskip("av", reason="videos need PyAV (pip install 'opsin[video]')")
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            container.mux(stream.encode(av.VideoFrame.from_image(picture((64, 48), number))))
        container.mux(stream.encode())
    return path


def test_a_video_is_shown_with_its_question(opsin, qwen, clip):
    arguments = ("What?", "--video", clip, "--max-new-tokens", 3)
    done = opsin("chat", qwen, *arguments, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    row = json.loads(opsin("plan", "--video", clip, "-m", qwen, "--json").out)[0]
    assert found["videos"] == [{"video": str(clip), "size": [64, 48], "frames": row["frames"], "tokens": row["tokens"]}]
    assert found["usage"]["image_tokens"] == row["tokens"]
    assert opsin("chat", qwen, *arguments).out == found["text"] + "\n"


def test_a_video_and_a_picture_may_stand_among_the_words(opsin, qwen, clip, pictures):
    rest = ("What?", "--max-new-tokens", 3)
    options = ("--video", clip, "--image", pictures / "good.png")
    assert opsin("chat", qwen, pictures / "good.png", clip, *rest).out == opsin("chat", qwen, *rest, *options).out


def test_a_video_can_be_shown_between_two_questions(opsin, converse, qwen, clip):
    done = converse([f"/video {clip}", "What?"], qwen, "--max-new-tokens", 3)
    assert (done.code, done.err) == (0, "")
    assert done.out == opsin("chat", qwen, "What?", "--video", clip, "--max-new-tokens", 3).out


def test_a_model_without_videos_says_so(opsin, model, clip):
    for name in (model, "llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"):  # the published ones before any download
        assert "reads pictures only" in opsin("chat", name, "What?", "--video", clip).refused()


def test_bad_videos_are_one_clear_error(opsin, qwen, clip, tmp_path, pictures):
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:300])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for path in (*tmp_path.iterdir(), tmp_path / "nothing.mp4", pictures / "good.png"):
        for command in (("chat", qwen, "What?"), ("plan", "-m", qwen)):
            assert path.name in opsin(*command, "--video", path).refused()


def test_a_video_of_no_frames_is_one_clear_error(opsin, qwen, tmp_path):
    av = pytest.importorskip("av", reason="videos need PyAV (pip install 'opsin[video]')")
    path = tmp_path / "none.mp4"
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode())
    assert "none.mp4" in opsin("chat", qwen, "What?", "--video", path).refused()
    assert "0 frames" in opsin("plan", "--video", "64x48x0@4", "-m", qwen).refused()


def test_without_pyav_the_error_says_what_to_install(opsin, qwen, tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"\0" * 100)
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'opsin[video]'" in opsin("chat", qwen, "What?", "--video", tmp_path / "clip.mp4").refused()


def test_a_written_video_is_planned_for_all_models(opsin):
    rows = json.loads(opsin("plan", "--video", "640x480x250@25", "--json").out)
    assert [row["model"] for row in rows] == [preset.id for preset in families.all_presets()]
    for row in rows:
        config = families.preset(row["model"]).config
        assert bool(row["reason"]) != config.reads_videos
        if config.reads_videos:
            plan = config.plan_video((640, 480), num_frames=250, rate=25)
            assert (row["tokens"], row["frames"]) == (plan.num_slots, list(plan.frames))
    table = opsin("plan", "--video", "640x480x250@25", "640x480").out
    for word in ("20: 0 13 26 ... 249", "reads pictures only", "640x480, 250 frames at 25 a second"):
        assert word in table


@pytest.mark.parametrize("video", ["640x480x1@25", "0x10x20@5", "6000x10x20@5", "640x480x20@0", "640x480x999999999@25"])
def test_videos_that_cannot_be_planned_are_one_clear_error(opsin, video):
    assert video in opsin("plan", "--video", video, "-m", "qwen2-vl-2b").refused()


def test_nothing_to_plan_is_one_clear_error(opsin):
    assert "nothing to plan" in opsin("plan", "--json").refused()


def test_planning_a_video_imports_no_torch():
    program = (
        "import sys; from opsin.cli.app import run\n"
        "code = run(sys.argv[1:])\n"
        "sys.exit('torch' if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", program, "plan", "--video", "640x480x250@25"]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


def test_beams_give_what_a_search_in_python_gives(opsin, qwen):
    options = ("--beams", 3, "--length-penalty", -1, "--max-new-tokens", 6)
    beams = Beams(num_beams=3, length_penalty=-1, max_new_tokens=6)
    expected = Chat(weights.load(str(qwen)), sampling=beams).ask("Hello").text
    assert opsin("chat", qwen, "Hello", *options).out == expected + "\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--beams", 5, "--temperature", 1, "--seed", 3), ("--temperature, --seed",)),
        (("--beams", 5, "--top-k", 3), ("--top-k",)),
        (("--beams", 5, "--repetition-penalty", 1.2), ("--repetition-penalty",)),
        (("--beams", 0), ("num_beams is 0",)),
        (("--length-penalty", 2), ("without --beams",)),
    ],
)
def test_what_beams_cannot_be_combined_with_is_one_clear_error(opsin, qwen, options, words):
    message = opsin("chat", qwen, "Hello", *options).refused()
    for word in words:
        assert word in message


@pytest.mark.parametrize("size", [(2010, 10), (3, 1000)])
def test_an_elongated_picture_is_one_clear_error(opsin, qwen, tmp_path, size):
    path = tmp_path / "odd.png"
    picture(size).save(path)
    message = opsin("chat", qwen, "What?", "-i", path).refused()
    assert "too elongated" in message
    assert "at most 200" in message


def test_a_small_picture_grows_or_is_refused_as_the_config_says(opsin, qwen, tmp_path):
    picture((9, 5)).save(tmp_path / "small.png")
    assert opsin("chat", qwen, "What?", "-i", tmp_path / "small.png", "--max-new-tokens", 2).code == 0
    config = families.preset("qwen2-vl-tiny").config
    strict = config.replace(resolution=config.resolution.replace(small_sides="refuse"))
    weights.save_native(tmp_path / "m", weights.build(strict), strict, byte_tokenizer(tmp_path / "tokenizer"))
    message = opsin("chat", tmp_path / "m", "What?", "-i", tmp_path / "small.png").refused()
    assert "9x5 px is too small" in message
