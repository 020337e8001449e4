"""A conversation that goes on: each turn reuses the keys and values of everything said before."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opsin.encode import Encoded, Encoder
from opsin.errors import GenerationError
from opsin.generate.beam import Beams, beam_stream
from opsin.generate.decode import Answer, stream
from opsin.generate.sampling import Sampling
from opsin.media.image import ImageMode
from opsin.media.prepare import PreparedImage
from opsin.nn.cache import KVCache, decode_dtype
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.text.grounding import Reading, read, spell
from opsin.text.messages import Conversation, ImageSource, Message, VideoSource, assistant, system, user
from opsin.text.tokenizer import Tokenizer
from opsin.text.window import newest_turns, only

ANY_SIZE = (448, 448)
"""Of a picture: models with a window give pictures of all sizes as many tokens."""


class ChatModel(Protocol):
    """What a chat needs of a loaded model (`weights.Model` is one)."""

    vlm: VLM
    config: VLMConfig

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""


class Chat:
    """One conversation with a model.

    `ask` answers at once, `stream` piece by piece. Pictures and videos are shown before the text of their turn. Each is
    prepared and run once, however many questions follow: the next prompt begins with the tokens of the last one, and
    what the cache holds of it is not run again.

    Where the model's generation_config.json names a `max_window_size` (Qwen-VL-Chat: 6144 tokens), the oldest exchanges
    that do not fit it are left out of a prompt whole, with what they show (`text.window`); `messages` keeps them.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        sampling: Sampling | Beams = Sampling(),
        system_text: str | None = None,
        image_mode: ImageMode = "display",
    ) -> None:
        """sampling: `Beams` search for each answer, which then comes at once.

        system_text: replaces the chat format's own; "" leaves it out where the format allows.
        """
        if isinstance(sampling, Sampling) and sampling.num_sequences != 1:
            raise GenerationError(f"a chat goes on with one answer a turn; num_sequences is {sampling.num_sequences}")
        self.model = model
        self.sampling = sampling
        self._encoder = _RememberingEncoder(model.config, model.tokenizer, image_mode=image_mode)
        self._opening = () if system_text is None else (system(system_text),)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said and shown."""
        self.messages: list[Message] = list(self._opening)
        self.images: list[ImageSource] = []
        self.videos: list[VideoSource] = []
        self.answer: Answer | None = None
        """The last answer, once it is complete."""
        self.prompt: Encoded | None = None
        """The last prompt."""
        self.num_left_out = 0
        """Messages that the last prompt had no room for in the model's window."""
        self._encoder.forget_from(0, 0)
        self._cache: KVCache | None = None
        self._cached = np.zeros(0, np.int64)

    def ask(self, text: str, *images: ImageSource, videos: Sequence[VideoSource] = ()) -> Answer:
        """The answer to one more turn."""
        for _ in self.stream(text, *images, videos=videos):
            pass
        assert self.answer is not None
        return self.answer

    def stream(self, text: str, *images: ImageSource, videos: Sequence[VideoSource] = ()) -> Iterator[str]:
        """The answer to one more turn, as its text comes; `answer` holds it afterwards.

        A turn that cannot be encoded leaves the conversation as it was. Closing the iterator, or an exception such as
        KeyboardInterrupt, ends the answer: what was said so far stays in the conversation as its text.
        """
        question = user(
            text,
            images=range(len(self.images), len(self.images) + len(images)),
            videos=range(len(self.videos), len(self.videos) + len(videos)),
        )
        conversation = Conversation((*self.messages, question), (*self.images, *images), videos=(*self.videos, *videos))
        self._encoder.forget_from(len(self.images), len(self.videos))  # a turn that failed may have left some
        prompt, num_left_out = self._encode(conversation)
        if num_left_out != self.num_left_out:
            self._cached = self._cached[:0]  # another beginning, whose slots may show other pictures
        cache = self._reusable_cache(prompt)
        if isinstance(self.sampling, Beams):
            chunks = beam_stream(self.model.vlm, [prompt], self.model.tokenizer, self.sampling)
        else:
            chunks = stream(self.model.vlm, [prompt], self.model.tokenizer, self.sampling, cache=cache)
        self.messages.append(question)
        self.images += images
        self.videos += videos
        self.answer, self.prompt, self.num_left_out = None, prompt, num_left_out
        ids: list[int] = []
        pieces: list[str] = []
        try:
            for chunk in chunks:
                ids.append(chunk.id)
                pieces.append(chunk.text)
                self.answer = chunk.answer
                if chunk.text:
                    yield chunk.text
        finally:
            self.messages.append(assistant("".join(pieces).strip()))
            # Every sampled id but the last was run; after an interruption perhaps one less.
            self._cached = _marked(prompt, ids)[: cache.lengths[0]]

    def boxes(self) -> Reading:
        """The boxes of the last answer, in pixels of the last picture shown. Raises GenerationError.

        A box does not say which picture it is on, so ask about one.
        """
        grounding = self.model.config.chat.grounding
        if grounding is None:
            raise GenerationError(
                f"this model (chat format {self.model.config.chat.name}) was not taught to write boxes; take one that "
                "was, such as llava-1.5-7b or qwen2-vl-2b-instruct"
            )
        pictures = [] if self.prompt is None else [each.plan for each in self.prompt.images if not each.plan.frames]
        if self.answer is None or not pictures:
            raise GenerationError("there are no boxes without an answer about a picture; ask about one first")
        return read(spell(self.answer.ids, self.model.tokenizer, grounding), grounding, pictures[-1].size)

    def _encode(self, conversation: Conversation) -> tuple[Encoded, int]:
        """The prompt, and how many messages it has no room for."""
        window = getattr(self.model, "generation", {}).get("max_window_size")
        if window is None:
            return self._encoder.encode(conversation), 0
        config = self.model.config
        kept = newest_turns(
            config.chat,
            conversation.messages,
            self.model.tokenizer,
            slots_per_picture=config.plan(ANY_SIZE).num_slots,
            max_tokens=window,
        )
        shown, images, videos = only(conversation, kept)
        self._encoder.numbers = images, videos
        try:
            return self._encoder.encode(shown), len(conversation.messages) - len(kept)
        finally:
            self._encoder.numbers = None

    def _reusable_cache(self, prompt: Encoded) -> KVCache:
        """The cache, cut to what it has in common with the prompt."""
        if self._cache is None:
            weight = self.model.vlm.decoder.embed.weight
            self._cache = KVCache(
                self.model.config.decoder,
                batch_size=1,
                capacity=prompt.num_tokens + min(self.sampling.max_new_tokens, 512),
                dtype=decode_dtype(weight.dtype, weight.device),
                device=weight.device,
            )
        rope, begun = self.model.config.decoder.rope, self._cache.prompt_lengths[0]
        # Keys are stored rotated: a prompt long enough to be rotated otherwise is run anew.
        is_same = rope is None or not begun or rope.is_same_for(begun, prompt.num_tokens)
        self._cache.truncate([_common_length(prompt, self._cached) if is_same else 0])
        return self._cache


