"""Inference side by side with transformers: the same random weights, dtype, threads and machine.

    python benchmarks/inference.py [--quick] [--json FILE] [--update-docs]

Each library runs in a process of its own. The two take turns phase by phase, so that whatever else the machine does
hits both; ratios are taken inside each round. Before anything is timed, both must give the same answers.
"""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack
from datetime import date
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import report
from report import Measurement

if TYPE_CHECKING:
    from models import WrittenModel

LIBRARIES = ("opsin", "transformers")
ROWS = (1, 8)
"""Answers decoded side by side."""
TIE = {"float32": 1e-4, "bfloat16": 0.1}
"""Two ids may change places only where their logits lie closer than this share of the spread of all logits: rounding
of the dtype. In bfloat16 a logit four spreads out is itself stored in steps of 1/64 spread."""
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


class Worker(AbstractContextManager["Worker"]):
    """The process of one library."""

    def __init__(self, library: str, threads: int) -> None:
        self.library = library
        self.started = time.perf_counter()
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), library, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1
        )
        self.import_seconds: float = self._answer()["import"]

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """One request, answered. Ends the program if the library fails."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"request": request, **arguments}) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with status {self.process.wait()}"}
        if "error" in answer:
            self.log.seek(0)
            raise SystemExit(f"{self.library} failed: {answer['error']}\n{self.log.read()[-2000:]}")
        return answer

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


Pair = dict[str, Worker]
Times = dict[str, list[float]]


def start_pair(stack: ExitStack, threads: int) -> Pair:
    """Both libraries, imported and waiting."""
    return {library: stack.enter_context(Worker(library, threads)) for library in LIBRARIES}


def in_turn(pair: Pair, number: int, request: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    """One request to both, one after the other; who begins changes with the number of the round."""
    order = LIBRARIES if number % 2 == 0 else LIBRARIES[::-1]
    return {library: pair[library].ask(request, **arguments) for library in order}


def measured(phase: str, model: str, unit: Any, values: list[dict[str, float]]) -> Measurement:
    """Rounds of both libraries as one result."""
    ours, theirs = (tuple(each[library] for each in values) for library in LIBRARIES)
    return Measurement(phase, model, unit, ours, theirs)


def seconds(answers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The times of one round."""
    return {library: answer["seconds"] for library, answer in answers.items()}


def time_preparation(pair: Pair, folders: dict[str, Path], rounds: int) -> list[Measurement]:
    """From the opened picture to the tower's input; the pixels must be equal bit by bit."""
    results = []
    for title, folder in folders.items():
        values = []
        for number in range(rounds):
            answers = in_turn(pair, number, "prepare", folder=str(folder), repeats=7)
            digests = {answer["digest"] for answer in answers.values()}
            if len(digests) != 1:
                raise SystemExit(f"the libraries prepare different pixels ({title}): {' and '.join(digests)}")
            values.append(seconds(answers))
        results.append(measured(f"image preparation ({title})", "", "s", values))
    return results


def time_model(pair: Pair, model: "WrittenModel", rounds: int, steps: int) -> tuple[list[Measurement], list[str]]:
    """Load, prefill and decode in turns, after a first round that is checked and not timed. Also returns notes."""
    column = f"{model.title} {model.dtype}"
    arguments = {"folder": str(model.folder), "dtype": model.dtype}
    in_turn(pair, 0, "load", **arguments)
    loads = [seconds(in_turn(pair, number, "load", **arguments)) for number in range(rounds)]
    in_turn(pair, 0, "prompt", ids=model.ids)
    notes = check(pair, model, steps)
    prefill: list[dict[str, float]] = []
    decode: dict[int, list[dict[str, float]]] = {rows: [] for rows in ROWS}
    for number in range(rounds):
        prefill.append(seconds(in_turn(pair, number, "prefill", room=steps)))
        for rows in ROWS:
            decode[rows].append(seconds(in_turn(pair, number, "decode", rows=rows, steps=steps)))
    return [
        measured("load", column, "s", loads),
        measured("vision + prefill", column, "s", prefill),
        *(measured(f"decode step, batch {rows}", column, "s", decode[rows]) for rows in ROWS),
    ], notes


