"""InternVL against recorded text: ids of the published tokenizer, prompts of two generations, training labels."""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsin import families
from opsin.spec.chat import ChatFormat
from opsin.text._sentencepiece import SentencePieceTokenizer
from opsin.text.messages import IMAGE_MARK, Message, assistant, system, user
from opsin.text.parse import parse
from opsin.text.render import ControlSpan, ImageSpan, Span, TextSpan, render
from opsin.text.tokenise import IMAGE, tokenise
from opsin.text.tokenizer import Tokenizer
from parity.case import Case

CONTEXT, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
BLOCK = re.compile(f"{START}(?:{CONTEXT})+{END}")
LATER = {
    "internlm2-chat": "internlm2_chat_later",
    "Hermes-2": "internlm2_chat_later",
    "phi3-chat": "phi3_chat_later",
    "internvl2_5": "internvl2_5",
}
"""Our formats for the templates of the authors' later code; on their first day those had other system texts."""
RELEASE = {"internlm2-chat": "internlm2_chat", "phi3-chat": "phi3_chat"}


def tokenizer_of(case: Case) -> SentencePieceTokenizer:
    """The published model file with InternVL's added tokens, which stand in a file of facts beside it."""
    match = re.search(r"tokenizers/([\w.-]+)", str(case.data.get("tokenizer", "")))
    folder = case.tokenizers / (match[1] if match else "internlm2")
    if not folder.is_dir():
        pytest.skip(f"no tokenizer in {folder}: say where tokenizers lie with --tokenizers")
    return _load(folder)


@cache
def _load(folder: Path) -> SentencePieceTokenizer:
    facts = json.loads((folder / "tokenizer_facts.json").read_text(encoding="utf-8"))
    added = {number: {"content": token} for number, token in facts["added_tokens_decoder"].items()}
    return SentencePieceTokenizer(
        {
            "tokenizer.model": (folder / facts["model_file"]).read_bytes(),
            "tokenizer_config.json": json.dumps({"added_tokens_decoder": added}).encode(),
        }
    )


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def run_tokenizer(case: Case) -> None:
    """Ids, with and without a begin token, and back. Control tokens in recorded texts are given to ours as such."""
    tokenizer = tokenizer_of(case)
    added = {token: int(number) for number, token in case.data["added_tokens"].items()}
    assert {token: tokenizer.controls[token] for token in added} == added
    assert tokenizer.vocab_size == 1 + max(added.values())
    names = "|".join(map(re.escape, sorted(tokenizer.controls, key=len, reverse=True)))
    for number, row in enumerate(case.json("rows.json")):
        parts = [text for text in re.split(f"({names})", row["text"]) if text]
        spans: list[Span] = [
            ControlSpan(text, False) if text in tokenizer.controls else TextSpan(text, False, "template")
            for text in parts
        ]
        what = f"row {number}: {row['text']!r}"
        # Text alone reaches no control token, however it is spelt.
        plain = tokenise([TextSpan(row["text"], False, "user")], tokenizer).ids
        assert not set(plain) & set(tokenizer.controls.values()), what
        if re.search(r"\[UNUSED_TOKEN_14[1-6]\]", row["text"]):
            continue  # the pieces whose ids were given away: to the authors' tokenizer they spell control tokens
        ids = tokenise(spans, tokenizer).ids
        assert ids == row["ids_no_bos"], what
        assert tokenise([ControlSpan("<s>", False, "begin"), *spans], tokenizer).ids == row["ids"], what
        assert tokenizer.decode(row["ids"]) == row["decoded_skip_special"], what


# ---- prompts ---------------------------------------------------------------------------------------------------------


def run_prompt(case: Case) -> None:
    """Prompts of chat: the text, and the ids with every picture's slots."""
    tokenizer, per_tile = tokenizer_of(case), case.data["num_image_token"]
    for number, row in enumerate(case.json("rows.json")):
        is_release = "method" in row
        template = row.get("template", case.data.get("template"))
        chat = families.chat((RELEASE if is_release else LATER)[template])
        instruction = row.get("system_message", case.data.get("system_message"))
        # The authors' chat leaves white space around questions, which their training cuts; here both cut it.
        chat = chat.replace(outer_space="keep", system=chat.system if instruction is None else instruction)
        if row.get("method") == "multi_image_chat":  # it numbers even a single picture
            chat = chat.replace(markup=chat.markup.replace(labelled="all"))
        messages = asked(row, one_picture=row.get("method") == "chat")
        tiles = [sum(row["tiles"])] if row.get("method") == "chat" and row["tiles"] else row["tiles"]
        spans, what = render(chat, messages, mode="prompt"), f"{case.name} row {number}"
        assert written(spans, [count * per_tile for count in tiles]) == row["prompt"], what
        if any(name in text for text in texts_of(messages) for name in tokenizer.controls):
            check_no_control_from_text(spans, tokenizer, what)
        elif {span.token for span in spans if isinstance(span, ControlSpan)} <= tokenizer.controls.keys():
            ids = expanded(spans, tokenizer, [count * per_tile for count in tiles])
            assert ids.tolist() == row["input_ids"], what
            assert (ids == tokenizer.controls[CONTEXT]).sum() == row["image_context_count"], what
            assert tokenizer.control_id(chat.stop_tokens[0]) == row["eos_token_id"], what


