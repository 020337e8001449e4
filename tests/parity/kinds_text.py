"""Runners of recorded text: prompts, training labels, plain tokenising."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from opsin.errors import ConfigError
from opsin.families._chats import CHATS
from opsin.spec.chat import ChatFormat, ImageMarkup
from opsin.text.messages import IMAGE_MARK, Message, assistant, system, user
from opsin.text.parse import parse
from opsin.text.render import ControlSpan, ImageSpan, Mode, Span, TextSpan, render
from opsin.text.tokenise import IMAGE, tokenise
from opsin.text.tokenizer import Tokenizer
from opsin.verify import texts
from opsin.verify.texts import id_keys, rows_of
from parity.case import Case

PROMPT_TWIN = {
    "default": "v0",
    "plain": "plain_prompt",
    "v0_plain": "plain_prompt",
    "vicuna_v1": "v1",
    "mistral_direct": "chatml_direct",
}
"""Our formats for templates that the authors list under a second name, or write differently for training."""
TRAINING_TWIN = {
    "default": "v0_train",
    "v0": "v0_train",
    "llava_v0": "v0_train",
    "v0_mmtag": "v0_mmtag_train",
    "v0_plain": "plain",
    "vicuna_v1": "v1",
    "mistral_direct": "chatml_direct",
}
"""The same for training text."""
ROLES = {"u": "user", "user": "user", "human": "user", "a": "assistant", "assistant": "assistant", "gpt": "assistant"}
ROLES |= {"s": "system", "system": "system"}
MAKERS: dict[str, Callable[[str], Message]] = {"user": user, "assistant": assistant, "system": system}


def tokenizer_of(case: Case, legacy: bool | None) -> Tokenizer:
    """The tokenizer that the case names; skips without it."""
    try:
        return texts.tokenizer_of(case, legacy)
    except ConfigError as error:
        pytest.skip(str(error))


def _chat(template: str, twins: dict[str, str]) -> ChatFormat:
    name = twins.get(template, template)
    assert name in CHATS, f"no chat format for the template {template!r}"
    return CHATS[name]


def _image_id(case: Case) -> int:
    return int(case.data.get("image_token_index", -200))


def _ids(spans: Sequence[Span], tokenizer: Tokenizer, image_id: int) -> list[int]:
    return [image_id if token_id == IMAGE else token_id for token_id in tokenise(spans, tokenizer).ids]


def _written(spans: Sequence[Span]) -> str:
    """Spans as the authors' prompt string, which lacks the token that their tokenizer adds at the start."""
    texts = []
    for span in spans:
        if isinstance(span, TextSpan):
            texts.append(span.text)
        elif isinstance(span, ImageSpan):
            texts.append(IMAGE_MARK)
        elif span.source != "begin":
            texts.append(span.token)
    return "".join(texts)


def run_prompt(case: Case) -> None:
    """Prompt strings of get_prompt, and their ids for both `legacy` flags where they were recorded."""
    rows = rows_of(case)
    assert rows, "no rows"
    for number, row in enumerate(rows):
        what = f"row {number} ({row['template']})"
        chat = _chat(row["template"], PROMPT_TWIN)
        turns = [(ROLES[role], text or "") for role, text in row["turns"]]
        if turns[-1] == ("assistant", ""):
            turns.pop()  # the authors ask for an answer with an empty last turn
        mode: Mode = "prompt" if turns[-1][0] == "user" else "train"
        spans = render(_bare(chat), _placed(turns, row["prompt"]).messages, mode=mode)
        assert _written(spans) == row["prompt"], what
        question = next(text for role, text in turns if role == "user")
        if (
            f"{IMAGE_MARK}\n{question}" in row["prompt"]
            and question
            and question.strip() == question
            and not chat.markup.before
        ):
            # The format itself puts a picture where the authors' chat puts it by hand.
            messages = [MAKERS[role](text) for role, text in turns]
            first = next(place for place, message in enumerate(messages) if message.role == "user")
            messages[first] = user(question, images=[0])
            assert _written(render(chat, messages, mode=mode)) == row["prompt"], what
        for key, legacy in id_keys(row):
            assert _ids(spans, tokenizer_of(case, legacy), _image_id(case)) == row[key], f"{what}, {key}"


def _bare(chat: ChatFormat) -> ChatFormat:
    """get_prompt is handed text that already holds the mark, so what stands around pictures was put there by hand."""
    return chat.replace(markup=ImageMarkup(placement="inline"))


