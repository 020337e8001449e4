"""Outputs of a model for many prompts, a batch at a time."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from opsin.encode import Encoded, Encoder
from opsin.errors import GenerationError
from opsin.evaluate.tasks import TaskSettings
from opsin.generate.beam import Beams, beam_search
from opsin.generate.decode import generate
from opsin.generate.ready import load_ready
from opsin.generate.sampling import Sampling
from opsin.media.image import ImageMode
from opsin.text.grounding import spell
from opsin.text.messages import Conversation
from opsin.weights import Model


class Said(NamedTuple):
    """One output."""

    text: str
    finish: str
    new_tokens: int


class Answerer(Protocol):
    """What gives outputs. `prepare` is called from several threads, `answer` from one."""

    def prepare(self, conversation: Conversation) -> Encoded:
        """A question as the model reads it."""

    def answer(self, prompts: Sequence[Encoded]) -> list[Said]:
        """Outputs, in order."""


class ModelAnswerer:
    """A loaded model: the likeliest token each time, or a search with beams. Nothing is drawn."""

    def __init__(self, model: Model, settings: TaskSettings, *, image_mode: ImageMode, spells_boxes: bool) -> None:
        """spells_boxes: outputs keep marks of boxes that are control tokens, which text otherwise leaves out."""
        self.model = model
        self._encoder = Encoder(model.config, model.tokenizer, image_mode=image_mode)
        self._grounding = model.config.chat.grounding if spells_boxes else None
        self._sampling = Sampling(max_new_tokens=settings.max_new_tokens)
        self._beams = None
        if settings.beams is not None:
            self._beams = Beams(
                num_beams=settings.beams,
                max_new_tokens=settings.max_new_tokens,
                length_penalty=settings.length_penalty,
            )

    def prepare(self, conversation: Conversation) -> Encoded:
        """A question as the model reads it. Raises MessageError, MediaError or PlanError, naming the example."""
        encoded = self._encoder.encode(conversation)
        room = self.model.config.decoder.max_positions - encoded.num_tokens
        if room < 1:
            raise GenerationError(f"{conversation.id}: its prompt leaves no room for an answer")
        return encoded

    def answer(self, prompts: Sequence[Encoded]) -> list[Said]:
        """Outputs, in order; each is what its prompt alone would get."""
        tokenizer = self.model.tokenizer
        if self._beams is not None:
            answers = beam_search(self.model.vlm, prompts, tokenizer, self._beams)
        else:
            answers = generate(self.model.vlm, prompts, tokenizer, self._sampling)
        said = []
        for answer in answers:
            text = answer.text if self._grounding is None else spell(answer.ids, tokenizer, self._grounding).strip()
            said.append(Said(text, answer.finish, len(answer.ids)))
        return said


def load_answerer(
    name: str, settings: TaskSettings, *, image_mode: ImageMode, spells_boxes: bool, device: str, dtype: str
) -> ModelAnswerer:
    """Load a model to evaluate."""
    model = load_ready(name, device=device, dtype=dtype)
    return ModelAnswerer(model, settings, image_mode=image_mode, spells_boxes=spells_boxes)
