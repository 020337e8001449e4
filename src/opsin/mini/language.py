"""Second stage, beside the first: the language model learns to answer before it has seen a pixel.

Where a picture's rows will stand, it is given the labels of the patches (`labels.py`), as rows made of a learned vector
per label and place in the token, and of the words for the labels. So both halves of the model learn at the same time,
each from exactly what it needs to know; `connect.py` then teaches the connector to write such rows from what the tower
sees.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from opsin import weights
from opsin.collate import pack
from opsin.demo.fit import Fit, fit, save_half, spread_normal_
from opsin.demo.scene import Split
from opsin.encode import Encoded, Encoder
from opsin.mini.labels import FIELDS, NUM_PLACES, WORDS, in_blocks, patch_labels, token_places
from opsin.mini.model import config
from opsin.mini.talk import conversation
from opsin.mini.tasks import Sample, sample
from opsin.nn.batch import Batch
from opsin.spec.recipe import AdamW, Muon
from opsin.text.tokenizer import Tokenizer, load_tokenizer

DECODER_FILE, ORACLE_FILE = "decoder.safetensors", "oracle.safetensors"
RUN = Fit(
    steps=2000,
    optim=Muon(lr=0.003, weight_decay=0.02, scale="match_rms_adamw", rest=AdamW(lr=0.002, betas=(0.9, 0.98))),
)
BATCH = 16
"""Samples per step."""
QUESTIONS = 8
DROPOUT = 0.1
"""How often the cover or the colour of a patch is missing: no tower is always right."""
NOISE = 0.1
"""Size of the noise on the rows; labels start at 0.5."""
_OFFSETS = np.cumsum([0, *FIELDS[:-1]])
_NUM_CODES = sum(FIELDS)


@dataclass(frozen=True, eq=False)
class Labelled:
    """One conversation, with the labels of what it shows."""

    encoded: Encoded
    codes: NDArray[np.int64]
    """(rows, 38) codes of each row's labels, 0 for nothing."""
    words: NDArray[np.int64]
    """(rows, 16) tokens of the words for them."""


class Oracle(nn.Module):
    """Rows from labels: the sum of a vector per label and place in the token, and of where the token stands.

    The words for the labels are added, each once: what a question asks for then looks like what the picture shows from
    the first step on. (Without them, 31 % of typed questions were right after 500 steps, with each word to be learnt
    from each place in a token.)
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Of three axes, so that Muon, which is for hidden matrices, leaves it to AdamW.
        self.table = nn.Parameter(torch.randn(1, 1 + 4 * _NUM_CODES + 2 * NUM_PLACES, dim) * 0.15)

    def forward(self, codes: Tensor, words: Tensor, embed: nn.Embedding) -> Tensor:
        """codes: (R, 38), words: (R, 16) token ids, 0 for none -> (R, D). embed: the decoder's."""
        shown = F.embedding_bag(words, embed.weight, mode="sum", padding_idx=0)
        return shown + F.embedding_bag(codes, self.table[0], mode="sum", padding_idx=0)


