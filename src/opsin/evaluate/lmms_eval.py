"""opsin's models in lmms-eval: `lmms-eval eval --model opsin --model_args pretrained=...` (docs/evaluation_lmms.md).

lmms-eval finds this module by the entry point `lmms_eval.models` of an installed opsin. Nothing here imports lmms-eval
before it asks: `manifest` and the two classes are made then. `Opsin` is a chat model, whose requests bring messages;
`OpsinSimple` is for tasks that bring a text and its pictures, which `--force_simple` asks for: in lmms-eval 0.7 only
those rank answers by their likelihood.
"""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, Literal

import torch

from opsin.encode import Encoder
from opsin.errors import ConfigError, GenerationError, MessageError, nearest
from opsin.generate.beam import Beams, beam_search
from opsin.generate.decode import generate
from opsin.generate.ready import choose_device, load_ready
from opsin.generate.sampling import MAX_STOP_LENGTH, MAX_STOP_STRINGS, Sampling
from opsin.generate.score import encode_answer, score
from opsin.media.image import ImageMode
from opsin.text.messages import Conversation, Message, assistant, system
from opsin.text.parse import parse

GROUP = "lmms_eval.models"
"""The entry point group that lmms-eval reads."""
NAME = "opsin"
MAX_NEW_TOKENS = 512
"""Where a task does not say."""
MARK = re.compile(r"<image(?: \d+)?>")
"""What stands for a picture in the text of simple requests."""
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TIMES = ("start_time", "end_time", "video_start", "video_end")

Scores = Literal["logprob", "loss"]


def manifest() -> Any:
    """What the entry point gives: lmms-eval's description of a model, its classes by their dotted paths."""
    registry = import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(
        model_id=NAME, chat_class_path=f"{__name__}.Opsin", simple_class_path=f"{__name__}.OpsinSimple"
    )


