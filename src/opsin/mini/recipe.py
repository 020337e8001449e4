"""Fourth stage: everything learns together from pictures and clips with questions, through `opsin train`'s loop."""

from dataclasses import dataclass
from pathlib import Path

from opsin.encode import Encoded, Encoder
from opsin.mini.connect import START
from opsin.mini.model import config
from opsin.mini.samples import sample
from opsin.mini.talk import encoded
from opsin.spec.recipe import AdamW, BatchSize, Checkpoints, Muon, RunConfig, Schedule, Stage
from opsin.text.tokenizer import load_tokenizer
from opsin.train.log import Reporter
from opsin.train.runner import run as train

STEPS = 3200
SAMPLES = 16
"""Samples per step, each with several questions in one conversation."""
QUESTIONS = 6
SHARES = (0.39, 0.18, 0.06, 0.21, 0.16)
"""More pairs of pictures and clips than the language model read, which had hardly begun to tell them apart."""
STAGE = "finetune"


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
        """Sample `index` with all its questions in one conversation."""
        number = self.first + epoch * self.length + index
        shown = sample(self.seed, number, "train", num_questions=QUESTIONS, shares=SHARES)
        return encoded(shown, self.encoder, id=f"mini-{number}")


def stage(steps: int) -> Stage:
    """The stage, of so many steps."""
    return Stage(
        name=STAGE,
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


def finetune(folder: Path, *, seed: int, steps: int = STEPS, reporter: Reporter | None = None) -> Path:
    """Train the model that `connect` wrote to `folder`; returns the folder of the trained model."""
    tokenizer = load_tokenizer(folder)
    run_config = RunConfig(
        model=str(folder / START),
        output=str(folder / "training"),
        seed=seed,
        workers=1,
        log_every=25,
        checkpoint=Checkpoints(every=500),
        stages=(stage(steps),),
    )
    # Other samples than the language model has read.
    source = Drawn(seed + 1, 0, steps * SAMPLES, Encoder(config(tokenizer), tokenizer))
    return train(run_config, sources={STAGE: source}, reporter=reporter).folder
