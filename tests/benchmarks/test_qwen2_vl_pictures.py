"""The benchmark of pictures runs, and what it compares is equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_compares_equal_pictures_and_prints_the_error_of_the_fast_way() -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "benchmarks/qwen2_vl_pictures.py", "--sizes", "320x240", "--rounds", "3", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)
    assert row["exact_over_pillow"] > 0
    assert 0 < row["fast_largest_error_levels"] <= 2.01