class Adapter:
    """Everything but the base class. Requests are lmms-eval's `Instance`s; what they hold is in their `args`.

    Answers come in the order of the requests. Boxes stay as the model writes them: a task that wants other units or
    another spelling has to convert them.
    """

    is_simple: bool
    task_dict: Any
    cache_hook: Any

    def __init__(
        self,
        pretrained: str = "opsin-mini",
        device: str = "auto",
        batch_size: int | str = 1,
        *,
        dtype: str = "auto",
        image_mode: ImageMode = "reference",
        system_prompt: str | None = None,
        scores: Scores = "logprob",
        max_new_tokens: int | str = MAX_NEW_TOKENS,
        max_batch_size: int | str | None = None,
        **others: Any,
    ) -> None:
        """pretrained: as for `opsin.load`. batch_size: requests that are answered together, with equal answers.

        image_mode: `reference` opens pictures as the authors' code does. scores: what `loglikelihood` gives: the sum of
        log probabilities, as documented, or `loss`, minus their mean, which lmms-eval 0.7 takes the smallest of.
        max_new_tokens: where a task does not say. max_batch_size is for batches that lmms-eval sizes, and unused.
        Raises ConfigError for settings that there are not.
        """
        super().__init__()
        known = ("pretrained", "device", "batch_size", "dtype", "image_mode", "system_prompt", "scores")
        for name in others:
            raise ConfigError(f"--model_args: opsin has no {name!r}{nearest(name, (*known, 'max_new_tokens'))}")
        for name, value, values in (
            ("image_mode", image_mode, ("reference", "display")),
            ("scores", scores, ("logprob", "loss")),
        ):
            if value not in values:
                raise ConfigError(f"--model_args: {name} is {value!r}; it is one of {', '.join(values)}")
        self.batch_size = _count("batch_size", batch_size)
        self.max_new_tokens = _count("max_new_tokens", max_new_tokens)
        self.system_prompt, self.scores = system_prompt, scores
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(_own_device(device))
        self.model = load_ready(pretrained, device=str(self.device), dtype=dtype)
        self.encoder = Encoder(self.model.config, self.model.tokenizer, image_mode=image_mode)

    @property
    def rank(self) -> int:
        """Which of the processes this is; lmms-eval gives each its share of the requests."""
        return self._rank

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self._world_size

    def clean(self) -> None:
        """Give the model's memory back, once all answers are there."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("encoder", None)
        super().clean()  # type: ignore[misc]  # the base class is lmms-eval's

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, cut where the first of its `until` begins."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(self._settings(request).items())), []).append(place)
        batches = [part for places in groups.values() for part in _batches(places, self.batch_size)]
        for part in _shown(batches, self._rank):
            asked = [requests[place] for place in part]
            settings = self._settings(asked[0])
            texts = self._generate([self._conversation(request) for request in asked], settings)
            for place, request, text in zip(part, asked, texts, strict=True):
                answers[place] = text
                self.cache_hook.add_partial("generate_until", (request.args[0], settings), text)
        return [answers[place] for place in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers to all rounds of each request: a task makes the next round of the answers so far."""
        return [self._rounds(request) for request in _shown(requests, self._rank)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log likelihood, whether it is what greedy decoding would say) of each request's given answer.

        White space around the answer is left out: chat formats write their own.
        """
        found: list[tuple[float, bool]] = []
        for part in _shown(_batches(requests, self.batch_size), self._rank):
            encoded = [encode_answer(self.encoder, self._with_answer(request)) for request in part]
            for each in score(self.model.vlm, encoded):
                loss = -each.log_probability / max(each.num_tokens, 1)
                found.append((each.log_probability if self.scores == "logprob" else loss, each.is_greedy))
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", tuple(map(str, request.args[:2])), result)
        return found

    # ---- from requests to conversations ------------------------------------------------------------------------------

    def _messages(self, args: Sequence[Any], doc: Any) -> Any:
        """The messages of a request of one round."""
        if not self.is_simple:
            *_, doc_to_messages, _, _, _, _ = args
            return doc_to_messages(doc)
        text, _, doc_to_visual, *_ = args
        return _beside(text, doc_to_visual(doc))

    def _conversation(self, request: Any) -> Conversation:
        """What a request of one round asks."""
        return self._parse(self._messages(request.args, self._doc(request.args)), _name(request.args))

    def _settings(self, request: Any) -> dict[str, Any]:
        """How a request is to be answered: the task's `generation_kwargs`."""
        return dict(request.args[1 if self.is_simple else -4] or {})

    def _with_answer(self, request: Any) -> Conversation:
        """Question and answer of a request for a likelihood."""
        text, target, *rest = request.args
        doc_to_visual = rest[0] if rest else None
        doc = self._doc(request.args) if rest else None
        if self.scores == "logprob" and rest and isinstance(target, str):
            warnings.warn(
                "lmms-eval 0.7 takes the answer with the smallest number in multiple-choice tasks, and log "
                "probabilities are largest for the likeliest: add scores=loss to --model_args",
                stacklevel=2,
            )
        answer = target if isinstance(target, str) else target(doc)
        if not isinstance(answer, str):
            raise MessageError(f"{_name(request.args)}: the target is {type(answer).__name__}, not a text")
        messages = _beside(text[0] if isinstance(text, list) else text, doc_to_visual(doc) if doc_to_visual else ())
        asked = self._parse(messages, _name(request.args))
        return Conversation((*asked.messages, assistant(answer.strip())), asked.images, asked.id, asked.videos)

    def _doc(self, args: Sequence[Any]) -> Any:
        doc_id, task, split = args[-3:]
        return self.task_dict[task][split][doc_id]

    def _parse(self, messages: Any, name: str) -> Conversation:
        for content in [message.get("content") for message in messages if isinstance(message, dict)]:
            for part in content if isinstance(content, list) else ():
                _refuse_excerpt(part, name)
        conversation = parse(messages, where=name)
        opening: tuple[Message, ...] = ()
        if self.system_prompt is not None and conversation.messages[0].role != "system":
            opening = (system(self.system_prompt),)
        return Conversation(
            (*opening, *conversation.messages), conversation.images, id=name, videos=conversation.videos
        )

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _generate(self, conversations: Sequence[Conversation], settings: dict[str, Any]) -> list[str]:
        prompts = [self.encoder.encode(each) for each in conversations]
        until = _until(settings.get("until"))
        how = sampling_of(settings, until, max_new_tokens=self.max_new_tokens)
        vlm, tokenizer = self.model.vlm, self.model.tokenizer
        if isinstance(how, Beams):
            answers = beam_search(vlm, prompts, tokenizer, how)
        else:
            answers = generate(vlm, prompts, tokenizer, how)
        return [cut(answer.text, until) for answer in answers]

    def _rounds(self, request: Any) -> list[str]:
        args, answers, info = request.args, list[str](), None
        doc, name = self._doc(args), _name(args)
        messages, settings = self._messages(args, doc), self._settings(request)
        while True:
            answers.append(self._generate([self._parse(messages, f"{name}, round {len(answers) + 1}")], settings)[0])
            make = args[3] if self.is_simple else args[-5]
            made = make(doc, round_idx=len(answers), previous_output=list(answers), previous_round_info=info)
            if not isinstance(made, tuple):
                return answers
            *asked, is_last, given, info = made
            if given is not None and isinstance(given, list | tuple):
                answers = list(given)  # a task may have changed them
            if is_last:
                return answers
            messages = _beside(asked[1], asked[0]) if self.is_simple else asked[0]


