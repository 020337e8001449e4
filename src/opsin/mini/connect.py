"""Third stage: the connector learns to write, from what the tower sees, the rows that the language model can read.

LLaVA's first stage teaches its projector through captions. Here both sides are known row by row, so the connector
learns by regression: far more is told about each picture, and minutes are enough.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin import weights
from opsin.demo.fit import Fit, fit, save_half
from opsin.mini import tower
from opsin.mini.language import DECODER_FILE, ORACLE_FILE, Oracle, Speller, told
from opsin.mini.model import config
from opsin.nn.vlm import VLM
from opsin.spec.recipe import AdamW, Muon
from opsin.text.tokenizer import load_tokenizer
from opsin.weights import save_native

FILE = "connector.safetensors"
START = "start"
"""Folder, in the recipe's, of the whole model that fine-tuning starts from."""
RUN = Fit(
    steps=1000,
    optim=Muon(lr=0.005, scale="match_rms_adamw", rest=AdamW(lr=0.002, betas=(0.9, 0.98))),
    warmup_steps=50,
)


class Connecting(nn.Module):
    """Tower and oracle, which stay as they are, and the connector between them."""

    def __init__(self, vlm: VLM, oracle: Oracle, speller: Speller) -> None:
        super().__init__()
        self.vlm, self.oracle, self.speller = vlm, oracle, speller
        for part in (vlm.vision, vlm.decoder, oracle):
            part.requires_grad_(False)

    def forward(self, seed: int, step: int) -> Tensor:
        """How far rows are from those of the labels, as a share of how much these vary."""
        pages = tower.batch(seed, step, "train")
        with torch.no_grad():
            features = self.vlm.vision(pages.patches.to(self.vlm.vision.patch.weight.dtype), pages.grids)
            codes, numbers = (each.unflatten(0, (-1, 4)).numpy() for each in (pages.codes, pages.numbers))
            wanted = self.oracle(told(codes, numbers, self.speller), self.vlm.decoder.embed).float()
        rows = self.vlm.connector(features, pages.grids).float()
        return F.mse_loss(rows, wanted) / wanted.var()


def run(folder: Path, *, seed: int, settings: Fit = RUN) -> None:
    """Train with the parts in `folder`; write the connector, its log and the whole model there."""
    words = load_tokenizer(folder)
    vlm = weights.build(config(words), seed=seed)
    vlm.vision.load_state_dict(load_file(folder / tower.FILE))
    vlm.decoder.load_state_dict(load_file(folder / DECODER_FILE))
    oracle = Oracle(vlm.decoder.config.dim)
    oracle.load_state_dict(load_file(folder / ORACLE_FILE))
    module = Connecting(vlm, oracle, Speller(words))

    def loss(module: nn.Module, step: int) -> Tensor:
        return module(seed + 1000, step)

    @torch.no_grad()
    def measure(module: nn.Module) -> dict[str, float]:
        return {"unexplained": float(np.mean([module(seed + 2000, step) for step in range(10)]))}

    def save(module: nn.Module) -> None:
        assert isinstance(module, Connecting)
        save_half(module.vlm.connector.state_dict(), folder / FILE, {"made_by": "opsin.mini connect"})

    fit(module, settings, loss=loss, measure=measure, log=folder / "connect.jsonl", save=save)
    save_native(folder / START, vlm, vlm.config, words)