def check(pair: Pair, model: "WrittenModel", steps: int) -> list[str]:
    """Both libraries must answer with the same ids, except where two ids tie. Returns what was found, as notes."""
    where = f"{model.title} {model.dtype}"
    in_turn(pair, 0, "prefill", room=steps)
    ways, equal, ties = [], 0, 0
    for rows in ROWS:
        found = in_turn(pair, 0, "decode", rows=rows, steps=steps)
        ways.append(f"{found['transformers']['way']} at batch {rows}")
        for row in range(rows):
            ours, theirs = (found[library]["ids"][row] for library in LIBRARIES)
            parted = next((place for place in range(steps) if ours[place] != theirs[place]), None)
            equal += steps if parted is None else parted
            if parted is not None:
                check_tie(pair, model, row, ours[:parted], [ours[parted], theirs[parted]])
                ties += 1
    parts = f", {ties} answers part at a tie" if ties else ""
    return [
        f"{where}: {equal} of {sum(ROWS) * steps} greedy ids equal{parts}; transformers decodes by {', '.join(ways)}"
    ]


def check_tie(pair: Pair, model: "WrittenModel", row: int, answer: list[int], rivals: list[int]) -> None:
    """Ends the program unless both libraries find the rivals equally likely, within the rounding of the dtype."""
    for library, found in in_turn(pair, 0, "logits", row=row, answer=answer, of=rivals).items():
        gap = abs(found["values"][0] - found["values"][1]) / found["spread"]
        if gap > TIE[model.dtype]:
            raise SystemExit(
                f"{model.title} {model.dtype}: the libraries answer differently. After {len(answer)} tokens of row "
                f"{row} they choose {rivals[0]} and {rivals[1]}, whose logits {library} puts {gap:.3g} spreads apart "
                f"(rounding explains {TIE[model.dtype]})"
            )


def time_prefill(pair: Pair, model: "WrittenModel", rounds: int) -> Measurement:
    """Vision and prefill alone."""
    in_turn(pair, 0, "load", folder=str(model.folder), dtype=model.dtype)
    in_turn(pair, 0, "prompt", ids=model.ids)
    first = in_turn(pair, 0, "prefill", room=1)
    rivals = [first[library]["ids"][0] for library in LIBRARIES]
    if rivals[0] != rivals[1]:
        raise SystemExit(f"{model.title} {model.dtype}: the first greedy ids are {rivals[0]} and {rivals[1]}")
    values = [seconds(in_turn(pair, number, "prefill", room=1)) for number in range(rounds)]
    return measured(f"vision + prefill ({model.title} {model.dtype}, {len(model.ids)} tokens)", "", "s", values)


