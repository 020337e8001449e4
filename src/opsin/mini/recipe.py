"""Fourth stage: everything learns together from pictures and clips, through `opsin train`'s loop.

Beside the tasks it asks what is in `practice.py`: one thing about each of several names, with only that taught.
"""

from dataclasses import dataclass
from pathlib import Path

from opsin.encode import Encoded, Encoder
from opsin.mini.connect import START
from opsin.mini.model import config
from opsin.mini.samples import sample, with_practice
from opsin.mini.talk import encoded
from opsin.spec.recipe import AdamW, BatchSize, Checkpoints, Muon, RunConfig, Schedule, Stage
from opsin.text.tokenizer import load_tokenizer
from opsin.train.log import Reporter
from opsin.train.runner import run as train

SAMPLES = 16
"""Samples per step, each with several questions in one conversation."""
QUESTIONS = 6
SHARES = (0.44, 0.15, 0.05, 0.2, 0.16)
"""More pairs of pictures and clips than the language model read, which had hardly begun to tell them apart."""
MUCH, LITTLE = with_practice(1.0), with_practice(0.3)
MUCH_SHARE = 0.45
"""Share of the samples that ask for `MUCH` practice; the others ask for `LITTLE`."""


@dataclass(frozen=True)
class Drawn:
    """A source of samples drawn on demand: it never ends, and no sample is seen twice."""

    seed: int
    first: int
    """Number of the first sample."""
    length: int
    encoder: Encoder

    def __len__(self) -> int:
        return self.length

    @property
    def fingerprint(self) -> str:
        """What decides the samples."""
        return f"opsin-mini {self.seed} {self.first} {self.length}"

    def sample(self, index: int, epoch: int) -> Encoded:
        """Sample `index` with all its questions in one conversation. (They are read in an order drawn from a seed.)"""
        number = self.first + epoch * self.length + index
        tasks = MUCH if index < MUCH_SHARE * self.length else LITTLE
        shown = sample(self.seed, number, "train", num_questions=QUESTIONS, shares=SHARES, tasks=tasks)
        return encoded(shown, self.encoder, id=f"mini-{number}")


STAGE = Stage(
    name="finetune",
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
    steps=5000,
)
TRAINED = f"training/{STAGE.name}"
"""Folder, in the recipe's, of the trained model."""


def run(folder: Path, *, seed: int, steps: int | None = None, reporter: Reporter | None = None) -> Path:
    """Train the model that `connect` left in `folder`; returns the folder of the trained model."""
    tokenizer = load_tokenizer(folder)
    assert STAGE.steps is not None
    steps = steps or STAGE.steps
    run_config = RunConfig(
        model=str(folder / START),
        output=str(folder / "training"),
        seed=seed,
        workers=1,
        log_every=25,
        checkpoint=Checkpoints(every=500),
        stages=(STAGE.replace(steps=steps),),
    )
    # One more: the language model has read those of the recipe's own seed.
    source = Drawn(seed + 1, 0, steps * SAMPLES, Encoder(config(tokenizer), tokenizer))
    return train(run_config, sources={STAGE.name: source}, reporter=reporter).folder
