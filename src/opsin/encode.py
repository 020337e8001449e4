"""The encoder: one conversation in, integers and prepared pictures out.

Text, pictures and the model's description meet here only. Everything that later code needs to know about a token (is it
taught, which row fills it, where does it come from) is decided here, once, and carried along as data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opsin.errors import MediaError, MessageError, OpsinError
from opsin.media.image import DEFAULT_LIMITS, ImageMode, Limits, check_plan, image_size, open_image
from opsin.media.prepare import Kernels, PreparedImage, prepare, prepare_video
from opsin.media.video import Video, open_video
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native
from opsin.spec.plan import ImagePlan, Size
from opsin.spec.positions import token_positions
from opsin.text.messages import Conversation
from opsin.text.objects import spell
from opsin.text.render import ControlSpan, ImageSpan, Span, render
from opsin.text.tokenise import TokenisedText, tokenise
from opsin.text.tokenizer import Tokenizer

Mode = Literal["prompt", "train"]


@dataclass(frozen=True, slots=True)
class Measure:
    """How long a conversation is, which can be known without decoding what it shows."""

    num_tokens: int
    num_image_tokens: int
    """Tokens that pictures and videos take."""
    num_supervised: int
    """Tokens that training teaches; the first token of all, which nothing comes before, does not count."""


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """One conversation as the model will see it. T tokens, S picture slots, A position axes."""

    ids: NDArray[np.int64]
    """(T,) token ids; at slots the checkpoint's image or video token, or 0: no model reads it."""
    supervised: NDArray[np.bool_]
    """(T,) tokens that training teaches."""
    positions: NDArray[np.int64]
    """(T, A) positions on A axes (`spec.positions`). The next token of an answer stands one past the largest."""
    slots: NDArray[np.int64]
    """(S,) places of the slots of pictures and videos, ascending."""
    slot_rows: NDArray[np.int64]
    """(S,) for each slot the row of its own picture or video that fills it (`RowLayout.order`)."""
    images: tuple[PreparedImage, ...]
    """Pictures and videos in order of their slots."""
    token_spans: NDArray[np.int64]
    """(T,) index into `spans` of the span that each token starts in."""
    spans: tuple[Span, ...]
    """What the conversation was rendered to."""
    encoder_length: int = 0
    """How many of the first tokens go to an encoder, in a model that has one; the rest is its decoder's."""
    name: str = ""
    notes: tuple[str, ...] = field(default=())
    """What was done to a picture on the way in, such as the choice of the first frame."""

    @property
    def num_tokens(self) -> int:
        """Tokens of text and pictures together."""
        return len(self.ids)

    @property
    def num_image_tokens(self) -> int:
        """Tokens that pictures and videos take."""
        return len(self.slots)

    @property
    def num_supervised(self) -> int:
        """Tokens that training teaches."""
        return int(self.supervised.sum())

    @property
    def measure(self) -> Measure:
        """Its length in numbers."""
        return Measure(self.num_tokens, self.num_image_tokens, int(self.supervised[1:].sum()))


