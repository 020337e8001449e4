"""The benchmark of families runs: both libraries answer alike, and every phase has a ratio."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_compares_both_libraries_on_equal_answers() -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "benchmarks/families.py", "--presets", "blip2-opt-2.7b", "--dtypes", "float32"]
    done = subprocess.run([*command, "--rounds", "1"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "float32" in line]
    assert [row[2] for row in rows] == ["picture", "vision", "vision + prefill", "decode step"]
    assert all(float(row[5]) > 0 for row in rows)
