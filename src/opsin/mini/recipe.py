"""Fourth stage: everything learns together from pictures and clips with questions, through `opsin train`'s loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opsin.mini.connect import START
from opsin.mini.talk import conversation
from opsin.mini.tasks import sample
from opsin.spec.recipe import AdamW, BatchSize, Checkpoints, Muon, RunConfig, Schedule, Stage
from opsin.text.messages import Conversation
from opsin.train.log import Reporter
from opsin.train.runner import run as train

STEPS = 2300
SAMPLES = 16
"""Samples per step, each with several questions in one conversation."""
QUESTIONS = 6
STAGE, PRACTICE = "finetune", "practise"
PRACTICE_STEPS = 600
PRACTICE_WEIGHTS = {
    "position": 6.0,
    "relation": 4.0,
    "places": 8.0,
    "box": 2.0,
    "more": 3.0,
    "colours": 1.0,
    "colour": 0.5,
    "count": 1.0,
    "exists": 0.5,
    "larger": 1.5,
}
"""What is asked in the last stage: mostly what the stage before left at its baseline, and a little of the rest."""


@dataclass(frozen=True)
class Drawn:
    """A source of samples drawn on demand: it never ends, and no sample is seen twice."""

    seed: int
    first: int
    """Number of the first sample."""
    length: int
    weights: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.length

    @property
    def fingerprint(self) -> str:
        """What decides the samples."""
        return f"opsin-mini {self.seed} {self.first} {self.length} {sorted(self.weights.items())}"

    def sample(self, index: int, epoch: int) -> Conversation:
        """Sample `index` with all its questions in one conversation."""
        number = self.first + epoch * self.length + index
        shown = sample(self.seed, number, "train", num_questions=QUESTIONS, weights=self.weights)
        return conversation(shown, id=f"mini-{number}")


def stage(name: str, steps: int) -> Stage:
    """One of the two stages with its number of steps. The second begins at lower rates."""
    share = 1.0 if name == STAGE else 0.6
    return Stage(
        name=name,
        trainable=("connector", "decoder"),
        batch=BatchSize(samples=SAMPLES, form="pack"),
        optim=Muon(
            lr=share * 2e-3,
            part_lr={"connector": share * 1e-3},
            weight_decay=0.02,
            scale="match_rms_adamw",
            rest=AdamW(lr=share * 1e-3, betas=(0.9, 0.98)),
        ),
        schedule=Schedule(warmup_steps=30, min_lr=2e-5),
        steps=steps,
    )


def finetune(folder: Path, *, seed: int, steps: int = STEPS, reporter: Reporter | None = None) -> Path:
    """Train the model that `connect` wrote to `folder`; returns the folder of the trained model."""
    # Other samples than the language model has read.
    return _train(
        folder / START, folder / "training", STAGE, Drawn(seed + 1, 0, steps * SAMPLES), steps, seed, reporter
    )


def practise(folder: Path, *, seed: int, steps: int = PRACTICE_STEPS, reporter: Reporter | None = None) -> Path:
    """Train the model that `finetune` left on what it cannot do yet; returns the folder of the trained model."""
    source = Drawn(seed + 2, 0, steps * SAMPLES, PRACTICE_WEIGHTS)
    return _train(folder / "training" / STAGE, folder / "practice", PRACTICE, source, steps, seed, reporter)


def _train(
    model: Path, output: Path, name: str, source: Drawn, steps: int, seed: int, reporter: Reporter | None
) -> Path:
    config = RunConfig(
        model=str(model),
        output=str(output),
        seed=seed,
        workers=1,
        log_every=25,
        checkpoint=Checkpoints(every=500),
        stages=(stage(name, steps),),
    )
    return train(config, sources={name: source}, reporter=reporter).folder