def __getattr__(name: str) -> Any:
    """`Opsin` and `OpsinSimple`, made of lmms-eval's base class when it asks for them."""
    if name not in ("Opsin", "OpsinSimple"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        base = import_module("lmms_eval.api.model").lmms
    except ImportError as error:
        raise ConfigError(
            f"lmms-eval cannot be imported ({error}). Install it beside opsin: pip install 'opsin[lmms-eval]'"
        ) from None
    space = {"is_simple": name == "OpsinSimple", "__module__": __name__, "__doc__": Adapter.__doc__}
    globals()[name] = made = type(name, (Adapter, base), space)
    return made


def sampling_of(settings: dict[str, Any], until: Sequence[str], *, max_new_tokens: int) -> Sampling | Beams:
    """A task's `generation_kwargs` as settings of opsin; those that opsin has no word for are left out.

    Answers are greedy unless a temperature above 0 is given and `do_sample` is not false.
    """
    limit = int(settings.get("max_new_tokens") or max_new_tokens)
    temperature = float(settings.get("temperature") or 0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    num_beams = int(settings.get("num_beams") or 1)
    if num_beams > 1:
        if temperature > 0:
            raise GenerationError(f"num_beams {num_beams} at temperature {temperature:g}: opsin does one or the other")
        return Beams(num_beams, limit, length_penalty=float(settings.get("length_penalty") or 1))
    drawn: dict[str, Any] = {}
    if temperature > 0:
        top_p, top_k = settings.get("top_p"), settings.get("top_k")
        drawn = {"top_p": float(top_p) if top_p else None, "top_k": int(top_k) if top_k else None}
        drawn["seed"] = settings.get("seed")
    # Those that opsin searches for end an answer early; `cut` does all of them in the end.
    stops = tuple(text for text in until if len(text) <= MAX_STOP_LENGTH)[:MAX_STOP_STRINGS]
    penalty = float(settings.get("repetition_penalty") or 1)
    return Sampling(limit, temperature, repetition_penalty=penalty, stop_strings=stops, **drawn)


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first of some strings."""
    places = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(places)].rstrip() if places else text


def _until(given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given or ())
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"until is {given!r}; it is a text or a list of texts")
    return tuple(text for text in texts if text)


def _beside(text: str, visuals: Any) -> list[dict[str, Any]]:
    """One question as a message: its pictures and videos where the text has marks for exactly these, else in front."""
    visuals = visuals if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
    visuals = visuals[0] if len(visuals) == 1 and isinstance(visuals[0], list) else visuals
    media = [_media(each) for each in visuals if each is not None]
    texts = [{"type": "text", "text": piece} for piece in MARK.split(text)]
    if media and len(texts) == len(media) + 1:
        parts = [texts[0], *(part for pair in zip(media, texts[1:], strict=True) for part in pair)]
    else:
        parts = [*media, {"type": "text", "text": MARK.sub("", text) if media else text}]
    return [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


def _media(visual: Any) -> dict[str, Any]:
    """A picture or video that a task gives. As in lmms-eval a text names a video unless it ends as pictures do."""
    if isinstance(visual, dict):
        return {"type": visual.get("type") or ("audio" if "array" in visual else "video"), "url": visual}
    is_video = isinstance(visual, str) and not visual.lower().endswith(PICTURES)
    return {"type": "video" if is_video else "image", "url": visual}


def _refuse_excerpt(part: Any, name: str) -> None:
    """An excerpt of a video would be shown whole."""
    held = part.get("url") if isinstance(part, dict) else None
    for place in (part, held):
        if isinstance(place, dict) and any(place.get(key) is not None for key in TIMES):
            raise MessageError(f"{name}: a part of a video is asked for by its times, and opsin shows whole videos")


def _name(args: Sequence[Any]) -> str:
    """What messages call a request: its task and document."""
    return f"{args[-2]}[{args[-1]}] {args[-3]}" if len(args) > 3 else "a request without a document"


def _own_device(device: str) -> str:
    """The device of this process: of several GPUs, the one of its number on the machine."""
    chosen = choose_device(device)
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if chosen == "cuda" and "LOCAL_RANK" in os.environ else chosen


def _count(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"--model_args: {name} is {value!r}; it is a whole number from 1 on")
    return int(value)


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _shown(items: Sequence[Any], rank: int) -> Iterable[Any]:
    """The items, with a bar on the first process of several."""
    bar: Iterable[Any] = import_module("tqdm").tqdm(items, desc=NAME, disable=rank != 0)
    return bar
