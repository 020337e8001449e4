"""The benchmark itself runs, on a size that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_compares_both_libraries_on_equal_outputs() -> None:
    pytest.importorskip("transformers")
    command = [
        sys.executable,
        "benchmarks/inference.py",
        "--sizes",
        "tiny",
        "--dtypes",
        "float32",
        "--rounds",
        "1",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert {"import", "load", "decode step, batch 1", "decode step, batch 8", "peak memory"} <= {
        row["phase"] for row in rows
    }
    assert all(ratio > 0 for row in rows for ratio in row["ratios"])
    assert "greedy ids equal" in done.stderr
