"""What a report says, as data. Shares are numbers from 0 to 1, times are seconds."""

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from opsin.inspect.curves import Curve
from opsin.inspect.tokens import MaskPiece
from opsin.spec.model import VLMConfig
from opsin.spec.plan import ImagePlan


@dataclass(frozen=True)
class Scores:
    """Answers to the same questions, three ways."""

    accuracy: float
    majority: float
    """What always giving a task's commonest answer earns."""
    shuffled: float
    """The model's accuracy when each question comes with another question's picture."""
    questions: int

    def __post_init__(self) -> None:
        shares = (self.accuracy, self.majority, self.shuffled)
        assert all(0 <= share <= 1 for share in shares), f"shares must lie in 0..1, not {shares}"


@dataclass(frozen=True)
class TaskScore:
    """One kind of question."""

    name: str
    scores: Scores
    example: str = ""
    """One question of this kind."""


@dataclass(frozen=True, eq=False)
class Answer:
    """One question about one picture."""

    picture: Image.Image
    task: str
    question: str
    answer: str
    """What the model said."""
    truth: str
    verdict: Literal["right", "wrong"]


@dataclass(frozen=True)
class FlowStep:
    """One station on the way from picture to answer."""

    name: str
    figure: str
    note: str


@dataclass(frozen=True, eq=False)
class PictureView:
    """A picture whose tiles and slots are drawn."""

    picture: Image.Image
    plan: ImagePlan
    name: str
    """What the picture shows, for those who cannot see it."""


@dataclass(frozen=True)
class MaskView:
    """A training conversation, from `tokens.mask_pieces`."""

    pieces: tuple[MaskPiece, ...]
    name: str = ""


@dataclass(frozen=True)
class TrainedPart:
    """Parameters of one part of the model."""

    name: str
    trainable: int
    total: int


@dataclass(frozen=True)
class StageView:
    """One stage of training."""

    name: str
    explanation: str
    """What it is for, in a sentence or two."""
    parts: tuple[TrainedPart, ...]
    seconds: float
    samples: int | None = None
    """Samples seen, repeats counted."""
    curve: Curve | None = None


@dataclass(frozen=True)
class RunFacts:
    """Where, how long, and how to do it again."""

    seconds: float
    peak_bytes: int
    machine: str
    command: str
    """What was typed to make this report."""
    chat_command: str
    """What to type to ask the trained model."""
    versions: str = ""


@dataclass(frozen=True, eq=False)
class Report:
    """Everything on the page. Sections without content are left out."""

    title: str
    summary: str
    """One or two sentences under the title."""
    scores: Scores
    """Averaged over tasks."""
    tasks: tuple[TaskScore, ...]
    answers: tuple[Answer, ...]
    flow: tuple[FlowStep, ...]
    picture: PictureView | None
    mask: MaskView | None
    stages: tuple[StageView, ...]
    run: RunFacts


def flow(config: VLMConfig, plan: ImagePlan) -> tuple[FlowStep, ...]:
    """The way of one picture through the model, with this model's numbers."""
    vision, decoder = config.vision, config.decoder
    features = sum(vision.num_tokens(tile.grid) for tile in plan.tiles)
    _, rows, columns = plan.tiles[0].grid
    newlines = plan.num_slots - int((plan.layout.order >= 0).sum())
    views = " and ".join(f"{c.size[0]} × {c.size[1]}" for c in plan.canvases)
    each = " each" if plan.num_tiles > 1 else ""
    return (
        FlowStep("picture", f"{plan.size[0]} × {plan.size[1]} px", f"drawn on {views} px"),
        FlowStep("tiles", str(plan.num_tiles), f"{columns} × {rows} patches of {vision.patch_size} px{each}"),
        FlowStep("features", f"{features} × {vision.out_dim}", f"vision tower, {vision.num_used_layers} blocks"),
        FlowStep("rows", f"{plan.num_rows} × {decoder.dim}", f"{config.connector.kind} connector"),
        FlowStep("slots", str(plan.num_slots), f"{newlines} of them newlines" if newlines else "one row each"),
        FlowStep("answer", "token by token", f"language model, {decoder.num_layers} blocks"),
    )