def _placed(turns: Sequence[tuple[str, str]], prompt: str) -> Any:
    """The turns as a conversation; a picture of the prompt's that they do not show leads the first question."""
    values = [text for _, text in turns]
    if prompt.count(IMAGE_MARK) > sum(text.count(IMAGE_MARK) for text in values):
        first = next(place for place, (role, _) in enumerate(turns) if role == "user")
        values[first] = f"{IMAGE_MARK}\n{values[first]}"
    num_images = sum(text.count(IMAGE_MARK) for text in values)
    conversations = [{"from": role, "value": text} for (role, _), text in zip(turns, values, strict=True)]
    return parse({"image": ["picture.png"] * num_images, "conversations": conversations}, where="row")


def run_labels(case: Case) -> None:
    """Training ids and which of them are taught (preprocess_multimodal and preprocess of train.py)."""
    rows = rows_of(case)
    assert rows, "no rows"
    ignore = int(case.data.get("ignore_index", -100))
    for number, row in enumerate(rows):
        what = f"row {number} ({row.get('name', row['template'])}, legacy {row.get('legacy')})"
        tokenizer = tokenizer_of(case, row.get("legacy"))
        spans = render(_chat(row["template"], TRAINING_TWIN), _training_messages(row), mode="train")
        text = tokenise(spans, tokenizer)
        if any(name in turn["value"] for turn in row["conversations"] for name in tokenizer.controls):
            # The authors' tokenizer turns `</s>` in what people write into the control token; ours must not.
            _check_no_control_from_text(spans, tokenizer, what)
            continue
        ids = [_image_id(case) if token_id == IMAGE else token_id for token_id in text.ids]
        assert ids == row["input_ids"], what
        labels = [token_id if taught else ignore for token_id, taught in zip(ids, text.supervised, strict=True)]
        if labels != row["labels"]:
            _check_teaches_what_was_lost(row, ignore, spans, tokenizer, labels, what)


def _check_teaches_what_was_lost(
    row: dict[str, Any], ignore: int, spans: Sequence[Span], tokenizer: Tokenizer, labels: list[int], what: str
) -> None:
    """Labels may differ only where the authors' are known to be wrong; ours must teach every answer there.

    Their walk over the tokenised rounds loses its way when people write what rounds are split at, or when a question
    or an answer is empty. Most often it notices, and the whole sample is dropped with a warning.
    """
    dropped = set(row["labels"]) == {ignore}
    confused = any(mark in turn["value"] for turn in row["conversations"] for mark in ("ASSISTANT:", "[/INST]"))
    assert dropped or confused, f"{what}: labels differ"
    answers = [span.text for span in spans if isinstance(span, TextSpan) and span.source == "assistant"]
    assert answers, f"{what}: nothing to teach, yet labels differ"
    taught = tokenizer.decode([label for label in labels if label != ignore])
    for answer in answers:
        # sentencepiece writes spaces as U+2581, and so reads one in a text back as a space.
        assert answer.replace("\u2581", " ").strip() in taught, f"{what}: {answer!r} is not taught"


def _training_messages(row: dict[str, Any]) -> Sequence[Message]:
    if not row.get("has_image", True):
        # Marks of text-only samples were never looked for.
        return [MAKERS[ROLES[turn["from"]]](turn["value"]) for turn in row["conversations"]]
    conversations = []
    for turn in row["conversations"]:
        # preprocess_multimodal knows one picture per turn: several marks in a turn become one.
        first, *others = turn["value"].split(IMAGE_MARK)
        value = first + IMAGE_MARK + "".join(others) if others else first
        conversations.append({"from": turn["from"], "value": value})
    num_images = sum(turn["value"].count(IMAGE_MARK) for turn in conversations)
    return parse({"image": ["picture.png"] * num_images, "conversations": conversations}, where="row").messages


def _check_no_control_from_text(spans: Sequence[Span], tokenizer: Tokenizer, what: str) -> None:
    text = tokenise(spans, tokenizer)
    controls = set(tokenizer.controls.values())
    for token_id, place in zip(text.ids, text.spans, strict=True):
        assert isinstance(spans[place], ControlSpan) or token_id not in controls, what


def run_tokenizer(case: Case) -> None:
    """Text to ids."""
    try:
        rows = list(texts.tokenised(case))
    except ConfigError as error:
        pytest.skip(str(error))
    assert rows, "no rows"
    for what, ours, recorded in rows:
        assert ours == recorded, what


RUNNERS: dict[str, Callable[[Case], None]] = {
    "prompt": run_prompt,
    "labels": run_labels,
    "tokenizer": run_tokenizer,
}
