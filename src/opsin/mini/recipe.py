"""Fourth and fifth stage: everything learns together from pictures and clips, through `opsin train`'s loop.

`finetune` asks tasks and exercises; `practise` goes on from there, with what is in `practice.py` in place of these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opsin.encode import Encoded, Encoder
from opsin.mini.connect import START
from opsin.mini.model import config
from opsin.mini.samples import sample, with_practice
from opsin.mini.talk import encoded
from opsin.mini.tasks import Asked
from opsin.spec.recipe import AdamW, BatchSize, Checkpoints, Muon, RunConfig, Schedule, Stage
from opsin.text.tokenizer import load_tokenizer
from opsin.train.log import Reporter
from opsin.train.runner import run as train

SAMPLES = 16
"""Samples per step, each with several questions in one conversation."""
QUESTIONS = 6
SHARES = (0.39, 0.18, 0.06, 0.21, 0.16)
"""More pairs of pictures and clips than the language model read, which had hardly begun to tell them apart."""
MUCH, LITTLE = with_practice(1.0), with_practice(0.3)
MUCH_SHARE = 0.35
"""Share of the samples of `practise` that ask for `MUCH` practice; the others ask for `LITTLE`."""


@dataclass(frozen=True)
class Drawn:
    """A source of samples drawn on demand: it never ends, and no sample is seen twice."""

    seed: int
    first: int
    """Number of the first sample."""
    length: int
    encoder: Encoder
    practises: bool

    def __len__(self) -> int:
        return self.length

    @property
    def fingerprint(self) -> str:
        """What decides the samples."""
        return f"opsin-mini {self.seed} {self.first} {self.length} {self.practises}"

    def sample(self, index: int, epoch: int) -> Encoded:
        """Sample `index` with all its questions in one conversation. (They are read in an order drawn from a seed.)"""
        number = self.first + epoch * self.length + index
        tasks: Mapping[str, Asked] | None = None
        if self.practises:
            tasks = MUCH if index < MUCH_SHARE * self.length else LITTLE
        shown = sample(self.seed, number, "train", num_questions=QUESTIONS, shares=SHARES, tasks=tasks)
        return encoded(shown, self.encoder, id=f"mini-{number}")


@dataclass(frozen=True)
class Training:
    """One of the two stages."""

    name: str
    start: str
    """Folder, in the recipe's, of the model that it begins with."""
    steps: int
    seed: int
    """Added to the recipe's, so that each stage sees other samples."""
    practises: bool = False

    def stage(self, steps: int) -> Stage:
        """The stage, of so many steps."""
        return Stage(
            name=self.name,
            trainable=("connector", "decoder"),
            batch=BatchSize(samples=SAMPLES, form="pack"),
            optim=Muon(
                lr=2e-3,
                part_lr={"connector": 1e-3},
                weight_decay=0.02,
                scale="match_rms_adamw",
                rest=AdamW(lr=1e-3, betas=(0.9, 0.98)),
            ),
            schedule=Schedule(warmup_steps=30, min_lr=2e-5),
            steps=steps,
        )

    @property
    def folder(self) -> str:
        """Where it trains, in the recipe's folder."""
        return f"training/{self.name}"

    def run(self, folder: Path, *, seed: int, steps: int | None = None, reporter: Reporter | None = None) -> Path:
        """Train the model that the stage before left in `folder`; returns the folder of the trained model."""
        tokenizer = load_tokenizer(folder)
        steps, seed = steps or self.steps, seed + self.seed
        run_config = RunConfig(
            model=str(folder / self.start),
            output=str(folder / self.folder),
            seed=seed,
            workers=1,
            log_every=25,
            checkpoint=Checkpoints(every=500),
            stages=(self.stage(steps),),
        )
        # One more: the language model has read those of the recipe's own seed.
        source = Drawn(seed + 1, 0, steps * SAMPLES, Encoder(config(tokenizer), tokenizer), self.practises)
        return train(run_config, sources={self.name: source}, reporter=reporter).folder


FINETUNE = Training("finetune", START, 3200, 0)
PRACTISE = Training("practise", f"{FINETUNE.folder}/{FINETUNE.name}", 3600, 10, practises=True)
