"""What can be had without looking closely, to hold the models' figures against. No model runs here.

    python experiments/ucm/controls.py DATA [FILE]          # FILE: where to write them as JSON, too

the kind alone        The data has 21 kinds of land, ten test pictures each. Retrieval: the right kind's candidates
                      first, in random order. Captions: the caption that was most often trained on for that kind.
one caption for all   Of the 100 captions most often trained on, the one that scores best on these very pictures: more
                      than any model that always writes one of them can have.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prepare import records

from opsin.evaluate.bootstrap import intervals
from opsin.evaluate.captions import Cider, caption_words
from opsin.evaluate.retrieval import chance, positives
from opsin.text.cleaning import clean_caption

PICTURES_PER_KIND = 100
"""The data set's pictures are numbered kind by kind."""
NUM_CONSTANTS = 100


def kind_of(record: dict[str, Any]) -> int:
    """Which kind of land a picture shows. No model is told."""
    return (int(Path(record["image"]).stem) - 1) // PICTURES_PER_KIND


def repetition(shown: Sequence[dict[str, Any]], train: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How often the same words recur."""
    captions = [[clean_caption(text) for text in record["captions"]] for record in shown]
    everything = [text for each in captions for text in each]
    trained = {clean_caption(text) for record in train for text in record["captions"]}
    return {
        "tested": len(everything),
        "different": len(set(everything)),
        "right texts per picture": float(positives(captions, everything).sum(axis=1).mean()),
        "share that was trained on, word for word": sum(text in trained for text in everything) / len(everything),
    }


def retrieval_by_kind(shown: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Recall at 1, 5 and 10, both ways, of who knows the kind and nothing else."""
    captions = [[clean_caption(text) for text in record["captions"]] for record in shown]
    right = positives(captions, [text for each in captions for text in each])
    of_pictures = np.array([kind_of(record) for record in shown])
    of_texts = np.repeat(of_pictures, [len(each) for each in captions])
    return {
        "picture to text": recall_within(right, of_pictures, of_texts),
        "text to picture": recall_within(right.T, of_texts, of_pictures),
    }


def recall_within(right: NDArray[np.bool_], queries: NDArray[np.int64], candidates: NDArray[np.int64]) -> list[float]:
    """Recall of a random order of the candidates of each query's own kind. right: (queries, candidates)."""
    levels = [chance(right[[row]][:, candidates == kind]) for row, kind in enumerate(queries)]
    return [float(value) for value in np.mean(levels, axis=0)]


def captions_without_looking(shown: Sequence[dict[str, Any]], train: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """CIDEr-D of the kind's commonest caption, and of the best that is the same for all pictures."""
    references = [[caption_words(text) for text in record["captions"]] for record in shown]
    cider = Cider(references)

    def scored(written: Sequence[str]) -> NDArray[np.float64]:
        words = map(caption_words, written)
        return np.array([cider.score(*pair) for pair in zip(words, references, strict=True)])

    trained = Counter(clean_caption(text) for record in train for text in record["captions"])
    constants = [text for text, _ in trained.most_common(NUM_CONSTANTS)]
    best = max(constants, key=lambda text: scored([text] * len(shown)).mean())
    of_kind: dict[int, Counter[str]] = {}
    for record in train:
        of_kind.setdefault(kind_of(record), Counter()).update(map(clean_caption, record["captions"]))
    found: dict[str, Any] = {"one caption": best}
    for name, written in (
        ("one caption for all", [best] * len(shown)),
        ("the kind alone", [of_kind[kind_of(record)].most_common(1)[0][0] for record in shown]),
    ):
        scores = scored(written)
        sums = np.stack([scores, np.ones(len(scores))], axis=1)
        (level,) = intervals(sums, lambda each: each[..., :1] / each[..., 1:])
        found[name] = asdict(level)
    return found


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description="What can be had without looking closely.")
    parser.add_argument("data", type=Path)
    parser.add_argument("file", type=Path, nargs="?")
    given = parser.parse_args()
    shown, train = records(given.data, "test"), records(given.data, "train")
    found = {
        "captions": repetition(shown, train),
        "retrieval by the kind alone": retrieval_by_kind(shown),
        "CIDEr-D": captions_without_looking(shown, train),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if given.file is not None:
        given.file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
