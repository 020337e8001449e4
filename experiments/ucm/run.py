"""The whole experiment: prepare, stage 1, stage 2, evaluation, figures.

    python experiments/ucm/run.py DATA            # DATA: folder with captions.jsonl and its pictures

Everything is written below runs/ucm, where the command is given. A run that was stopped goes on.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from opsin.inspect.curves import loss_svg, read_curves

HERE = Path(__file__).parent
OUT = Path("runs/ucm")
"""As the run files say."""
EVALUATIONS = (
    ("contrast", "stage1/stage1", ("shuffled",)),
    ("matching", "stage1/stage1", ("shuffled",)),
    ("describe", "captions/captions", ("shuffled", "text-only")),
)
"""Task file, model and controls of each evaluation."""


def step(facts: dict[str, dict[str, float]], name: str, *command: str) -> None:
    """Run one command, and note how long it took and the most memory that a command has held so far."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    facts[name] = {"minutes": round((time.perf_counter() - started) / 60, 2), "peak_mib_so_far": round(peak / 2**20)}


def main() -> None:
    """Run all steps and write OUT/facts.json and OUT/figures."""
    parser = argparse.ArgumentParser(description="Run the whole experiment.")
    parser.add_argument("data", help="folder with captions.jsonl and its pictures")
    parser.add_argument("--set", nargs="*", default=[], help="settings of both runs, such as stages.0.steps=2")
    given = parser.parse_args()
    facts: dict[str, dict[str, float]] = {}
    if not (OUT / "start-captions").exists():
        step(facts, "prepare", str(HERE / "prepare.py"), given.data, str(OUT))
    for name in ("stage1", "captions"):
        step(facts, name, "-m", "opsin.cli", "train", str(HERE / f"{name}.yaml"), *given.set)
    for task, model, controls in EVALUATIONS:
        options = [word for control in controls for word in ("--control", control)]
        where = ("--task", str(HERE / f"{task}.yaml"), "--output", str(OUT / "eval" / task))
        step(facts, f"eval {task}", "-m", "opsin.cli", "eval", str(OUT / model), *where, *options)
    step(facts, "controls", str(HERE / "controls.py"), given.data)
    (OUT / "figures").mkdir(exist_ok=True)
    for name in ("stage1", "captions"):
        (curve,) = read_curves(OUT / name / "log.jsonl")
        (OUT / "figures" / f"{name}.svg").write_text(loss_svg(curve), encoding="utf-8")
    about = {
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "steps": facts,
    }
    (OUT / "facts.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
