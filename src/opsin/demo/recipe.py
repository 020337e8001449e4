"""The demo's model and its two stages: LLaVA-1.5's, at a size that trains in minutes.

stage        trains                 on                       as published (arXiv:2310.03744, section 3)
pretrain     connector              captions                 projector only, on image-caption pairs
finetune     connector, decoder     questions and answers    projector and language model, on instructions
The tower stays frozen in both. Tower and language model are pretrained, as CLIP and Vicuna are: docs/demo_parts.md.
Learning rates, optimizer and steps are ours; the published ones are those of a model four thousand times the size.
"""

from dataclasses import dataclass

from opsin.demo.tasks import sample
from opsin.spec.recipe import AdamW, BatchSize, Muon, RunConfig, Schedule, Stage
from opsin.text.messages import Conversation, Message, assistant, user

PICTURES = 16
"""Pictures per step, each with several questions in one conversation."""
QUESTIONS = 8


@dataclass(frozen=True)
class Drawn:
    """A source of pictures drawn on demand: no two epochs are needed, because it never ends."""

    kind: str
    """`captions`, or `questions`."""
    seed: int
    first: int
    """Number of the first picture, so that stages see different ones."""
    length: int

    def __len__(self) -> int:
        return self.length

    @property
    def fingerprint(self) -> str:
        """What decides the samples."""
        return f"drawn {self.kind} {self.seed} {self.first} {self.length}"

    def sample(self, index: int, epoch: int) -> Conversation:
        """Picture `index` with its caption, or with its questions in one conversation."""
        number = self.first + epoch * self.length + index
        drawn = sample(self.seed, number, "train", num_questions=QUESTIONS)
        messages: list[Message] = []
        if self.kind == "captions":
            messages = [user("", images=[0]), assistant(drawn.caption)]
        else:
            for question in drawn.questions:
                messages += [user(question.text, images=[] if messages else [0]), assistant(question.answer)]
        return Conversation(tuple(messages), (drawn.picture,), id=f"{self.kind}-{number}")


PRETRAIN = Stage(
    name="pretrain",
    trainable=("connector",),
    chat="plain",
    batch=BatchSize(samples=PICTURES, form="pack"),
    optim=Muon(lr=4e-3, scale="match_rms_adamw", rest=AdamW(lr=2e-3, betas=(0.9, 0.98))),
    schedule=Schedule(warmup_ratio=0.1),
    steps=100,
)
FINETUNE = Stage(
    name="finetune",
    trainable=("connector", "decoder"),
    batch=PRETRAIN.batch,
    optim=Muon(
        lr=2e-3,
        part_lr={"connector": 4e-3},
        scale="match_rms_adamw",
        rest=AdamW(lr=1e-3, betas=(0.9, 0.98)),
    ),
    schedule=Schedule(warmup_ratio=0.05),
    steps=900,
)
"""Where time allows all their steps."""


def demo_run(output: str, *, seed: int, device: str, stage: Stage) -> RunConfig:
    """The run file of one of the demo's stages."""
    return RunConfig(model="demo", output=output, seed=seed, device=device, workers=1, log_every=25, stages=(stage,))