class Encoder:
    """Encodes conversations for one model: the same object in chat, training, evaluation and serving."""

    def __init__(
        self,
        config: VLMConfig,
        tokenizer: Tokenizer,
        *,
        image_mode: ImageMode = "display",
        limits: Limits = DEFAULT_LIMITS,
        pixels: Literal["exact", "fast"] = "exact",
    ) -> None:
        """image_mode: `display` shows the model what people see (orientation applied, alpha on white); `reference`
        opens pictures exactly as the authors' code does. pixels: `fast` resizes pictures with torch, about three times
        faster and not quite exact; each note says how far off (`nn.pixels.FAST_ERROR`)."""
        self.config = config
        self.tokenizer = tokenizer
        self.image_mode = image_mode
        self.limits = limits
        self.pixels = pixels

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
            raise error.within(f"conversation {conversation.id!r}") from None

    def measure(self, conversation: Conversation, sizes: Sequence[Size], *, mode: Mode = "train") -> Measure:
        """What `encode` would give, in numbers. sizes: of its pictures. Videos are opened, but not decoded.

        Raises like `encode`, except for what only decoding shows and for `max_positions`.
        """
        _, text, shown = self._read(conversation, mode, lambda index: sizes[index])
        num_slots = 0
        for _, span in shown:
            if span.kind == "video":
                source, limits = conversation.videos[span.index], self.limits
                plan = self._plan_video(open_video(source, mode=self.image_mode, limits=limits, name="video"))
            else:
                plan = self._plan_image(sizes[span.index], f"image {span.index + 1}", conversation)
            num_slots += plan.num_slots
        return Measure(len(text.ids) - len(shown) + num_slots, num_slots, sum(text.supervised[1:]))

    def prepare_image(self, conversation: Conversation, index: int) -> tuple[PreparedImage, tuple[str, ...]]:
        """Open, plan and prepare picture `index` of the conversation; notes say what was done on the way in."""
        picture = open_image(
            conversation.images[index], mode=self.image_mode, limits=self.limits, name=f"image {index + 1}"
        )
        notes = picture.notes
        if conversation.max_pixels is not None and not isinstance(self.config.resolution, Native):
            notes += (f"its max_pixels, {conversation.max_pixels}, does not count: this model sets sizes itself",)
        plan = self._plan_image(picture.size, picture.name, conversation)
        if self.pixels == "exact":
            return prepare(picture, plan, self.config.vision), notes
        from opsin.nn.pixels import FAST_ERROR, Pixels

        prepared = prepare(picture, plan, self.config.vision, kernels=Pixels("pillow"))
        return prepared, (*notes, f"{picture.name} is resized in the fast way: {FAST_ERROR}")

    def prepare_video(self, conversation: Conversation, index: int) -> tuple[PreparedImage, tuple[str, ...]]:
        """Open and plan video `index` of the conversation, decode the frames that are shown, and prepare them."""
        video = open_video(
            conversation.videos[index], mode=self.image_mode, limits=self.limits, name=f"video {index + 1}"
        )
        plan = self._plan_video(video)
        from opsin.nn.pixels import Pixels  # the authors' code resizes frames with torch

        kernels: Kernels = Pixels("torch")
        frames = video.decode(list(dict.fromkeys(plan.frames)))
        prepared = prepare_video(frames, plan, self.config.vision, name=video.name, kernels=kernels)
        shown = f"{video.name}: {len(set(plan.frames))} of {video.num_frames} frames are shown"
        if video.times:
            shown += f", from {video.times[plan.frames[0]]:.2f} s to {video.times[plan.frames[-1]]:.2f} s"
        return prepared, (*video.notes, shown)

    def _plan_image(self, size: Size, name: str, conversation: Conversation) -> ImagePlan:
        config = self.config
        try:
            if conversation.max_pixels is not None and isinstance(config.resolution, Native):
                config = _shrunk(config, config.resolution, conversation.max_pixels)
            plan = config.plan(size, num_images=len(conversation.images))
        except OpsinError as error:
            raise type(error)(f"{name}: {error.message}", kind=error.kind or "media_ratio", fix=error.fix) from None
        check_plan(plan, self.limits, name)
        return plan

    def _size(self, conversation: Conversation, index: int) -> Size:
        """Size of picture `index`, which boxes on it count from, as it will be opened."""
        source = conversation.images[index]
        return image_size(source, mode=self.image_mode, limits=self.limits, name=f"image {index + 1}")

    def _plan_video(self, video: Video) -> ImagePlan:
        """The plan of a video, checked before its frames are decoded, which takes much longer."""
        try:
            plan = self.config.plan_video(video.size, num_frames=video.num_frames, rate=video.rate)
        except OpsinError as error:
            raise error.within(video.name) from None
        check_plan(plan, self.limits, video.name)
        if len(plan.frames) > self.limits.max_shown_frames:
            raise MediaError(
                f"{video.name}: {len(plan.frames)} frames would be shown, at most {self.limits.max_shown_frames} are "
                "(max_shown_frames). Show fewer per second."
            )
        if plan.num_slots > self.config.decoder.max_positions:
            raise MessageError(
                f"{video.name} takes {plan.num_slots} tokens ({len(plan.frames)} frames), but the model was trained "
                f"for {self.config.decoder.max_positions}. Show fewer frames (resolution.video.max_frames), or smaller."
            )
        return plan

    def _read(
        self, conversation: Conversation, mode: Mode, size_of: Callable[[int], Size]
    ) -> tuple[list[Span], TokenisedText, list[tuple[int, ImageSpan]]]:
        """Spans, tokens, and what is shown with its place among the tokens. size_of: of pictures that have boxes."""
        chat = self.config.chat
        messages = spell(conversation.messages, chat.grounding, size_of, controls=self.tokenizer.controls)
        spans = render(chat, messages, mode=mode)
        text = tokenise(spans, self.tokenizer)
        shown = [(entry, span) for entry, _ in text.images if isinstance(span := spans[text.spans[entry]], ImageSpan)]
        _check_marks(conversation, [span for _, span in shown])
        return spans, text, shown

    def _encode(self, conversation: Conversation, mode: Mode) -> Encoded:
        spans, text, shown = self._read(conversation, mode, partial(self._size, conversation))
        opened = [
            (self.prepare_image if span.kind == "image" else self.prepare_video)(conversation, span.index)
            for _, span in shown
        ]
        images = tuple(image for image, _ in opened)
        counts = np.ones(len(text.ids), np.int64)
        entries = np.array([entry for entry, _ in shown], np.int64)
        counts[entries] = [image.plan.num_slots for image in images]
        total = int(counts.sum())
        if total > self.config.decoder.max_positions:
            num_image = int(counts[entries].sum())
            raise MessageError(
                f"the conversation takes {total} tokens ({total - num_image} of text, {num_image} of {len(images)} "
                f"pictures), but the model was trained for {self.config.decoder.max_positions}. Shorten the text or "
                "leave out pictures.",
                kind="too_long",
            )
        # Expand each picture's one entry to its slots; everything else keeps its one place.
        is_image = np.zeros(len(text.ids), np.bool_)
        is_image[entries] = True
        ids = np.array(text.ids, np.int64)
        slot_ids = {"image": self.config.image_token_id or 0, "video": self.config.video_token_id or 0}
        ids[entries] = [slot_ids[span.kind] for _, span in shown]
        rows = [image.plan.layout.order for image in images]
        starts = (counts.cumsum() - counts)[entries].tolist()
        decoder = [entry for entry, span in enumerate(text.spans) if _begins_decoder(spans[span])]
        rasters = [(start, image.plan.raster) for start, image in zip(starts, images, strict=True) if image.plan.raster]
        return Encoded(
            ids=np.repeat(ids, counts),
            supervised=np.repeat(np.array(text.supervised, np.bool_), counts),
            positions=token_positions(total, rasters, self.config.decoder),
            slots=np.flatnonzero(np.repeat(is_image, counts)),
            slot_rows=np.concatenate(rows).astype(np.int64) if rows else np.zeros(0, np.int64),
            images=images,
            token_spans=np.repeat(np.array(text.spans, np.int64), counts),
            spans=tuple(spans),
            encoder_length=int(counts[: decoder[0]].sum()) if decoder else 0,
            name=conversation.id,
            notes=tuple(note for _, notes in opened for note in notes),
        )


def _shrunk(config: VLMConfig, resolution: Native, max_pixels: int) -> VLMConfig:
    """The description with a lower bound for its pictures."""
    most = min(max_pixels, resolution.max_pixels)
    return config.model_copy(update={"resolution": resolution.replace(max_pixels=most)})


def _begins_decoder(span: Span) -> bool:
    return isinstance(span, ControlSpan) and span.source == "decoder"


def _check_marks(conversation: Conversation, shown: list[ImageSpan]) -> None:
    """Raise MessageError where marks and what is given do not match: the renderer knew only the marks."""
    for kind, noun, given in (("image", "picture", conversation.images), ("video", "video", conversation.videos)):
        marked = sorted(span.index for span in shown if span.kind == kind)
        if marked != list(range(len(given))):
            raise MessageError(
                f"{len(given)} {noun}s are given, but the text shows {len(marked)} {noun} marks (for {noun}s "
                f"{[index + 1 for index in marked]}). Every {noun} must be marked exactly once."
            )
