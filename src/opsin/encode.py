"""The encoder: one conversation in, integers and prepared pictures out.

Text, pictures and the model's description meet here only. Everything that later code needs to know about a token (is it
taught, which row fills it, where does it come from) is decided here, once, and carried along as data.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opsin.errors import MessageError, OpsinError
from opsin.media.image import DEFAULT_LIMITS, ImageMode, Limits, check_plan, open_image
from opsin.media.prepare import PreparedImage, prepare
from opsin.spec.model import VLMConfig
from opsin.text.messages import Conversation
from opsin.text.render import Span, render
from opsin.text.tokenise import tokenise
from opsin.text.tokenizer import Tokenizer

Mode = Literal["prompt", "train"]


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """One conversation as the model will see it. T tokens, S picture slots, A position axes."""

    ids: NDArray[np.int64]
    """(T,) token ids; at picture slots the checkpoint's image token, or 0: no model reads it."""
    supervised: NDArray[np.bool_]
    """(T,) tokens that training teaches."""
    positions: NDArray[np.int64]
    """(T, A) rotary positions."""
    slots: NDArray[np.int64]
    """(S,) places of picture slots, ascending."""
    slot_rows: NDArray[np.int64]
    """(S,) for each slot the row of its own picture that fills it (`RowLayout.order`)."""
    images: tuple[PreparedImage, ...]
    """Pictures in order of their slots."""
    token_spans: NDArray[np.int64]
    """(T,) index into `spans` of the span that each token starts in."""
    spans: tuple[Span, ...]
    """What the conversation was rendered to."""
    name: str = ""
    notes: tuple[str, ...] = field(default=())
    """What was done to a picture on the way in, such as the choice of the first frame."""

    @property
    def num_tokens(self) -> int:
        """Tokens of text and pictures together."""
        return len(self.ids)

    @property
    def num_image_tokens(self) -> int:
        """Tokens that pictures take."""
        return len(self.slots)

    @property
    def num_supervised(self) -> int:
        """Tokens that training teaches."""
        return int(self.supervised.sum())


class Encoder:
    """Encodes conversations for one model: the same object in chat, training, evaluation and serving."""

    def __init__(
        self,
        config: VLMConfig,
        tokenizer: Tokenizer,
        *,
        image_mode: ImageMode = "display",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """image_mode: `display` shows the model what people see (orientation applied, alpha on white); `reference`
        opens pictures exactly as the authors' code does."""
        self.config = config
        self.tokenizer = tokenizer
        self.image_mode = image_mode
        self.limits = limits

    def encode(self, conversation: Conversation, *, mode: Mode = "prompt") -> Encoded:
        """Render, tokenise and prepare. `prompt` ends where the model is to answer; `train` ends with the last answer.

        The ids of a prompt are a prefix of the training ids of the same conversation with its answer.
        Raises MessageError, MediaError or PlanError, each naming the conversation.
        """
        try:
            return self._encode(conversation, mode)
        except OpsinError as error:
            if not conversation.id:
                raise
            raise type(error)(f"conversation {conversation.id!r}: {error}") from None

    def prepare_image(self, conversation: Conversation, index: int) -> tuple[PreparedImage, tuple[str, ...]]:
        """Open, plan and prepare picture `index` of the conversation; notes say what was done on the way in."""
        picture = open_image(
            conversation.images[index], mode=self.image_mode, limits=self.limits, name=f"image {index + 1}"
        )
        try:
            plan = self.config.plan(picture.size)
        except OpsinError as error:
            raise type(error)(f"{picture.name}: {error}") from None
        check_plan(plan, self.limits, picture.name)
        return prepare(picture, plan, self.config.vision), picture.notes

    def _encode(self, conversation: Conversation, mode: Mode) -> Encoded:
        spans = render(self.config.chat, conversation.messages, mode=mode)
        text = tokenise(spans, self.tokenizer)
        # The renderer has checked the marks against each other; here they are checked against the pictures.
        marked = sorted(index for _, index in text.images)
        if marked != list(range(len(conversation.images))):
            raise MessageError(
                f"{len(conversation.images)} pictures are given, but the text shows {len(marked)} picture marks "
                f"(for pictures {[index + 1 for index in marked]}). Every picture must be marked exactly once."
            )
        opened = [self.prepare_image(conversation, index) for _, index in text.images]
        images = tuple(image for image, _ in opened)
        counts = np.ones(len(text.ids), np.int64)
        entries = np.array([entry for entry, _ in text.images], np.int64)
        counts[entries] = [image.plan.num_slots for image in images]
        total = int(counts.sum())
        if total > self.config.decoder.max_positions:
            num_image = int(counts[entries].sum())
            raise MessageError(
                f"the conversation takes {total} tokens ({total - num_image} of text, {num_image} of {len(images)} "
                f"pictures), but the model was trained for {self.config.decoder.max_positions}. Shorten the text or "
                "leave out pictures."
            )
        # Expand each picture's one entry to its slots; everything else keeps its one place.
        is_image = np.zeros(len(text.ids), np.bool_)
        is_image[entries] = True
        ids = np.array(text.ids, np.int64)
        ids[entries] = self.config.image_token_id or 0
        rows = [image.plan.layout.order for image in images]
        return Encoded(
            ids=np.repeat(ids, counts),
            supervised=np.repeat(np.array(text.supervised, np.bool_), counts),
            positions=np.arange(total, dtype=np.int64)[:, None],
            slots=np.flatnonzero(np.repeat(is_image, counts)),
            slot_rows=np.concatenate(rows).astype(np.int64) if rows else np.zeros(0, np.int64),
            images=images,
            token_spans=np.repeat(np.array(text.spans, np.int64), counts),
            spans=tuple(spans),
            name=conversation.id,
            notes=tuple(note for _, notes in opened for note in notes),
        )