class _RememberingEncoder(Encoder):
    """Prepares each picture and video of a growing conversation once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._images: dict[int, tuple[PreparedImage, tuple[str, ...]]] = {}
        self._videos: dict[int, tuple[PreparedImage, tuple[str, ...]]] = {}
        self.numbers: tuple[Sequence[int], Sequence[int]] | None = None
        """Which pictures and videos of the growing conversation the encoded one has, where some are left out."""

    def prepare_image(self, conversation: Conversation, index: int) -> tuple[PreparedImage, tuple[str, ...]]:
        number = index if self.numbers is None else self.numbers[0][index]
        if number not in self._images:
            self._images[number] = super().prepare_image(conversation, index)
        return self._images[number]

    def prepare_video(self, conversation: Conversation, index: int) -> tuple[PreparedImage, tuple[str, ...]]:
        number = index if self.numbers is None else self.numbers[1][index]
        if number not in self._videos:
            self._videos[number] = super().prepare_video(conversation, index)
        return self._videos[number]

    def forget_from(self, image: int, video: int) -> None:
        """Forget all pictures and videos from the ones of these numbers on."""
        self._images = {known: prepared for known, prepared in self._images.items() if known < image}
        self._videos = {known: prepared for known, prepared in self._videos.items() if known < video}


def _marked(prompt: Encoded, new_ids: list[int]) -> NDArray[np.int64]:
    """Ids of prompt and answer, with picture slots as negative numbers that no id equals.

    Pictures of one conversation come in order, so the n-th slot always shows the same part of the same picture.
    """
    ids = np.concatenate([prompt.ids, np.array(new_ids, np.int64)])
    ids[prompt.slots] = -1 - np.arange(len(prompt.slots))
    return ids


def _common_length(prompt: Encoded, cached: NDArray[np.int64]) -> int:
    """Tokens at the start of the prompt that are cached, at least one less than all, and no picture cut in two."""
    ids = _marked(prompt, [])
    length = min(len(ids) - 1, len(cached))
    differing = np.flatnonzero(ids[:length] != cached[:length])
    length = int(differing[0]) if len(differing) else length
    begin = 0
    for image in prompt.images:
        end = begin + image.plan.num_slots
        if begin < end and prompt.slots[begin] < length <= prompt.slots[end - 1]:
            return int(prompt.slots[begin])
        begin = end
    return length
