"""docs/distributed.md is true as far as one machine can tell: its commands parse and run, its programs compile."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from opsin.cli.app import run as opsin
from train import together

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def torchruns() -> list[str]:
    """Every torchrun command of the page, in one line."""
    joined = "\n".join([*blocks(""), *blocks("bash")]).replace("\\\n", " ")
    return re.findall(r"^(?:srun )?torchrun (.*)$", joined, re.MULTILINE)


def test_the_page_shows_one_machine_and_several():
    assert len(torchruns()) == 3


@pytest.mark.parametrize("command", torchruns())
def test_torchrun_understands_the_commands_and_opsin_what_they_start(command, tmp_path, monkeypatch, capsys):
    together.write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = get_args_parser().parse_args(shlex.split(command.replace("$(which opsin)", "/bin/opsin")))
    if given.module:
        assert given.training_script == "opsin.cli"
    assert opsin([*given.training_script_args, "--dry-run"]) == 0
    assert "stage 1 of 1: tune" in capsys.readouterr().out


def test_the_batch_script_is_one():
    (script,) = blocks("bash")
    assert script.startswith("#!/bin/bash\n#SBATCH")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_ray_program_is_one():
    (program,) = (block for block in blocks("python") if "ray" in block)
    names = {node.id for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Name)}
    assert {"TorchTrainer", "ScalingConfig", "read_run", "run"} <= names


def test_tests_that_the_page_names_exist():
    sources = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    named = re.findall(r"`(?:tests/train/test_\w+\.py::)?(test_\w+)`", PAGE)
    assert len(named) >= 3
    for name in named:
        assert f"def {name}(" in sources, name
