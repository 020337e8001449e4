"""The files that the last stage reads: the data set's training split, and drawn pictures with several sentences each.

OUT/language/             tokenizer: words of exercises, of drawn sentences and of the training split; else bytes
    drawn/*.jsonl, *.png  conversations: a drawn picture, and sentences with yes or no, some questions with a number
    real/train.jsonl      `dev` but for a fifth of its sets, each picture in the six orders of its boxes
    real/blank.jsonl      the same sentences about three empty boxes
    real/choose.jsonl     that fifth, to choose settings and to end training by
    real/test.jsonl       `test`, read by nothing but the final score
"""

import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from experiments.nlvr.exercises import exercises
from experiments.nlvr.scenes import BACKGROUND, BOX, BOX_LEFTS, blank, draw_scene, render
from experiments.nlvr.sentences import sentences
from PIL import Image

from opsin.demo.vocabulary import vocabulary, write_tokenizer

PER_PICTURE = 8
ANSWERS = {"true": "yes", "false": "no"}
_CHOOSE_SHARE = 0.2


@dataclass(frozen=True)
class Example:
    """One sentence about one picture of the data set."""

    image: Path
    sentence: str
    answer: str
    group: str
    """The set that it was written for: up to four pictures with the same sentence."""


def read_examples(folder: Path) -> dict[str, list[Example]]:
    """The data set by split: `train` and `choose` (both of its `dev`, no set in both), `test`."""
    splits: dict[str, list[Example]] = {"train": [], "choose": [], "test": []}
    for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        group = "-".join(Path(row["image"]).stem.split("-")[:2])
        example = Example(folder / row["image"], tidy(row["sentence"]), ANSWERS[row["label"]], group)
        if row["split"] == "test":
            splits["test"].append(example)
        else:
            chosen = random.Random(f"choose/{group}").random() < _CHOOSE_SHARE
            splits["choose" if chosen else "train"].append(example)
    return splits


def tidy(sentence: str) -> str:
    """Small letters, single spaces, no full stop at the end."""
    return re.sub(r"\s+", " ", sentence.lower()).strip().rstrip(".").rstrip()


def write_words(folder: Path, examples: Iterable[Example], *, scenes: int = 1500) -> int:
    """The tokenizer; returns its size."""
    lines = ["USER: ASSISTANT: \n", " yes no 0 1 2 3 4 5 6 7 8 9"]
    for index in range(scenes):
        rng = random.Random(f"words/{index}")
        scene = draw_scene(rng)
        lines += [each.text for each in sentences(scene, rng, PER_PICTURE, slips=0)]
        lines += [f"{each.text} {each.answer}" for each in exercises(scene, rng, 4)]
    lines += [example.sentence for example in examples]
    spaced = [text for line in lines for text in (line, f" {line}", f"\n{line}")]
    return write_tokenizer(folder, vocabulary(spaced))


def write_drawn(folder: Path, *, seed: int, pictures: int) -> None:
    """Conversations about drawn pictures: `drawn.jsonl` and the pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    with (folder / "drawn.jsonl").open("w", encoding="utf-8") as file:
        for index in range(pictures):
            rng = random.Random(f"drawn/{seed}/{index}")
            scene = draw_scene(rng)
            name = f"pictures/{index:05d}.png"
            Image.fromarray(render(scene)).save(folder / name, compress_level=1)
            turns = [(each.text, each.answer) for each in sentences(scene, rng, PER_PICTURE)]
            file.write(json.dumps(conversation(name, turns)) + "\n")


def conversation(image: str, turns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A record of docs/data.md: the picture stands in the first turn."""
    messages: list[dict[str, str]] = []
    for number, (text, answer) in enumerate(turns):
        messages.append({"role": "user", "content": f"<image>{text}" if number == 0 else text})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "images": [image]}


def write_real(folder: Path, splits: Mapping[str, list[Example]]) -> None:
    """One record per sentence; training pictures in every order of their boxes, which no sentence speaks of."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        orders = list(permutations(range(3))) if split == "train" else [(0, 1, 2)]
        if split == "train":
            blank().save(folder / "pictures/blank.png")
            lines = [conversation("pictures/blank.png", [(each.sentence, each.answer)]) for each in examples]
            (folder / "blank.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for example in examples:
                pixels = np.asarray(opened(example.image))
                for number, order in enumerate(orders):
                    name = f"pictures/{example.image.stem}-{number}.png"
                    Image.fromarray(reordered(pixels, order)).save(folder / name, compress_level=1)
                    file.write(json.dumps(conversation(name, [(example.sentence, example.answer)])) + "\n")


def opened(path: Path) -> Image.Image:
    """A picture of the data set, its transparent parts as grey as a box."""
    with Image.open(path) as image:
        ground = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def reordered(pixels: np.ndarray[Any, np.dtype[np.uint8]], order: tuple[int, ...]) -> Any:
    """The picture with its boxes in another order."""
    moved = pixels.copy()
    for left, source in zip(BOX_LEFTS, (BOX_LEFTS[number] for number in order), strict=True):
        moved[:, left : left + BOX] = pixels[:, source : source + BOX]
    return moved
