"""Data with known defects: a clean set of any size, and forty things that can be wrong with a record of it.

Each defect is a function that spoils one clean record; it is put at a place of its own, and the check must name that
place with that kind, and no other place.
"""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import toys
from opsin.data.defects import DEFECTS

NUM_PICTURES = 40
WORDS = ("red", "green", "blue", "small", "large", "round", "near", "far", "left", "right", "tree", "house", "boat")


def clean(number: int, folder: Path) -> dict[str, Any]:
    """A record in LLaVA's shape: three of four show a picture, some have several turns, some hold a box."""
    random = np.random.default_rng([7, number])
    said = " ".join(random.choice(WORDS, 9))
    talk = [
        {"from": "human", "value": f"What is the {random.choice(WORDS)} thing of number {number}?"},
        {"from": "gpt", "value": f"It is {said}."},
    ]
    for turn in range(number % 3):
        talk += [{"from": "human", "value": f"And {turn}?"}, {"from": "gpt", "value": f"Also {random.choice(WORDS)}."}]
    record: dict[str, Any] = {"id": f"r{number}", "conversations": talk}
    if number % 4:
        record["image"] = f"pictures/{number % NUM_PICTURES}.{'jpg' if number % 2 else 'png'}"
        talk[0]["value"] = "<image>\n" + talk[0]["value"]
        if number % 5 == 0:
            talk[-1]["value"] = "It is at [0.10, 0.20, 0.55, 0.70]."
    return record


