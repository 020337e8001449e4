"""The frame of the command line: help, names, errors, exit codes; and the small verbs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

import opsin as library
from opsin import families, weights
from opsin.cli import app
from opsin.cli._options import readable_bytes
from opsin.families.blip2 import BLIP2
from opsin.inspect.tree import readable_count

PRESENT = [verb for verb in app.VERBS if find_spec(f"opsin.cli.{verb}")]


def fail(monkeypatch, error):
    """Make `opsin env` fail with `error`."""

    def env() -> None:
        """Fails."""
        raise error

    monkeypatch.setattr("opsin.cli.env.env", env)


def test_help_lists_every_verb_and_imports_none(opsin):
    done = opsin("--help")
    assert done.code == 0
    for verb, help_line in app.VERBS.items():
        assert verb in done.out
        assert help_line.split()[0] in done.out
    program = (
        "import sys; from opsin.cli.app import run; run(['--help'])\n"
        "sys.exit(str([name for name in sys.modules if name in ('torch', 'opsin.cli.chat', 'opsin.spec')] or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_arguments_show_the_help(opsin):
    done = opsin()
    assert "Usage: opsin" in done.out + done.err


@pytest.mark.parametrize("verb", PRESENT)
def test_every_verb_has_help_with_examples(opsin, verb):
    done = opsin(verb, "--help")
    assert done.code == 0
    assert done.out.count(f"opsin {verb}") >= 2, "once in the usage line, then in examples"


def test_version(opsin):
    assert opsin("--version").out == f"opsin {library.__version__}\n"


def test_an_unknown_verb_names_the_nearest(opsin):
    assert "unknown command 'caht' (did you mean 'chat'?)" in opsin("caht").refused()


def test_user_errors_show_where_they_come_from_only_when_asked(opsin, monkeypatch):
    monkeypatch.setenv("OPSIN_DEBUG", "")
    assert "Traceback" not in opsin("plan", "nothing.jpg").err
    assert "Traceback" in opsin("--debug", "plan", "nothing.jpg").err
    monkeypatch.setenv("OPSIN_DEBUG", "1")
    assert "Traceback" in opsin("plan", "nothing.jpg").err
    assert opsin("plan", "nothing.jpg").err.splitlines()[-1].startswith("error: nothing.jpg")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PermissionError(13, "Permission denied", "weights.safetensors"), 2, "weights.safetensors: Permission denied"),
        (IsADirectoryError(21, "Is a directory", "out"), 2, "out: Is a directory"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError(), 2, "not enough memory"),
        (TypeError("half a thought"), 1, "TypeError: half a thought (this is a bug in opsin"),
    ],
)
def test_whatever_goes_wrong_is_one_line(opsin, monkeypatch, error, code, text):
    fail(monkeypatch, error)
    done = opsin("env")
    assert done.code == code
    assert done.err.startswith("error: ")
    assert text in done.err
    assert len(done.err.splitlines()) == 1


def test_ctrl_c_ends_with_130(opsin, monkeypatch):
    fail(monkeypatch, KeyboardInterrupt())
    assert opsin("env").code == 130


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m opsin.cli plan 640x480 --json | head -c 10"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert len(done.stdout) == 10
    assert done.stderr == ""


def test_env_lists_versions_and_devices(opsin):
    facts = json.loads(opsin("env", "--json").out)
    assert facts["opsin"] == library.__version__
    for name in ("python", "torch", "threads", "gpu", "model cache"):
        assert facts[name]
    assert "torch" in opsin("env").out


def test_show_draws_every_part_and_its_counts(opsin):
    done = opsin("show", "llava-next-mistral-7b", "--image", "640x480", "--depth", 4)
    assert done.code == 0
    preset = families.preset("llava-next-mistral-7b")
    assert f"{preset.parameters / 1e9:.3g} B" in done.out
    for words in ("layers x24", "layers x32", "weight 14336x4096", "newline", "8 for keys and values", "2340 tokens"):
        assert words in done.out
    assert "mlp" not in opsin("show", "llava-1.5-7b", "--depth", 1).out.replace("mlp (nn/connectors.py)", "")


def test_show_counts_what_the_presets_say_they_have(opsin):
    from opsin.inspect.tree import count_parameters, nest
    from opsin.weights.init import on_meta

    for preset in families.all_presets():
        shapes = {name: tuple(tensor.shape) for name, tensor in on_meta(preset.config).state_dict().items()}
        assert count_parameters(nest(shapes)) == preset.parameters


@pytest.mark.parametrize("preset", [*families.all_presets(), *BLIP2.retrieval.presets], ids=lambda preset: preset.id)
def test_show_and_plan_serve_every_preset(opsin, preset):
    done = opsin("show", preset.id, "--image", "640x480", "--depth", 1)
    assert done.code == 0, done.err
    slots = preset.config.plan((640, 480)).num_slots
    assert done.out.startswith(f"{preset.id}  {readable_count(preset.parameters)}\n")
    if isinstance(preset, families.Preset):
        assert f"-> {slots} tokens" in done.out
        assert json.loads(opsin("plan", "640x480", "-m", preset.id, "--json").out)[0]["tokens"] == slots
    else:
        assert f"-> {slots} outputs of the queries" in done.out
        for name in (preset.id, *preset.hub):
            message = opsin("plan", "640x480", "-m", name).refused()
            assert f"'{name}' compares pictures with texts and has no language model" in message


def test_show_draws_both_sides_of_a_q_former_and_the_heads_that_a_model_has(opsin, tmp_path):
    stage1 = opsin("show", "blip2-stage1-vit-g", "--depth", 3).out
    for words in (
        "12 heads; shared by queries and texts",
        "layers.10  15.2 M  queries look at the picture",
        "`opsin match`",
    ):
        assert words in stage1
    for name, layers in (("attn", 12), ("query", 12), ("text", 12), ("cross", 6)):
        assert stage1.count(f"── {name}  ") == layers + (name == "attn"), name  # one more in the tower
    matching = opsin("show", "blip2-itm-vit-g").out
    for head in ("vision_proj", "text_proj", "itm_head"):
        assert head in stage1
        assert head in matching
    for head in ("captions", "temperature"):
        assert head in stage1
        assert head not in matching
    weights.export_retriever(tmp_path / "own", weights.build_retriever(BLIP2.retrieval.tiny))
    assert "`opsin match`" in opsin("show", tmp_path / "own").out
    assert "opsin match" in opsin("plan", "640x480", "-m", tmp_path / "own").refused()


def test_show_tells_an_encoder_from_a_decoder_and_names_the_files_of_parts(opsin):
    flan = " ".join(opsin("show", "blip2-flan-t5-xl").out.split())
    for words in (
        "qformer (nn/qformer.py)",
        "encoder-decoder: 32 heads, relative positions",
        "encoder 1.16 B reads the picture and the prompt",
        "layers x24 65 M each write the answer",
    ):
        assert words in flan
    assert "learned positions (nn/decoder.py)" in opsin("show", "blip2-opt-2.7b", "--depth", 1).out
    assert "ViT: 448 px tiles" in opsin("show", "qwen-vl-chat", "--depth", 1).out, "its table is that of 224 px"
    assert "ViT: pictures of any size" in opsin("show", "qwen2-vl-2b-instruct", "--depth", 1).out


def test_a_model_that_compares_is_no_model_to_chat_with(opsin, pictures):
    assert "`opsin match`" in opsin("chat", "blip2-itm-vit-g", "--image", pictures / "good.png", "What?").refused()
    assert "did you mean 'blip2-itm-vit-g'" in opsin("show", "blip2-itm-vitg").refused()


def test_show_reads_a_folder_and_a_picture(opsin, model, pictures):
    done = opsin("show", model, "--image", pictures / "good.png")
    assert done.code == 0
    assert "good.png, 80x60 px" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("llava-1.5-7x",), ("did you mean 'llava-1.5-7b'",)),
        (("llava-1.5-7b", "--image", "nothing.png"), ("nothing.png",)),
        (("llava-1.5-7b", "--image", "20000x1"), ("20000x1",)),
        (("llava-1.5-7b", "--depth", "0"), ("depth",)),
    ],
)
def test_what_cannot_be_shown_is_one_clear_error(opsin, arguments, words):
    message = opsin("show", *arguments).refused()
    for word in words:
        assert word in message


def test_sizes_are_written_for_people():
    assert [readable_bytes(count) for count in (0, 1023, 1024, 302514176, 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "288.5 MiB",
        "1024.0 GiB",
    ]


def test_the_public_face_plans_loads_and_chats(model, pictures):
    assert library.preset("llava-1.5-7b").config.plan((640, 480)).num_slots == 576
    assert library.plan((640, 480), model="llava-next-vicuna-7b").num_slots == 2340
    config = library.load(model).config
    planned = library.plan(pictures / "good.png", model=config)
    chat = library.chat(model)
    answer = chat.ask("What is it?", pictures / "good.png")
    assert answer.usage.image_tokens == planned.num_slots
    assert library.chat(library.load(model)).ask("What is it?", pictures / "good.png").ids == answer.ids
    with pytest.raises(AttributeError, match="chatt"):
        library.chatt  # noqa: B018


def test_importing_the_library_imports_no_torch():
    program = "import sys, opsin; opsin.__version__; opsin.preset('llava-1.5-7b'); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=dict(os.environ), timeout=60)
    assert done.returncode == 0
