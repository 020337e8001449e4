"""Second stage, beside the first: the language model learns to answer before it has seen a pixel.

Where a picture's rows will stand, it is given the labels of the patches (`labels.py`), as rows made of a learned vector
per code and place in the token, of the words for the codes, and of the waves of a thing's box. So both halves of the
model learn at the same time, each from exactly what it needs to know; `connect.py` then teaches the connector to write
such rows from what the tower sees.
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
from opsin.demo.fit import Fit, fit, save_half, spread_blocks_
from opsin.encode import Encoded, Encoder
from opsin.mini.labels import ANCHOR, COVER, FIELDS, INK, NUM_WAVES, WORDS, patch_labels, waves
from opsin.mini.model import config
from opsin.mini.samples import sample
from opsin.mini.talk import conversation
from opsin.mini.tasks import Sample
from opsin.nn.batch import Batch
from opsin.spec.recipe import AdamW, Muon
from opsin.text.tokenizer import Tokenizer, load_tokenizer

DECODER_FILE, ORACLE_FILE = "decoder.safetensors", "oracle.safetensors"
RUN = Fit(
    steps=2200,
    optim=Muon(lr=0.003, weight_decay=0.02, scale="match_rms_adamw", rest=AdamW(lr=0.002, betas=(0.9, 0.98))),
)
BATCH = 16
"""Samples per step."""
QUESTIONS = 8
DROPOUT = 0.1
"""How often the cover or the colour of a patch is missing: no tower is always right."""
NOISE = 0.1
"""Size of the noise on the rows; words start at 0.5."""
JITTER = 0.008
"""Size of the noise on the numbers of a box: no tower is exact. A pixel is about a hundredth of a side."""
_OFFSETS = np.cumsum([0, *FIELDS[:-1]])
_NUM_CODES = sum(FIELDS)


@dataclass(frozen=True, eq=False)
class Shown:
    """Labels of R rows, as the oracle reads them."""

    codes: NDArray[np.int64]
    """(R, 28) rows of its table, 0 for nothing."""
    words: NDArray[np.int64]
    """(R, 24) tokens of the words for them, 0 for none."""
    waves: NDArray[np.float32]
    """(R, 60)."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """One conversation, with the labels of what it shows."""

    encoded: Encoded
    shown: Shown


class Oracle(nn.Module):
    """Rows from labels: the sum of a vector per code and place in the token, and of one per wave.

    The words for the codes are added, each once: what a question asks for then looks like what the picture shows from
    the first step on. (Without them, 31 % of typed questions were right after 500 steps, with each word to be learnt
    from each place in a token.)
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Of three axes, so that Muon, which is for hidden matrices, leaves them to AdamW.
        self.table = nn.Parameter(torch.randn(1, 1 + 4 * _NUM_CODES, dim) * 0.1)
        self.waves = nn.Parameter(torch.randn(1, NUM_WAVES, dim) * 0.05)

    def forward(self, shown: Shown, embed: nn.Embedding) -> Tensor:
        """(R, D). embed: the decoder's."""
        words = F.embedding_bag(torch.from_numpy(shown.words), embed.weight, mode="sum", padding_idx=0)
        codes = F.embedding_bag(torch.from_numpy(shown.codes), self.table[0], mode="sum", padding_idx=0)
        return words + codes + torch.from_numpy(shown.waves).to(codes.dtype) @ self.waves[0]


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

    def __call__(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        """(tokens, 4, 7) codes -> (tokens, 24) ids, each at most once a token.

        Only of patches in which something is centred: everything that can be asked about a thing then stands in one
        row, and things are as many as rows that fit. (Told in all patches that a thing covers, colours were found after
        1,000 steps, places and numbers were not.)
        """
        chosen = codes[..., list(WORDS)] * (codes[..., ANCHOR, None] > 0)
        ids = np.sort(self.ids[list(WORDS), chosen].reshape(len(codes), -1), axis=1)
        ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = 0
        return ids


class LanguageModel(nn.Module):
    """The decoder in its place in the whole model, and the rows that stand for pictures."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int) -> None:
        super().__init__()
        self.vlm = weights.build(config(tokenizer), seed=seed)
        decoder = self.vlm.decoder
        nn.init.normal_(decoder.embed.weight, std=0.5)
        spread_blocks_(decoder.layers)
        self.oracle = Oracle(decoder.config.dim)

    def logits(self, batch: Batch, shown: Shown) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the taught tokens, and these (M,)."""
        rows = self.oracle(shown, self.vlm.decoder.embed)
        if self.training:
            rows = rows + torch.randn_like(rows) * NOISE
        places, wanted = batch.targets()
        return self.vlm.logits(self.vlm.hidden(batch, rows=rows, wanted=places)), wanted


def told(codes: NDArray[np.int64], numbers: NDArray[np.float32], speller: Speller) -> Shown:
    """(R, 4, 7) codes and (R, 4, 5) numbers of the patches of R tokens, as the oracle reads them."""
    numbered = 1 + np.arange(4)[:, None] * _NUM_CODES + _OFFSETS + codes
    numbered = np.where(codes > 0, numbered, 0).reshape(len(codes), -1)
    # Things stand too far apart for two to be centred in one token.
    return Shown(numbered, speller(codes), waves(numbers).sum(axis=1))


def labels_of(sample: Sample) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(R, 4, 7) codes and (R, 4, 5) numbers of everything a sample shows, in the order of its rows."""
    scenes = list(sample.pictures)
    if sample.clip:
        scenes += [sample.clip.between(pair) for pair in range(len(sample.clip.frames) // 2)]
    codes, numbers = zip(*(patch_labels(scene).in_blocks() for scene in scenes), strict=True)
    return np.concatenate(codes), np.concatenate(numbers)


def labelled(seed: int, index: int, encoder: Encoder, speller: Speller) -> Labelled:
    """Sample `index` of those for training, without painting it."""
    drawn = sample(seed, index, "train", num_questions=QUESTIONS)
    encoded = encoder.encode(conversation(drawn, painted=False), mode="train")
    codes, numbers = forgetful(*labels_of(drawn), np.random.default_rng([seed, index]))
    return Labelled(encoded, told(codes, numbers, speller))


def forgetful(
    codes: NDArray[np.int64], numbers: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Labels with some covers and colours missing where nothing is centred, and with numbers a little off."""
    kept = codes.copy()
    kept[..., [COVER, INK]] *= (rng.random((*codes.shape[:2], 2)) >= DROPOUT) | (codes[..., ANCHOR, None] > 0)
    off = rng.normal(0, JITTER, numbers.shape).astype(np.float32)
    return kept, np.where(numbers > 0, numbers + off, numbers)


def loss(module: nn.Module, samples: list[Labelled]) -> Tensor:
    """Cross-entropy of the taught tokens, of which those of an answer of n count 1 / sqrt(n) each."""
    assert isinstance(module, LanguageModel)
    fields = ([getattr(each.shown, name) for each in samples] for name in ("codes", "words", "waves"))
    shown = Shown(*map(np.concatenate, fields))
    found, wanted = module.logits(pack([each.encoded for each in samples]), shown)
    weights = torch.from_numpy(np.concatenate([_weights(each.encoded.supervised) for each in samples]))
    return (F.cross_entropy(found.float(), wanted, reduction="none") * weights).sum() / weights.sum()


def _weights(taught: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Of each taught token: 1 over the root of the number of those that it stands among."""
    borders = np.flatnonzero(np.diff(taught, prepend=False, append=False))
    lengths = borders[1::2] - borders[::2]
    return np.repeat(lengths**-0.5, lengths).astype(np.float32)


@torch.no_grad()
def measure(module: nn.Module, encoder: Encoder, speller: Speller, *, count: int = 320) -> dict[str, float]:
    """Share of right answers per task on held-out samples. A box counts only where every digit is right."""
    assert isinstance(module, LanguageModel)
    right: dict[str, list[bool]] = {}
    for index in range(count):
        drawn = sample(1, index, "heldout", num_questions=QUESTIONS)
        alone = [Sample(drawn.pictures, drawn.clip, (question,)) for question in drawn.questions]
        encoded = [encoder.encode(conversation(one, painted=False), mode="train") for one in alone]
        codes, numbers = labels_of(drawn)
        each_time = (len(alone), 1, 1)
        shown = told(np.tile(codes, each_time), np.tile(numbers, each_time), speller)
        found, wanted = module.logits(pack(encoded), shown)
        good = found.argmax(-1) == wanted
        start = 0
        for question, one in zip(drawn.questions, encoded, strict=True):
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
            [labelled(seed, index, encoder, speller) for index in range(step * BATCH, (step + 1) * BATCH)],
        ),
        measure=lambda module: measure(module.eval(), encoder, speller),
        log=folder / "language.jsonl",
        save=save,
    )
