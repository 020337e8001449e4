"""The benchmark of training runs: both loops have the same loss on the same samples, and every figure its ratio."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_compares_both_loops_on_equal_losses() -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "benchmarks/training.py", "--quick", "--rounds", "1", "--lengths", "equal"]
    done = subprocess.run([*command, "--stages", "stage 1"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "float32" in line]
    assert [row[2] for row in rows] == ["taught tokens per second", "waiting for data"]
    assert float(rows[0][5]) > 0
