"""Second stage, beside the first: the language model learns to answer before it has seen a pixel.

Where a picture's rows will stand, it is given the labels of the patches (`labels.py`), as rows made of a learned vector
per label and place in the token. So both halves of the model learn at the same time, each from exactly what it needs to
know; `connect.py` then teaches the connector to write such rows from what the tower sees. Where a token stands in the
picture is told by M-RoPE alone, as it will be.
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
from opsin.mini.labels import FIELDS, in_blocks, patch_labels
from opsin.mini.model import config
from opsin.mini.talk import conversation
from opsin.mini.tasks import Sample, sample
from opsin.nn.batch import Batch
from opsin.spec.recipe import AdamW, Muon
from opsin.text.tokenizer import Tokenizer, load_tokenizer

DECODER_FILE, ORACLE_FILE = "decoder.safetensors", "oracle.safetensors"
RUN = Fit(
    steps=2500,
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
    """(rows, 28) codes of each row's labels, 0 for nothing."""


class Oracle(nn.Module):
    """Rows from labels: the sum of a vector per label and place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Of three axes, so that Muon, which is for hidden matrices, leaves it to AdamW.
        self.table = nn.Parameter(torch.randn(1, 1 + 4 * _NUM_CODES, dim) * 0.5)

    def forward(self, codes: Tensor) -> Tensor:
        """codes: (R, 28) -> (R, D)."""
        return F.embedding_bag(codes, self.table[0], mode="sum", padding_idx=0)


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

    def logits(self, batch: Batch, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the taught tokens, and these (M,)."""
        rows = self.oracle(codes)
        if self.training:
            rows = rows + torch.randn_like(rows) * NOISE
        places, wanted = batch.targets()
        return self.vlm.logits(self.vlm.hidden(batch, rows=rows, wanted=places)), wanted


def codes(
    labels: NDArray[np.int64], *, dropout: float = 0.0, rng: np.random.Generator | None = None
) -> NDArray[np.int64]:
    """(tokens, 4, 7) labels -> (tokens, 28) rows of the oracle's table."""
    present = labels > 0
    if dropout:
        assert rng is not None
        present[..., 1:3] &= rng.random((*labels.shape[:2], 2)) >= dropout
    places = 1 + np.arange(4)[:, None] * _NUM_CODES + _OFFSETS + labels
    return np.where(present, places, 0).reshape(len(labels), -1)


def labels_of(shown: Sample) -> NDArray[np.int64]:
    """(rows, 4, 7) labels of everything a sample shows, in the order of its rows."""
    scenes = list(shown.pictures)
    if shown.clip:
        scenes += [shown.clip.between(pair) for pair in range(len(shown.clip.frames) // 2)]
    return np.concatenate([in_blocks(patch_labels(scene)) for scene in scenes])


def labelled(seed: int, index: int, split: Split, encoder: Encoder) -> Labelled:
    """Sample `index` of a split, without painting it."""
    shown = sample(seed, index, split, num_questions=QUESTIONS)
    encoded = encoder.encode(conversation(shown, painted=False), mode="train")
    rng = np.random.default_rng([seed, index])
    return Labelled(encoded, codes(labels_of(shown), dropout=DROPOUT if split == "train" else 0.0, rng=rng))


def loss(module: nn.Module, samples: list[Labelled]) -> Tensor:
    """Mean cross-entropy of the taught tokens."""
    assert isinstance(module, LanguageModel)
    batch = pack([each.encoded for each in samples])
    found, wanted = module.logits(batch, torch.from_numpy(np.concatenate([each.codes for each in samples])))
    return F.cross_entropy(found.float(), wanted)


@torch.no_grad()
def measure(module: nn.Module, encoder: Encoder, *, count: int = 320) -> dict[str, float]:
    """Share of right answers per task on held-out samples. A box counts only where every digit is right."""
    assert isinstance(module, LanguageModel)
    right: dict[str, list[bool]] = {}
    for index in range(count):
        shown = sample(1, index, "heldout", num_questions=QUESTIONS)
        alone = [Sample(shown.pictures, shown.clip, (question,)) for question in shown.questions]
        encoded = [encoder.encode(conversation(one, painted=False), mode="train") for one in alone]
        rows = torch.from_numpy(codes(labels_of(shown))).repeat(len(alone), 1)
        found, wanted = module.logits(pack(encoded), rows)
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
    encoder = Encoder(config(tokenizer), tokenizer)
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
            module, [labelled(seed, index, "train", encoder) for index in range(step * BATCH, (step + 1) * BATCH)]
        ),
        measure=lambda module: measure(module.eval(), encoder),
        log=folder / "language.jsonl",
        save=save,
    )
