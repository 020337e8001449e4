"""docs/training_cost.md is true: its table is what the script prints, its commands and its Python run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from opsin.cli.app import run as opsin

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/training_cost.md").read_text(encoding="utf-8")


def test_the_table_is_what_the_script_prints_and_near_what_was_published() -> None:
    command = [sys.executable, "benchmarks/training_cost.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert f"<!-- training_cost: begin -->\n{printed}\n<!-- training_cost: end -->" in PAGE
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[2:]]
    ratios = {row[0]: float(row[4]) for row in rows}
    bounds = {row[0] for row in rows if row[2].startswith("<")}
    known = {name: ratio for name, ratio in ratios.items() if re.match(r"LLaVA(-1\.5)? ", name)}
    assert len(known) == 9
    assert sorted(known.values())[0] >= 0.63
    assert sorted(known.values())[-2] <= 1.0
    assert max(known.values()) < 1.24
    assert len(bounds) == 3
    assert all(ratios[name] < 1 for name in bounds)


def test_the_commands_of_the_page_run(capsys) -> None:
    commands = [line.split("#")[0] for line in PAGE.splitlines() if line.startswith("opsin ")]
    assert len(commands) >= 2
    for command in commands:
        assert opsin(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


def test_the_python_of_the_page_runs(capsys) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(block, "training_cost.md", "exec"), {})
    assert capsys.readouterr().out.startswith("finetune: 4.77e+15 FLOPs per step, ")
