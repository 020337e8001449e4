"""The frame of the command line: help, names, errors, exit codes; and the small verbs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

import opsin as library
from opsin import families
from opsin.cli import app
from opsin.cli._options import readable_bytes

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