def time_start(model: "WrittenModel", rounds: int, threads: int) -> list[Measurement]:
    """Fresh processes: import, everything up to the first token, and the peak of memory after a few more."""
    column = f"{model.title} {model.dtype}"
    found: dict[str, list[dict[str, float]]] = {"import": [], "first": [], "peak": []}
    for number in range(rounds):
        once: dict[str, dict[str, float]] = {name: {} for name in found}
        for library in LIBRARIES if number % 2 == 0 else LIBRARIES[::-1]:
            with Worker(library, threads) as worker:
                worker.ask("load", folder=str(model.folder), dtype=model.dtype)
                worker.ask("prompt", ids=model.ids)
                worker.ask("prefill", room=8)
                once["first"][library] = time.perf_counter() - worker.started
                once["import"][library] = worker.import_seconds
                worker.ask("decode", rows=1, steps=8)
                once["peak"][library] = worker.ask("peak")["bytes"]
        for name, values in once.items():
            found[name].append(values)
    return [
        measured("import", column, "s", found["import"]),
        measured("program start to first token", column, "s", found["first"]),
        measured("peak memory", column, "bytes", found["peak"]),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Inference side by side with transformers.")
    parser.add_argument("--quick", action="store_true", help="the small size alone, few rounds: less than a minute")
    parser.add_argument("--sizes", help="tiny, small, medium; default small,medium", metavar="A,B")
    parser.add_argument("--dtypes", default="float32,bfloat16", metavar="A,B")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each library, default all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--update-docs", action="store_true", help=f"write the result into {PAGE.name}")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit(
            "transformers is not installed, and there is nothing to compare with: pip install 'opsin[dev]'"
        )
    sizes = (options.sizes or ("small" if options.quick else "small,medium")).split(",")
    dtypes = options.dtypes.split(",")
    rounds = options.rounds or (2 if options.quick else 5)
    starts, steps = (1, 8) if options.quick else (3, 16)
    began, load = time.perf_counter(), os.getloadavg()[0]

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:4.0f} s] {text}", flush=True)

    import models

    unknown = [each for each in sizes if each not in models.SIZES] + [each for each in dtypes if each not in TIE]
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is not known. Sizes: {', '.join(models.SIZES)}. Dtypes: {', '.join(TIE)}")
    results: list[Measurement] = []
    notes: list[str] = []
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        pair = start_pair(stack, options.threads)
        say("image preparation")
        results += time_preparation(pair, models.write_preprocessors(folder), rounds)
        for size in sizes:
            for dtype in dtypes:
                model = models.write(folder / f"{size}-{dtype}", family="llava15", size=size, dtype=dtype)
                say(f"{model.title} {dtype}, {model.num_parameters / 1e6:.0f} M parameters: load, prefill, decode")
                found, said = time_model(pair, model, rounds, steps)
                results += found
                notes += said
                rates.append(pair["opsin"].ask("probe")["rate"])
                say("the same in fresh processes")
                results += time_start(model, starts, options.threads)
        say("LLaVA-NeXT prefill")
        size = sizes[0]
        for dtype in dtypes:
            model = models.write(folder / f"next-{size}-{dtype}", family="llava_next", size=size, dtype=dtype)
            results.append(time_prefill(pair, model, max(rounds - 2, 2)))
    arguments = [each for each in sys.argv[1:] if each != "--update-docs"]
    machine = report.surroundings(options.threads)
    text = summary(results, notes, machine, rates, arguments=arguments, rounds=(rounds, starts), load=load)
    print(f"\n{text}")
    say("done")
    if options.json is not None:
        context = {"date": date.today().isoformat(), "machine": machine, "checks": notes, "read_rates": rates}
        content = report.as_json(results, **context, command=shlex.join(sys.argv), rounds=rounds, load=load)
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.update_docs:
        report.update_docs(PAGE, text)


def summary(
    results: list[Measurement],
    notes: list[str],
    machine: dict[str, Any],
    rates: list[float],
    *,
    arguments: list[str],
    rounds: tuple[int, int],
    load: float,
) -> str:
    """Tables and what they belong to."""
    command = shlex.join(["python", "benchmarks/inference.py", *arguments])
    packages = ", ".join(f"{name} {machine[name]}" for name in ("opsin", "torch", "transformers", "pillow"))
    rate = f"{statistics.median(rates) / 1e9:.0f} GB/s ({min(rates) / 1e9:.0f}-{max(rates) / 1e9:.0f})"
    checks = "\n".join(f"- {note}" for note in notes)
    told = (
        f"`{command}`, {date.today():%d %B %Y}: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} "
        f"threads, Python {machine['python']}, {packages}. {rounds[0]} rounds ({rounds[1]} of fresh processes). Memory "
        f"was read at {rate} in between; the load average at the start was {load:.1f}."
    )
    answers = f"Answers, compared before timing:\n\n{checks}"
    return f"{told}\n\n{report.tables(results)}\n\n{report.verdict(results)}\n\n{answers}"


if __name__ == "__main__":
    main()