class Speller:
    """The words for labels, as tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids = np.zeros((len(FIELDS), max(FIELDS)), np.int64)
        """(fields, values) token id of each label's word; 0, which is no word, where it has none."""
        for field, names in WORDS.items():
            for value, name in enumerate(names):
                if value:
                    # As it stands in the middle of a question; letters and digits are tokens of their own.
                    self.ids[field, value] = tokenizer.encode(name if len(name) == 1 else f" {name}", "start").ids[0]

    def __call__(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """(tokens, 4, 9) labels -> (tokens, 16) ids, each at most once a token."""
        chosen = labels[..., list(WORDS)]
        ids = np.sort(self.ids[list(WORDS), chosen].reshape(len(labels), -1), axis=1)
        ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = 0
        return ids


class LanguageModel(nn.Module):
    """The decoder in its place in the whole model, and the rows that stand for pictures."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int) -> None:
        super().__init__()
        self.vlm = weights.build(config(tokenizer), seed=seed)
        decoder = self.vlm.decoder
        nn.init.normal_(decoder.embed.weight, std=0.5)
        for name, tensor in decoder.layers.named_parameters():
            if tensor.ndim == 2:
                spread_normal_(tensor, 0.3 if name.endswith(("out.weight", "down.weight")) else 1.0)
        self.oracle = Oracle(decoder.config.dim)

    def logits(self, batch: Batch, codes: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the taught tokens, and these (M,)."""
        rows = self.oracle(codes, words, self.vlm.decoder.embed)
        if self.training:
            rows = rows + torch.randn_like(rows) * NOISE
        places, wanted = batch.targets()
        return self.vlm.logits(self.vlm.hidden(batch, rows=rows, wanted=places)), wanted


def codes(labels: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """(tokens, 4, 9) labels and (tokens, 2) places -> (tokens, 38) rows of the oracle's table."""
    numbered = 1 + np.arange(4)[:, None] * _NUM_CODES + _OFFSETS + labels
    placed = 1 + 4 * _NUM_CODES + np.array([0, NUM_PLACES]) + places
    return np.concatenate([np.where(labels > 0, numbered, 0).reshape(len(labels), -1), placed], axis=1)


def labels_of(shown: Sample) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows, 4, 9) labels and (rows, 2) places of everything a sample shows, in the order of its rows."""
    scenes = list(shown.pictures)
    if shown.clip:
        scenes += [shown.clip.between(pair) for pair in range(len(shown.clip.frames) // 2)]
    labels = [patch_labels(scene) for scene in scenes]
    places = [token_places(each.shape[0] // 2, each.shape[1] // 2) for each in labels]
    return np.concatenate([in_blocks(each) for each in labels]), np.concatenate(places)


def labelled(seed: int, index: int, split: Split, encoder: Encoder, speller: Speller) -> Labelled:
    """Sample `index` of a split, without painting it."""
    shown = sample(seed, index, split, num_questions=QUESTIONS)
    encoded = encoder.encode(conversation(shown, painted=False), mode="train")
    rng = np.random.default_rng([seed, index])
    labels, places = labels_of(shown)
    if split == "train":
        labels = forgetful(labels, rng)
    return Labelled(encoded, codes(labels, places), speller(labels))


def forgetful(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Labels with some covers and colours missing."""
    kept = labels.copy()
    kept[..., 1:3] *= rng.random((*labels.shape[:2], 2)) >= DROPOUT
    return kept


def loss(module: nn.Module, samples: list[Labelled]) -> Tensor:
    """Mean cross-entropy of the taught tokens."""
    assert isinstance(module, LanguageModel)
    batch = pack([each.encoded for each in samples])
    shown = [torch.from_numpy(np.concatenate([getattr(each, name) for each in samples])) for name in ("codes", "words")]
    found, wanted = module.logits(batch, *shown)
    return F.cross_entropy(found.float(), wanted)


@torch.no_grad()
def measure(module: nn.Module, encoder: Encoder, speller: Speller, *, count: int = 320) -> dict[str, float]:
    """Share of right answers per task on held-out samples. A box counts only where every digit is right."""
    assert isinstance(module, LanguageModel)
    right: dict[str, list[bool]] = {}
    for index in range(count):
        shown = sample(1, index, "heldout", num_questions=QUESTIONS)
        alone = [Sample(shown.pictures, shown.clip, (question,)) for question in shown.questions]
        encoded = [encoder.encode(conversation(one, painted=False), mode="train") for one in alone]
        labels, places = labels_of(shown)
        rows = [torch.from_numpy(each).repeat(len(alone), 1) for each in (codes(labels, places), speller(labels))]
        found, wanted = module.logits(pack(encoded), *rows)
        good = found.argmax(-1) == wanted
        start = 0
        for question, one in zip(shown.questions, encoded, strict=True):
            stop = start + int(one.supervised[1:].sum())
            # Under the right beginning of an answer, greedy choice gives the answer iff it gives each of its tokens.
            right.setdefault(question.task, []).append(bool(good[start:stop].all()))
            start = stop
    figures = {task: sum(good) / len(good) for task, good in sorted(right.items())}
    return {"accuracy": sum(figures.values()) / len(figures), **figures}


def run(folder: Path, *, seed: int, settings: Fit = RUN) -> None:
    """Train with the tokenizer in `folder`; write decoder, oracle and log there."""
    tokenizer = load_tokenizer(folder)
    encoder, speller = Encoder(config(tokenizer), tokenizer), Speller(tokenizer)
    torch.manual_seed(seed)

    def save(module: nn.Module) -> None:
        assert isinstance(module, LanguageModel)
        save_half(module.vlm.decoder.state_dict(), folder / DECODER_FILE, {"made_by": "opsin.mini language"})
        save_half(module.oracle.state_dict(), folder / ORACLE_FILE, {"made_by": "opsin.mini language"})

    module = LanguageModel(tokenizer, seed=seed)
    module.vlm.vision.requires_grad_(False)
    module.vlm.connector.requires_grad_(False)
    fit(
        module,
        settings,
        loss=lambda module, step: loss(
            module,
            [labelled(seed, index, "train", encoder, speller) for index in range(step * BATCH, (step + 1) * BATCH)],
        ),
        measure=lambda module: measure(module.eval(), encoder, speller),
        log=folder / "language.jsonl",
        save=save,
    )
