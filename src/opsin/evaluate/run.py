"""One evaluation: ask what is not answered yet, keep every output as it comes, score them all, write results."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opsin.data.feed import ahead
from opsin.encode import Encoded
from opsin.errors import DataError
from opsin.evaluate.answering import Answerer, Said, load_answerer
from opsin.evaluate.bootstrap import LEVEL, RESAMPLES, SEED
from opsin.evaluate.examples import conversation
from opsin.evaluate.figures import ALL, MACRO, Figure, Scored, figures_of, layout_of
from opsin.evaluate.folder import FORMAT, RESULTS, Name, Output, OutputFile, begin, write_scores, write_whole
from opsin.evaluate.identity import described, model_digest, versions
from opsin.evaluate.progress import Reporter, Silence
from opsin.evaluate.rows import Rows
from opsin.evaluate.scoring import Scorer, showing_under
from opsin.evaluate.tasks import Task
from opsin.media.image import ImageMode
from opsin.spec.model import VLMConfig
from opsin.weights.config import describe

BATCH_SIZE = 8
WORKERS = 2
"""Threads that open and prepare pictures while the model answers."""

Job = tuple[str, int]
"""(control, number of the example)."""


class Evaluation:
    """One model on one task, in one folder."""

    def __init__(
        self,
        task: Task,
        model: str,
        folder: str | Path,
        *,
        controls: Sequence[str] = (),
        image_mode: ImageMode = "display",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = BATCH_SIZE,
        reporter: Reporter | None = None,
        load: Callable[..., Answerer] | None = None,
    ) -> None:
        """folder: made, or that of the same evaluation, which then goes on. Raises ConfigError for one of another.

        load: gives the model's outputs; called only where some are missing.
        """
        self.task, self.model, self.folder = task, model, Path(folder)
        self.controls = ("", *dict.fromkeys(controls))
        self.image_mode, self.batch_size, self.device = image_mode, batch_size, device
        self.reporter = reporter or Silence()
        config = describe(model)
        self.scorer = Scorer(task, grounding=config.chat.grounding, image_mode=image_mode)
        self._by_key = {example.key: example for example in task.light}
        if len(self._by_key) < len(task.examples) or not self._by_key:
            raise DataError(
                f"the task {task.settings.name} has {len(task.examples)} examples and {len(self._by_key)} different "
                "keys; each example needs one of its own"
            )
        self._shown = {control: showing_under(task.light, control) for control in self.controls}
        self._load = lambda: (load or load_answerer)(
            model,
            task.settings,
            image_mode=image_mode,
            spells_boxes=self._spells_boxes,
            device=device,
            dtype=dtype,
        )
        self.run = self._what_decides_outputs(config, dtype)
        begin(self.folder, self.run)

    @property
    def _spells_boxes(self) -> bool:
        return "iou" in self.task.settings.metrics

    def _what_decides_outputs(self, config: VLMConfig, dtype: str) -> dict[str, Any]:
        settings = self.task.settings
        decoding: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "temperature": 0}
        if settings.beams is not None:
            decoding |= {"beams": settings.beams, "length_penalty": settings.length_penalty}
        return {
            "format": FORMAT,
            "task": settings.name,
            "model": described(self.model),
            "model_digest": model_digest(self.model),
            "data": self.task.fingerprint,
            "examples": len(self.task.examples),
            "prompt": settings.prompt,
            "asks_by_name": settings.asks_by_name,
            "chat_format": config.chat.name,
            "decoding": decoding,
            "dtype": dtype,
            "image_mode": self.image_mode,
            "marks_of_boxes": self._spells_boxes,
        }

    def __call__(self) -> dict[str, Any]:
        """Ask what is missing, score, write; the contents of results.json. Ctrl-C leaves all outputs so far."""
        started = time.perf_counter()
        file = OutputFile(self.folder / "outputs.jsonl")
        try:
            asked = self._ask(file)
        finally:
            file.close()
        return self._conclude(file.outputs, asked, time.perf_counter() - started)

    def _ask(self, file: OutputFile) -> int:
        jobs = [(control, index) for control in self.controls for index in range(len(self.task.examples))]
        missing = [job for job in jobs if self._name(job) not in file.outputs]
        self.reporter.begin(len(jobs), len(jobs) - len(missing))
        try:
            if missing:
                answerer = self._load()
                for batch, prompts in self._batches(missing, answerer):
                    said = answerer.answer(prompts)
                    file.write([_output(self._name(job), each) for job, each in zip(batch, said, strict=True)])
                    self.reporter.advance(len(batch))
        finally:
            self.reporter.end()
        return len(missing)

    def _name(self, job: Job) -> Name:
        return job[0], self.task.light[job[1]].key

    def _batches(self, jobs: Sequence[Job], answerer: Answerer) -> Iterator[tuple[list[Job], list[Encoded]]]:
        """Prompts are prepared while the batch before them is answered."""
        settings = self.task.settings

        def prepared(job: Job) -> Encoded:
            control, index = job
            example = self._shown[control](index, self.task.examples.__getitem__)
            names = settings.asks_by_name and settings.metric_of(example.group) == "iou"
            asked = conversation(example, settings.prompt, name_question=names)
            if isinstance(self.task.examples, Rows):
                asked = replace(asked, id=self.task.examples.where(index))
            return answerer.prepare(asked)

        prompts = ahead(iter(jobs), prepared, workers=WORKERS, depth=2 * self.batch_size)
        try:
            for start in range(0, len(jobs), self.batch_size):
                batch = list(jobs[start : start + self.batch_size])
                yield batch, [next(prompts) for _ in batch]
        finally:
            prompts.close()

    def _conclude(self, outputs: dict[Name, Output], asked: int, seconds: float) -> dict[str, Any]:
        scored: dict[str, list[Scored]] = {}
        for control in self.controls:
            said = {key: output.text for (under, key), output in outputs.items() if under == control}
            scored[control] = self.scorer.score(control, said)
        majority = self.scorer.majority()
        figures = {control: figures_of(each) for control, each in scored.items()}
        if majority:
            found = figures_of(majority, layout_of(scored[""]))
            if len(majority) < len(scored[""]):  # some groups have open answers, so there is no baseline of all
                found = [each for each in found if each.group not in (ALL, MACRO) and not math.isnan(each.value)]
            figures["majority"] = found
        write_scores(self.folder, scored, lambda control, key: self._told(key, outputs[control, key]))
        real = [outputs["", example.key] for example in self.task.light]
        return write_results(
            self.folder,
            self.run,
            task=self.task,
            parsers=self.scorer.parsers,
            figures=figures,
            pictures=len({each.cluster for each in scored[""]}),
            notes=[*self._notes(real), *_points(figures[""])],
            seconds=seconds,
            asked=asked,
            device=self.device,
        )

    def _told(self, key: str, output: Output) -> dict[str, Any]:
        """What belongs beside a score for whoever looks for mistakes."""
        example = self._by_key[key]
        box = None if example.box is None else [*example.box.sides]
        return {"question": example.question, "output": output.text, "reference": box or list(example.reference)}

    def _notes(self, real: Sequence[Output]) -> list[str]:
        settings, notes = self.task.settings, []
        cut = sum(output.finish == "length" for output in real)
        if cut:
            notes.append(
                f"{cut} of {len(real)} outputs were cut off at {settings.max_new_tokens} tokens; raise max_new_tokens, "
                "or ask for a shorter answer in the prompt"
            )
        if settings.metric == "cider_d":
            notes.append(
                f"CIDEr-D weighs words by the references of these {len(real)} pictures: comparable only with scores on "
                "the same pictures and references. Papers print it times 100"
            )
        sizes = {len(example.reference) for example in self.task.light}
        if settings.metric == "vqa_accuracy" and sizes != {10}:
            notes.append(f"rows have {min(sizes)} to {max(sizes)} answers; published VQA accuracy has ten")
        if settings.limit is not None:
            notes.append(f"limited to the first {settings.limit}: not comparable with figures on all of them")
        return notes


def _points(figures: Sequence[Figure]) -> list[str]:
    """A warning where intervals of headlines have no width: a bootstrap knows only what it has seen."""
    headlines: dict[str, Figure] = {}
    for each in figures:
        headlines.setdefault(each.group, each)
    points = [each for each in headlines.values() if each.low is not None and each.low == each.high]
    if not points:
        return []
    named = points[0].name + (f" and {len(points) - 1} more" if len(points) > 1 else "")
    return [
        f"intervals without width ({named}): all outputs there score alike, which is not certainty. What never showed "
        "in n independent trials may still happen in about 3 of n"
    ]


def _output(name: Name, said: Said) -> Output:
    control, key = name
    return Output(control, key, said.text, said.finish, said.new_tokens)


def write_results(
    folder: Path,
    run: dict[str, Any],
    *,
    task: Task,
    parsers: dict[str, str],
    figures: dict[str, list[Figure]],
    pictures: int,
    notes: list[str],
    seconds: float,
    asked: int,
    device: str,
) -> dict[str, Any]:
    """Write results.json and return what is in it. figures: the real ones under "", and under each control's name."""
    results = {
        **run,
        "metrics": list(task.settings.metrics),
        "parsers": parsers,
        "path": task.settings.data,
        "figures": {control or "real": [asdict(each) for each in several] for control, several in figures.items()},
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "pictures": pictures},
        "notes": notes,
        "seconds": round(seconds, 3),
        "outputs_in_this_run": asked,
        "device": device,
        "settings": task.settings.model_dump(mode="json"),
        "versions": versions(),
    }
    write_whole(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results