def asked(row: dict[str, Any], *, one_picture: bool) -> list[Message]:
    """A question after some turns. Pictures stand where `<image>` or an expanded block marks them, else before it."""
    turns = [("human" if side == 0 else "gpt", text) for pair in row.get("history") or [] for side, text in
             enumerate(pair)]  # fmt: skip
    marked = [(role, BLOCK.sub(IMAGE_MARK, text)) for role, text in (*turns, ("human", row["question"]))]
    if not turns and row["tiles"] and not any(IMAGE_MARK in text for _, text in marked):
        return [user(row["question"], images=range(1 if one_picture else len(row["tiles"])))]
    return list(marked_messages(marked))


def marked_messages(turns: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    """Messages of texts with marks."""
    count = sum(text.count(IMAGE_MARK) for _, text in turns)
    conversations = [{"from": role, "value": text} for role, text in turns]
    return parse({"image": ["picture.png"] * count, "conversations": conversations}, where="row").messages


def texts_of(messages: Sequence[Message]) -> list[str]:
    return [message.text for message in messages]


def written(spans: Sequence[Span], counts: Sequence[int]) -> str:
    """Spans as the authors' prompt string, which lacks the token that their tokenizer adds at the start."""
    texts, following = [], iter(counts)
    for span in spans:
        if isinstance(span, ImageSpan):
            texts.append(CONTEXT * next(following))
        elif isinstance(span, TextSpan):
            texts.append(span.text)
        elif span.source != "begin":
            texts.append(span.token)
    return "".join(texts)


def expanded(spans: Sequence[Span], tokenizer: Tokenizer, counts: Sequence[int]) -> np.ndarray[Any, Any]:
    """Ids with every picture's slots."""
    entries = tokenise(spans, tokenizer).ids
    ids = repeated(entries, entries, counts)
    return np.where(ids == IMAGE, tokenizer.control_id(CONTEXT), ids)


def repeated(values: Any, ids: Any, counts: Sequence[int]) -> np.ndarray[Any, Any]:
    """One value per entry to one per token: a picture's as often as it has slots."""
    times = np.ones(len(ids), np.int64)
    times[np.array(ids) == IMAGE] = counts
    return np.repeat(np.array(values), times)


def check_no_control_from_text(spans: Sequence[Span], tokenizer: Tokenizer, what: str) -> None:
    """What people write stays text, also where the authors' tokenizer takes it for a control token."""
    text = tokenise(spans, tokenizer)
    controls = set(tokenizer.controls.values())
    for token_id, place in zip(text.ids, text.spans, strict=True):
        assert isinstance(spans[place], ControlSpan) or token_id not in controls, what


# ---- labels ----------------------------------------------------------------------------------------------------------


def run_labels(case: Case) -> None:
    """Training ids and which of them are taught (the `preprocess_*` functions of dataset.py)."""
    tokenizer, ignore = tokenizer_of(case), case.data["ignore_index"]
    for row in case.json("rows.json"):
        what = f"{case.name} {row.get('name')}"
        chat = families.chat(LATER[row["template"]])
        if row.get("system_message") is not None:
            chat = chat.replace(system=row["system_message"])
        messages = training_messages(row)
        spans = render(chat, messages, mode="train")
        if any(name in text for text in texts_of(messages) for name in tokenizer.controls):
            # `</s>` in a text became the control token, and the whole sample was lost; ours teaches its answers.
            check_no_control_from_text(spans, tokenizer, what)
            check_answers_are_taught(chat, messages, spans, tokenizer, what)
            continue
        text = tokenise(spans, tokenizer)
        counts = row["num_image_token_list"] if IMAGE in text.ids else []
        ids = expanded(spans, tokenizer, counts)[: row["model_max_length"]]
        taught = repeated(text.supervised, text.ids, counts)[: len(ids)]
        recorded = np.array(row["input_ids"])
        assert recorded[: len(ids)].tolist() == ids.tolist(), what
        # What follows is padding, taught by nobody.
        assert not any(row["attention_mask"][len(ids) :]), what
        assert set(row["labels"][len(ids) :]) <= {ignore}, what
        labels = np.where(taught, ids, ignore).tolist()
        if set(row["labels"]) == {ignore} and set(labels) != {ignore}:
            check_answers_are_taught(chat, messages, spans, tokenizer, what)
        else:
            assert row["labels"][: len(ids)] == labels, what


def training_messages(row: dict[str, Any]) -> Sequence[Message]:
    turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    if not row.get("text_only"):
        return marked_messages(turns)
    makers: dict[str, Callable[[str], Message]] = {"human": user, "gpt": assistant, "system": system}
    return [makers[role](text) for role, text in turns]  # marks are not looked for


def check_answers_are_taught(
    chat: ChatFormat, messages: Sequence[Message], spans: Sequence[Span], tokenizer: Tokenizer, what: str
) -> None:
    """Every answer and the token that ends it, and nothing else."""
    text = tokenise(spans, tokenizer)
    end = tokenizer.control_id(chat.stop_tokens[0])
    runs: list[list[int]] = [[]]
    for token_id, taught in zip(text.ids, text.supervised, strict=True):
        if taught:
            runs[-1].append(token_id)
            if token_id == end:
                runs.append([])
    answers = [message.text.strip() for message in messages if message.role == "assistant"]
    if messages[0].role == "assistant":
        answers = answers[1:]
    assert runs.pop() == [], what
    assert [tokenizer.decode(run) for run in runs] == answers, what


RUNNERS: dict[tuple[str, str], Callable[[Case], None]] = {
    ("internvl", "tokenizer"): run_tokenizer,
    ("internvl", "prompt"): run_prompt,
    ("internvl", "labels"): run_labels,
}
