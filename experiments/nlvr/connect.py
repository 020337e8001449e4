"""The connector learns to write, from what the tower sees, the rows that the language model can read."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from experiments.nlvr.labels import row_facts
from experiments.nlvr.language import DECODER_FILE, ORACLE_FILE, Oracle
from experiments.nlvr.model import config
from experiments.nlvr.scenes import draw_scene, render
from experiments.nlvr.tower import grids, to_patches
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin import weights
from opsin.demo.fit import Fit, fit
from opsin.nn.vlm import VLM
from opsin.spec.recipe import AdamW, Muon
from opsin.text.tokenizer import load_tokenizer

RUN = Fit(
    steps=600,
    optim=Muon(lr=0.005, scale="match_rms_adamw", rest=AdamW(lr=0.002, betas=(0.9, 0.98))),
    warmup_steps=50,
    log_every=50,
    measure_every=200,
)
BATCH = 32
"""Pictures per step."""


class Connecting(nn.Module):
    """Tower and oracle, which stay as they are, and the connector between them."""

    def __init__(self, vlm: VLM, oracle: Oracle) -> None:
        super().__init__()
        self.vlm, self.oracle = vlm, oracle
        for part in (vlm.vision, vlm.decoder, oracle):
            part.requires_grad_(False)

    def forward(self, seed: int, step: int) -> Tensor:
        """How far rows are from those of the facts, as a share of how much these vary from picture to picture."""
        scenes = [draw_scene(random.Random(f"connect/{seed}/{step}/{index}")) for index in range(BATCH)]
        places = grids(BATCH)
        patches = to_patches(np.stack([render(scene) for scene in scenes]))
        with torch.no_grad():
            features = self.vlm.vision(patches.to(self.vlm.vision.patch.weight.dtype), places)
            facts = torch.from_numpy(np.concatenate([row_facts(scene) for scene in scenes]))
            wanted = self.oracle(facts, self.vlm.decoder.embed).float()
        rows = self.vlm.connector(features, places).float()
        return F.mse_loss(rows, wanted) / wanted.view(BATCH, -1, wanted.shape[-1]).var(0).mean()


def run(folder: Path, out: Path, *, tower: Path, seed: int, settings: Fit = RUN) -> None:
    """Train between the tower and the language model of `folder`; write the whole model to `out`, and a log beside."""
    words = load_tokenizer(folder)
    description = config(words)
    torch.manual_seed(seed)
    vlm = weights.build(description, seed=seed)
    vlm.vision.load_state_dict(load_file(tower))
    vlm.decoder.load_state_dict(load_file(folder / DECODER_FILE))
    oracle = Oracle(words, vlm.decoder.config.dim)
    oracle.load_state_dict(load_file(folder / ORACLE_FILE))

    @torch.no_grad()
    def measure(module: nn.Module) -> dict[str, float]:
        return {"unexplained": float(np.mean([module(seed + 2000, step) for step in range(8)]))}

    fit(
        Connecting(vlm, oracle),
        settings,
        loss=lambda module, step: module(seed + 1000, step),
        measure=measure,
        log=folder / "connect.jsonl",
        save=lambda module: None,
    )
    weights.save_native(out, vlm, description, words)
