"""The language model learns to answer before it has seen a pixel.

Where a picture's rows will stand, it is given the exact facts of a scene (`labels.row_facts`), as sums of a learned
vector per fact. It starts with exercises and goes over to sentences. `connect.py` then teaches the connector to write
such rows from what the tower sees. Nothing here has seen the data set but its words.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from experiments.nlvr.exercises import EQUALS, exercises
from experiments.nlvr.labels import NUM_FACTS, PATCHES, SETS, WHERE, Facts, row_facts
from experiments.nlvr.model import COLUMNS, PATCH, ROWS, config
from experiments.nlvr.scenes import Scene, draw_scene
from experiments.nlvr.sentences import sentences
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin import weights
from opsin.collate import pack
from opsin.demo.fit import Fit, fit, save_half, spread_blocks_
from opsin.encode import Encoded, Encoder
from opsin.nn.batch import Batch
from opsin.spec.recipe import AdamW, Muon
from opsin.text.messages import Conversation, ImagePart, Message, TextPart
from opsin.text.tokenizer import Tokenizer, load_tokenizer

DECODER_FILE, ORACLE_FILE = "decoder.safetensors", "oracle.safetensors"
RUN = Fit(
    steps=1300,
    optim=Muon(lr=0.003, weight_decay=0.02, scale="match_rms_adamw", rest=AdamW(lr=0.002, betas=(0.9, 0.98))),
)
BATCH = 16
"""Scenes per step."""
TURNS = 10
"""Exercises and sentences per scene; an exercise takes the place of four sentences."""
SENTENCES = (0.15, 0.85)
"""Share of the turns that are sentences, at the beginning and from the middle of the steps on."""
NOISE = 0.1
"""Size of the noise on the rows."""
_BLANK = Image.new("RGB", (PATCH * COLUMNS, PATCH * ROWS))
Turn = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Told:
    """One conversation about a scene, and its facts."""

    encoded: Encoded
    facts: Facts


class LanguageModel(nn.Module):
    """The decoder in its place in the whole model, and the rows that stand for pictures."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int) -> None:
        super().__init__()
        self.vlm = weights.build(config(tokenizer), seed=seed)
        self.vlm.vision.requires_grad_(False)
        self.vlm.connector.requires_grad_(False)
        nn.init.normal_(self.vlm.decoder.embed.weight, std=0.5)
        spread_blocks_(self.vlm.decoder.layers)
        self.oracle = Oracle(tokenizer, self.vlm.decoder.config.dim)

    def logits(self, batch: Batch, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the taught tokens, and these (M,). facts: (R, facts)."""
        rows = self.oracle(facts, self.vlm.decoder.embed)
        if self.training:
            rows = rows + torch.randn_like(rows) * NOISE
        places, wanted = batch.targets()
        return self.vlm.logits(self.vlm.hidden(batch, rows=rows, wanted=places)), wanted


class Oracle(nn.Module):
    """Rows from facts: the sum of a vector per fact, and of the words for what an account is about.

    What a sentence names then looks like the row that it has to be looked up in from the first step on.
    """

    def __init__(self, tokenizer: Tokenizer, dim: int) -> None:
        super().__init__()
        # Of three axes, so that Muon, which is for hidden matrices, leaves it to AdamW.
        self.table = nn.Parameter(torch.randn(1, NUM_FACTS, dim) * 0.2)
        names = [[f" {color}", f" {shape}", f" {shape}s"] for color, shape in SETS]
        ids = [[tokenizer.encode(name, "start").ids[0] if name.strip(" s") else 0 for name in each] for each in names]
        words = torch.zeros(WHERE * len(SETS), 3, dtype=torch.long)
        words[torch.from_numpy(PATCHES).ravel()] = torch.tensor(ids).repeat(WHERE, 1)
        self.register_buffer("words", words, persistent=False)

    def forward(self, facts: Tensor, embed: nn.Embedding) -> Tensor:
        """(R, facts) -> (R, D). embed: the decoder's."""
        words = F.embedding_bag(self.get_buffer("words"), embed.weight, mode="sum", padding_idx=0)
        rows = facts.to(self.table.dtype) @ self.table[0]
        return (rows.view(-1, *words.shape) + words).view_as(rows)


def turns(scene: Scene, rng: random.Random, share: float) -> list[Turn]:
    """What is asked and answered about a scene. share: of sentences."""
    count = sum(rng.random() < share for _ in range(TURNS))
    said = [(each.text, each.answer) for each in sentences(scene, rng, count, questions=0.1)]
    said += [(each.text, each.answer) for each in exercises(scene, rng, (TURNS - count + 3) // 4)]
    rng.shuffle(said)
    return said


def encoded(said: Sequence[Turn], encoder: Encoder) -> Encoded:
    """The conversation, of which only what stands behind an EQUALS is taught, and the answers that have none."""
    messages: list[Message] = []
    for text, answer in said:
        shown = () if messages else (ImagePart(0),)
        messages += [Message("user", (*shown, TextPart(text))), Message("assistant", (TextPart(answer),))]
    whole = encoder.encode(Conversation(tuple(messages), (_BLANK,)), mode="train")
    equals = encoder.tokenizer.encode(EQUALS, "start").ids[0]
    taught = whole.supervised.copy()
    borders = np.flatnonzero(np.diff(taught, prepend=False, append=False))
    for start, stop in zip(borders[::2], borders[1::2], strict=True):
        ids = whole.ids[start:stop]
        if equals in ids:
            taught[start:stop] = np.concatenate([[False], ids[:-1] == equals])
    return replace(whole, supervised=taught)


def told(seed: int, index: int, share: float, encoder: Encoder) -> Told:
    """Sample `index`."""
    rng = random.Random(f"language/{seed}/{index}")
    scene = draw_scene(rng)
    return Told(encoded(turns(scene, rng, share), encoder), row_facts(scene))


def loss(module: nn.Module, samples: Sequence[Told]) -> Tensor:
    """Cross-entropy of the taught tokens."""
    assert isinstance(module, LanguageModel)
    facts = torch.from_numpy(np.concatenate([each.facts for each in samples]))
    found, wanted = module.logits(pack([each.encoded for each in samples]), facts)
    return F.cross_entropy(found.float(), wanted)


@torch.no_grad()
def right(module: LanguageModel, scenes: Sequence[Scene], said: Sequence[Turn], encoder: Encoder) -> list[bool]:
    """For each scene and what is said about it, whether all that is taught is answered right."""
    good: list[bool] = []
    for start in range(0, len(scenes), 64):
        asked = [encoded([turn], encoder) for turn in said[start : start + 64]]
        facts = torch.from_numpy(np.concatenate([row_facts(scene) for scene in scenes[start : start + 64]]))
        found, wanted = module.logits(pack(asked), facts)
        counts = [int(each.supervised[1:].sum()) for each in asked]
        good += [bool(each.all()) for each in (found.argmax(-1) == wanted).split(counts)]
    return good


def measure(module: nn.Module, encoder: Encoder, *, count: int = 600) -> dict[str, float]:
    """Shares of right answers about unseen drawn scenes: sentences, and single facts of exercises.

    `blind`: the same sentences, with the facts of other scenes of their kind.
    """
    assert isinstance(module, LanguageModel)
    module.eval()
    found: dict[str, tuple[list[Scene], list[Turn]]] = {}
    for index in range(count):
        rng = random.Random(f"heldout/{index}")
        scene = draw_scene(rng)
        said = sentences(scene, rng, 1, questions=0)[0]
        exercise = rng.choice(exercises(scene, rng, 3))
        fact = rng.choice(exercise.facts)
        for kind, turn in (
            (f"sentence_{scene.kind}", (said.text, said.answer)),
            (f"fact_{exercise.text.split()[0]}", (exercise.text, f"{fact[0]}{EQUALS}{fact[1]}")),
        ):
            scenes, asked = found.setdefault(kind, ([], []))
            scenes.append(scene)
            asked.append(turn)
    for kind in [kind for kind in found if kind.startswith("sentence")]:
        scenes, asked = found[kind]
        found[f"blind_{kind}"] = [*scenes[1:], scenes[0]], asked
    return {kind: float(np.mean(right(module, *each, encoder))) for kind, each in sorted(found.items())}


def fresh(folder: Path, *, seed: int) -> tuple[LanguageModel, Encoder]:
    """A model that knows nothing, with the tokenizer in `folder`."""
    tokenizer = load_tokenizer(folder)
    return LanguageModel(tokenizer, seed=seed), Encoder(config(tokenizer), tokenizer)


def load(folder: Path) -> tuple[LanguageModel, Encoder]:
    """The model that `run` wrote."""
    module, encoder = fresh(folder, seed=0)
    module.vlm.decoder.load_state_dict(load_file(folder / DECODER_FILE))
    module.oracle.load_state_dict(load_file(folder / ORACLE_FILE))
    return module.eval(), encoder


def run(folder: Path, *, seed: int, settings: Fit = RUN) -> None:
    """Train with the tokenizer in `folder`; write decoder, oracle and log there."""
    torch.manual_seed(seed)
    module, encoder = fresh(folder, seed=seed)

    def step_loss(module: nn.Module, step: int) -> Tensor:
        first, last = SENTENCES
        share = first + (last - first) * min(1.0, 2 * step / settings.steps)
        numbers = range(step * BATCH, (step + 1) * BATCH)
        return loss(module.train(), [told(seed, index, share, encoder) for index in numbers])

    def save(module: nn.Module) -> None:
        assert isinstance(module, LanguageModel)
        save_half(module.vlm.decoder.state_dict(), folder / DECODER_FILE, {"made_by": "nlvr language"})
        save_half(module.oracle.state_dict(), folder / ORACLE_FILE, {"made_by": "nlvr language"})

    fit(
        module,
        settings,
        loss=step_loss,
        measure=lambda module: measure(module, encoder),
        log=folder / "language.jsonl",
        save=save,
    )