def pictures(folder: Path) -> None:
    """What clean records show, and what spoilt ones do."""
    place = folder / "pictures"
    place.mkdir()
    for number in range(NUM_PICTURES):
        toys.picture((40 + number, 60 - number), number).save(place / f"{number}.{'jpg' if number % 2 else 'png'}")
    whole = io.BytesIO()
    toys.picture((90, 80)).save(whole, "JPEG")
    png = (place / "0.png").read_bytes()
    (place / "empty.jpg").write_bytes(b"")
    (place / "page.jpg").write_text("<!doctype html><title>Not found</title>")
    (place / "damaged.png").write_bytes(png[:20] + b"\0" * 40 + png[60:])
    (place / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    (place / "cut.png").write_bytes(png[: len(png) // 2])
    Image.new("1", (9000, 9000)).save(place / "huge.png")
    Image.new("L", (2400, 8)).save(place / "strip.png")


Spoil = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Seed:
    """One defect."""

    name: str
    kind: str
    """Of `data.defects`."""
    spoil: Spoil
    """Changes a clean record with a picture and two exchanges, or returns what stands in its place: bytes are written
    as they are."""
    needs_model: bool = False
    also: tuple[str, ...] = ()
    """What else is wrong with such a record."""


def _talk(record: dict[str, Any], place: int, value: Any) -> None:
    record["conversations"][place]["value"] = value


def _set(key: str, value: Any) -> Spoil:
    return lambda record: record.update({key: value})


def _say(place: int, value: Any) -> Spoil:
    return lambda record: _talk(record, place, value)


def _raw(change: Callable[[str], str | bytes]) -> Spoil:
    def spoil(record: dict[str, Any]) -> bytes:
        changed = change(json.dumps(record))
        return changed if isinstance(changed, bytes) else changed.encode()

    return spoil


def _turns(change: Callable[[list[dict[str, Any]]], Any]) -> Spoil:
    def spoil(record: dict[str, Any]) -> None:
        record["conversations"] = change(record["conversations"])

    return spoil


def _rename(old: str, new: str) -> Spoil:
    def spoil(record: dict[str, Any]) -> None:
        record[new] = record.pop(old)

    return spoil


def _without_picture(record: dict[str, Any]) -> None:
    del record["image"]
    _talk(record, 0, record["conversations"][0]["value"].removeprefix("<image>\n"))


def _misspelt_key(record: dict[str, Any]) -> None:
    """The picture is lost without any error: the text has no mark that would miss it."""
    image = record["image"]
    _without_picture(record)
    record["imgae"] = image


def _messages(record: dict[str, Any]) -> dict[str, Any]:
    names = {"human": "user", "gpt": "assistant"}
    talk = [{"role": names[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    return {"id": record["id"], "images": [record["image"]], "messages": talk}


def _lost_mark(record: dict[str, Any]) -> dict[str, Any]:
    """A mark where the shape has none, since the record lists no pictures."""
    return {key: value for key, value in _messages(record).items() if key != "images"}


def _objects(boxes: Any, **more: Any) -> Spoil:
    def spoil(record: dict[str, Any]) -> None:
        _talk(record, 1, "It is at <bbox>.")
        record["objects"] = {"ref": [], "bbox": boxes, **more}

    return spoil


def _picture_in_answer(talk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"from": "human", "value": "Show it."}, {"from": "gpt", "value": "<image>"}, *talk[2:]]


PATH = "pictures/"
SEEDS = (
    Seed("half a record", "json", _raw(lambda text: text[: len(text) // 2])),
    Seed("single quotes", "json", _raw(lambda text: text.replace('"', "'"))),
    Seed("a byte of Latin-1", "encoding", _raw(lambda text: text.replace("thing", "th\u00efng").encode("latin-1"))),
    Seed("NaN", "not_finite", _raw(lambda text: text[:-1] + ', "score": NaN}')),
    Seed("a key twice", "duplicate_key", _raw(lambda text: text[:-1] + ', "image": "pictures/1.jpg"}')),
    Seed("a number", "turns", lambda record: 17),
    Seed("no conversation", "shape", _rename("conversations", "talk")),
    Seed("a misspelt key", "unknown_key", _misspelt_key),
    Seed("another shape", "mixed_shapes", _messages),
    Seed("no messages", "turns", _turns(lambda talk: [])),
    Seed("messages as a text", "turns", _turns(lambda talk: "What is it?")),
    Seed("a message that is a text", "turn", _turns(lambda talk: [talk[0], "It is red."])),
    Seed("a message without a text", "turn", _turns(lambda talk: [talk[0], {"from": "gpt"}])),
    Seed("an unknown speaker", "role", _turns(lambda talk: [talk[0], {**talk[1], "from": "bot"}])),
    Seed("an answer that is a number", "content", _say(1, 3)),
    Seed("an answer that is null", "content", _say(1, None)),
    Seed("an unknown part", "part", _say(1, [{"type": "sound", "sound": "a.wav"}])),
    Seed("a picture without a mark", "marks", _say(0, "What is it?")),
    Seed("a mark without a picture", "marks", _say(0, "<image>\n<image>\nWhat is it?")),
    Seed("two keys for pictures", "keys", _set("images", [PATH + "1.jpg"])),
    Seed("a picture that is a number", "picture", _set("image", 7)),
    Seed("a missing picture", "picture_missing", _set("image", PATH + "nowhere.jpg")),
    Seed("a folder as picture", "picture_missing", _set("image", "pictures")),
    Seed("a web address", "address", _set("image", "https://example.com/a.jpg")),
    Seed("broken base64", "media_data", _set("image", "data:image/png;base64,@@@@")),
    Seed("an empty picture", "media_empty", _set("image", PATH + "empty.jpg")),
    Seed("a web page as picture", "media_format", _set("image", PATH + "page.jpg")),
    Seed("a damaged picture", "media_damaged", _set("image", PATH + "damaged.png")),
    Seed("a JPEG cut off", "media_damaged", _set("image", PATH + "cut.jpg")),
    Seed("a PNG cut off", "media_damaged", _set("image", PATH + "cut.png")),
    Seed("too many pixels", "media_large", _set("image", PATH + "huge.png")),
    Seed("too elongated", "media_ratio", _set("image", PATH + "strip.png")),
    Seed("half a surrogate pair", "text", _say(1, "It is \ud83d.")),
    Seed("a replacement character", "damaged_text", _say(1, "It is caf\ufffd.")),
    Seed("a control token", "control_text", _say(1, "It is red.</s>")),
    Seed("an empty answer", "empty_answer", _say(1, " ")),
    Seed("an empty question", "empty_question", _say(2, "")),
    Seed("no last answer", "no_answer", _turns(lambda talk: talk[:-1])),
    Seed("a mark that shows nothing", "mark_text", _lost_mark, also=("mixed_shapes",)),
    Seed("a box outside", "box", _objects([[10, 10, 5000, 30]])),
    Seed("a box of three numbers", "box", _objects([[10, 10, 30]])),
    Seed("a box upside down in the text", "box_text", _say(1, "It is at [0.9, 0.2, 0.1, 0.7].")),
    Seed("boxes without marks", "marks", lambda record: record.update(objects={"bbox": [[1, 1, 5, 5]]})),
    Seed("two questions in a row", "order", _turns(lambda talk: [talk[0], *talk[2:]]), True),
    Seed("no question", "order", _turns(lambda talk: [{"from": "system", "value": "<image>"}, talk[1]])),
    Seed("a late system message", "order", _turns(lambda talk: [*talk, {"from": "system", "value": "Be kind."}])),
    Seed("a picture in an answer", "order", _turns(_picture_in_answer)),
    Seed("too long", "too_long", _say(1, "It is red. " * 4000), True),
    Seed("no answer at all", "nothing_taught", _turns(lambda talk: talk[:1])),
    Seed("an id twice", "duplicate_id", _set("id", "r1")),
    Seed("a record twice", "duplicate_record", lambda record: {**clean(1, Path()), "id": "again"}),
    Seed("in the test set", "held_out", lambda record: {**clean(10_001, Path()), "id": "leaked"}),
)
"""The last ones need more than their own record: record 1, and the test set."""


def write(folder: Path, count: int, seeds: tuple[Seed, ...]) -> dict[int, Seed]:
    """Write `data.jsonl` of `count` records with seeds spread over it, and `test.jsonl`. Returns seeds by line, from 1.

    Line 2 holds record 1, which some seeds repeat.
    """
    pictures(folder)
    step = max(1, (count - 12) // max(1, len(seeds)))
    places = {12 + number * step: seed for number, seed in enumerate(seeds)}
    lines: list[bytes] = []
    for number in range(count):
        record = clean(number, folder)
        if number in places:
            record = clean(60 * (10_000 + number) + 2, folder)  # one with a picture and three exchanges
            record["id"] = f"s{number}"
            spoilt = places[number].spoil(record)
            if isinstance(spoilt, bytes):
                lines.append(spoilt)
                continue
            record = record if spoilt is None else spoilt
        lines.append(json.dumps(record).encode())
    (folder / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    held_out = [clean(number, folder) for number in range(10_001, 10_006)]
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in held_out))
    return {place + 1: seed for place, seed in places.items()}


def table() -> str:
    """The seeds as rows of docs/data_check.md."""
    marks = {"error": "", "warning": " (warning)"}
    rows = [
        f"| {seed.name} | `{seed.kind}`{marks[DEFECTS[seed.kind].severity]} | {'model' if seed.needs_model else ''} |"
        for seed in SEEDS
    ]
    return "\n".join(["| seeded defect | kind | |", "|---|---|---|", *rows])


def base64_picture() -> str:
    """A whole picture as a data: URI."""
    out = io.BytesIO()
    toys.picture((20, 20)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
