"""The whole experiment: prepare, stage 1, stage 2, evaluations, controls, and a page of figures.

    python experiments/ucm/run.py DATA                   # DATA: folder with captions.jsonl and its pictures
    python experiments/ucm/run.py DATA --update-docs     # also puts the figures into docs/experiments/ucm.md

Everything is written below runs/ucm, where the command is given. A run that was stopped goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
OUT = Path("runs/ucm")
"""As the run files say."""
FACTS = OUT / "facts.json"
EVALUATIONS = (
    ("contrast", "stage1/stage1", ("shuffled",)),
    ("matching", "stage1/stage1", ("shuffled",)),
    ("describe", "captions/captions", ("shuffled", "text-only")),
)
"""Task file, model and controls of each evaluation."""


def step(name: str, *command: str) -> None:
    """Run one command, and add to what is known of its time and memory, also from before the run was stopped."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    facts = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else {}
    before = facts.get(name, {"minutes": 0.0, "cpu_minutes": 0.0, "peak_mib": 0.0})
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, used = os.wait4(process.pid, 0)  # of this process alone
    peak = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    facts[name] = {
        "minutes": before["minutes"] + (time.perf_counter() - started) / 60,
        "cpu_minutes": before["cpu_minutes"] + (used.ru_utime + used.ru_stime) / 60,
        "peak_mib": max(before["peak_mib"], peak),
    }
    FACTS.parent.mkdir(parents=True, exist_ok=True)
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description="Run the whole experiment.")
    parser.add_argument("data", help="folder with captions.jsonl and its pictures")
    parser.add_argument("--set", nargs="*", default=[], help="settings of both runs, such as device=cpu")
    parser.add_argument("--update-docs", action="store_true", help="put the figures into docs/experiments/ucm.md")
    given = parser.parse_args()
    if not (OUT / "start-captions").exists():
        step("prepare", str(HERE / "prepare.py"), given.data, str(OUT))
    for name in ("stage1", "captions"):
        if not (OUT / name / name).exists():
            step(name, "-m", "opsin.cli", "train", str(HERE / f"{name}.yaml"), *given.set)
    for task, model, controls in EVALUATIONS:
        options = [word for control in controls for word in ("--control", control)]
        where = ("--task", str(HERE / f"{task}.yaml"), "--output", str(OUT / "eval" / task))
        if not (OUT / "eval" / task / "results.json").exists():
            step(f"eval {task}", "-m", "opsin.cli", "eval", str(OUT / model), *where, *options)
    step("controls", str(HERE / "controls.py"), given.data, str(OUT / "controls.json"))
    subprocess.run([sys.executable, str(HERE / "report.py"), *["--update-docs"] * given.update_docs], check=True)


if __name__ == "__main__":
    main()
