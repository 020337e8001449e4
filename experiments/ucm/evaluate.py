"""What the trained models do on pictures that they never saw, against controls that see no picture, or another one.

    python experiments/ucm/evaluate.py DATA [OUT] [--split test] [--only retrieval]

Writes OUT/retrieval-SPLIT.json and OUT/captions-SPLIT.json (with every caption that was written), and prints both.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from prepare import CHAT, records

from opsin import match, weights
from opsin.encode import Encoder
from opsin.generate.beam import Beams, beam_search
from opsin.match import Matcher
from opsin.nn.qformer import Features
from opsin.text.cleaning import clean_caption
from opsin.text.messages import Conversation, user

NUM_RESCORED = 32
"""Candidates of the best contrast that are read together with the query (LAVIS: 128 of COCO's 5,000 and 25,000)."""
BEAMS = Beams(num_beams=3, max_new_tokens=30)
PICTURES_PER_CLASS = 100
"""The data set's pictures are numbered class by class."""
GREY = (122, 116, 104)
"""The mean colour of the pictures that the statistics of preprocessing come from."""

Matrix = NDArray[Any]


def class_of(record: dict[str, Any]) -> int:
    """Which of the 21 kinds of land a picture shows. No model is told."""
    return (int(Path(record["image"]).stem) - 1) // PICTURES_PER_CLASS


def others(count: int) -> list[int]:
    """Another picture for each picture: a random cycle, so that none keeps its own."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    taken = [0] * count
    for place, index in enumerate(order):
        taken[index] = order[place - 1]
    return taken


# ---- retrieval -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def scores(matcher: Matcher, pictures: Sequence[Path], texts: Sequence[str]) -> tuple[Matrix, Matrix, Matrix]:
    """Contrast of each picture with each text (P, T); and score by matching, once with the texts that are rescored for
    each picture, once with the pictures that are for each text: matching logit plus contrast, -inf for all others.
    """
    model, encode = matcher.model.retriever, matcher.encoder
    features, vectors = [], []
    for start in range(0, len(pictures), 32):
        prepared = [encode.picture(path) for path in pictures[start : start + 32]]
        patches = torch.from_numpy(np.concatenate([each.patches for each in prepared]))
        grids = torch.from_numpy(np.concatenate([each.grids for each in prepared]))
        found = model.features(patches, grids)
        features.append(found.values)
        vectors.append(model.picture_vectors(model.see(found).states))
    shown = torch.cat(features)
    ids, valid = padded([encode.text(text) for text in texts])
    said = model.text_vectors(model.read(ids, valid))
    contrast = torch.einsum("iqe,te->itq", torch.cat(vectors), said).amax(-1)
    count = min(NUM_RESCORED, *contrast.shape)
    by_picture, by_text = (torch.full_like(contrast, -torch.inf) for _ in range(2))
    rows = torch.arange(len(pictures))[:, None].expand(-1, count).flatten()
    columns = contrast.topk(count, dim=1).indices.flatten()
    by_picture[rows, columns] = logits(model, shown, ids, valid, rows, columns) + contrast[rows, columns]
    rows = contrast.topk(count, dim=0).indices.flatten()
    columns = torch.arange(len(texts))[None].expand(count, -1).flatten()
    by_text[rows, columns] = logits(model, shown, ids, valid, rows, columns) + contrast[rows, columns]
    return contrast.numpy(), by_picture.numpy(), by_text.numpy()


def logits(
    model: Any, shown: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Matching logit of each pair of a picture and a text, by their numbers."""
    parts = zip(rows.split(256), columns.split(256), strict=True)
    return torch.cat([model.match(Features(shown[row]), ids[text], valid[text])[:, 1] for row, text in parts])


def padded(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and which of them are no padding, (T, longest) each."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    return ids, torch.arange(longest) < torch.tensor(list(map(len, texts)))[:, None]


def retrieval(data: Path, out: Path, split: str) -> dict[str, Any]:
    """Recall both ways, alone and re-ranked, with equal captions counted as right; and what chance would give."""
    shown = records(data, split)
    texts = sorted({clean_caption(text) for record in shown for text in record["captions"]})
    column = {text: number for number, text in enumerate(texts)}
    right = np.zeros((len(shown), len(texts)), bool)
    for row, record in enumerate(shown):
        right[row, [column[clean_caption(text)] for text in record["captions"]]] = True
    matcher = match.load(out / "stage1" / "stage1")
    contrast, by_picture, by_text = scores(matcher, [data / record["image"] for record in shown], texts)
    taken = others(len(shown))
    classes = np.array([class_of(record) for record in shown])
    found: dict[str, Any] = {"pictures": len(shown), "texts": len(texts), "right_texts_per_picture": right.sum(1).mean()}
    for name, forth, back in (
        ("contrast", contrast, contrast.T),
        ("matching", by_picture, by_text.T),
        ("contrast, other picture", contrast[taken], contrast[taken].T),
        ("matching, other picture", by_picture[taken], by_text[taken].T),
    ):
        for way, score, target in (("picture to text", forth, right), ("text to picture", back, right.T)):
            ranks = first_right(score, target)
            found[f"{name}: {way}"] = {f"R@{k}": float(np.mean(ranks < k)) for k in (1, 5, 10)}
    found["chance: picture to text"] = {f"R@{k}": chance(right, k) for k in (1, 5, 10)}
    found["chance: text to picture"] = {f"R@{k}": chance(right.T, k) for k in (1, 5, 10)}
    of_class = np.stack([right[classes == each].any(0) for each in classes])  # texts that fit some picture of its class
    found["the kind alone: picture to text"] = {"R@1": float(np.mean(right.sum(1) / of_class.sum(1)))}
    fitting = np.stack([of_class[:, text] for text in range(len(texts))])
    found["the kind alone: text to picture"] = {"R@1": float(np.mean(right.sum(0) / fitting.sum(1)))}
    return found


def first_right(score: Matrix, right: Matrix) -> Matrix:
    """How many candidates stand before the first right one, for each row."""
    best = np.where(right, score, -np.inf).max(1, keepdims=True)
    return (score > best).sum(1)


def chance(right: Matrix, k: int) -> float:
    """Mean probability that k candidates drawn at random hold a right one."""
    count = right.shape[1]
    misses = [np.prod([(count - m - i) / (count - i) for i in range(k)]) for m in right.sum(1)]
    return float(1 - np.mean(misses))


# ---- captions --------------------------------------------------------------------------------------------------------


def write_captions(model: weights.Model, pictures: Sequence[Path | Image.Image]) -> list[str]:
    """A caption of each picture."""
    encoder = Encoder(model.config, model.tokenizer)
    prompts = [encoder.encode(Conversation((user("", images=[0]),), (picture,))) for picture in pictures]
    written: list[str] = []
    for start in range(0, len(prompts), 30):
        written += [answer.text for answer in beam_search(model.vlm, prompts[start : start + 30], model.tokenizer, BEAMS)]
    return written


def constant(train: Sequence[dict[str, Any]]) -> Counter[str]:
    """How often each caption was trained on."""
    return Counter(clean_caption(text) for record in train for text in record["captions"])


def captions(data: Path, out: Path, split: str) -> dict[str, list[str]]:
    """Captions of each picture of a split, by who wrote them."""
    shown, train = records(data, split), records(data, "train")
    pictures = [data / record["image"] for record in shown]
    taken = others(len(shown))
    model = weights.load(out / "captions" / "captions")
    written = {"stage 2": write_captions(model, pictures)}
    written["stage 2, other picture"] = [written["stage 2"][index] for index in taken]
    written["stage 2, grey picture"] = write_captions(model, [Image.new("RGB", (160, 160), GREY)]) * len(shown)
    matcher = match.load(out / "stage1" / "stage1")
    written["stage 1"] = matcher.describe(pictures, beams=BEAMS)
    written["stage 1, other picture"] = [written["stage 1"][index] for index in taken]
    by_kind: dict[int, Counter[str]] = {}
    for record in train:
        by_kind.setdefault(class_of(record), Counter()).update(clean_caption(text) for text in record["captions"])
    written["the kind's commonest caption"] = [by_kind[class_of(record)].most_common(1)[0][0] for record in shown]
    return written


def main() -> None:
    """Evaluate both models on one split."""
    parser = argparse.ArgumentParser(description="Evaluate the models of this experiment.")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/ucm"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--only", choices=("retrieval", "captions"))
    given = parser.parse_args()
    for name, evaluate in (("retrieval", retrieval), ("captions", captions)):
        if given.only in (None, name):
            found = evaluate(given.data, given.out, given.split)
            (given.out / f"{name}-{given.split}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
