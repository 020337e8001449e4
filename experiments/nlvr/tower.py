"""Pretraining of the tower on drawn pictures, with the facts of `labels`. The classifiers are thrown away."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from experiments.nlvr.labels import NUM_FACTS, PATCHES, patch_facts, relevant, row_facts
from experiments.nlvr.model import COLUMNS, PATCH, ROWS, TOWER
from experiments.nlvr.scenes import draw_scene, render
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from opsin.demo.fit import Fit, fit, spread_normal_
from opsin.nn.vision import VisionTower
from opsin.spec.recipe import AdamW, Muon

RUN = Fit(
    steps=1300,
    optim=Muon(lr=0.005, weight_decay=0.02, scale="match_rms_adamw", rest=AdamW(lr=0.002, betas=(0.9, 0.98))),
    log_every=50,
    measure_every=200,
    save_every=200,
)
FILE = "tower.safetensors"
BATCH = 32
"""Pictures per step."""
Batch = tuple[Tensor, Tensor, Tensor]
"""Patches (N * 64, 3 * PATCH * PATCH); facts of what stands in them (N, 64, 25), and of their accounts (N, 64, F)."""


class TowerWithHeads(nn.Module):
    """The tower, and a linear classifier for each of the two kinds of facts."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = VisionTower(TOWER)
        self.patch, self.account = nn.Linear(TOWER.dim, 25), nn.Linear(TOWER.dim, NUM_FACTS)
        for name, tensor in self.vision.named_parameters():
            if name == "positions":
                nn.init.normal_(tensor, std=0.3)
            elif tensor.ndim == 2:
                spread_normal_(tensor)
            elif name.endswith("bias"):
                nn.init.zeros_(tensor)
        for tensor in (*self.patch.parameters(), *self.account.parameters()):
            nn.init.zeros_(tensor)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """patches: (N * 64, 3 * PATCH * PATCH) -> logits (N, 64, 25) and (N, 64, F)."""
        features = self.vision(patches, grids(len(patches) // (ROWS * COLUMNS)))
        features = features.view(-1, ROWS * COLUMNS, TOWER.dim)
        return self.patch(features), self.account(features)


def grids(count: int) -> Tensor:
    """(count, 3) frames, rows and columns of patches of each picture."""
    return torch.tensor([[1, ROWS, COLUMNS]]).expand(count, 3)


def to_patches(pictures: NDArray[np.uint8]) -> Tensor:
    """pictures: (N, 100, 400, 3) -> (N * 64, 3 * PATCH * PATCH), as `media.prepare` makes them."""
    cut = pictures.reshape(-1, ROWS, PATCH, COLUMNS, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    pixels = torch.from_numpy(np.ascontiguousarray(cut)).float().view(-1, 3, PATCH**2)
    mean, std = (255 * torch.tensor(each)[:, None] for each in (TOWER.mean, TOWER.std))
    return ((pixels - mean) / std).flatten(1)


def batch(seed: int, start: int, count: int, split: str) -> Batch:
    """Pictures start..start+count-1 of a split, with their facts."""
    scenes = [draw_scene(random.Random(f"tower/{seed}/{split}/{index}")) for index in range(start, start + count)]
    patches = to_patches(np.stack([render(scene) for scene in scenes]))
    of_patches, accounts = (np.stack([*map(facts, scenes)]) for facts in (patch_facts, row_facts))
    return patches, torch.from_numpy(of_patches), torch.from_numpy(accounts)


def loss(module: nn.Module, seed: int, step: int) -> Tensor:
    """Cross-entropies of both kinds of facts, each ten times the mean over facts."""
    patches, *facts = batch(seed, step * BATCH, BATCH, "train")
    of_patch, of_account = module(patches.bfloat16())
    known = _known()
    return 10 * (_entropy(of_patch, facts[0]) + _entropy(of_account[:, known], facts[1][:, known]))


def _known() -> Tensor:
    return torch.from_numpy(relevant())


def _entropy(guess: Tensor, fact: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(guess.float(), fact)


@torch.no_grad()
def measure(module: nn.Module, *, count: int = 256) -> dict[str, float]:
    """On unseen pictures: balanced accuracy over facts of patches, and of accounts by place (0.5 is chance)."""
    patches, of_patch, of_account = batch(1, 0, count, "heldout")
    guessed, account = module(patches)
    figures = {"patch": _balanced(guessed, of_patch)}
    for name, places in (("box", PATCHES[:3]), ("picture", PATCHES[3:])):
        known = torch.zeros_like(_known())
        known[places.ravel()] = _known()[places.ravel()]
        figures[name] = _balanced(account[:, known], of_account[:, known])
    return figures


def _balanced(guess: Tensor, fact: Tensor) -> float:
    right, fact = (guess > 0) == (fact > 0.5), fact > 0.5
    return float((right[fact].float().mean() + right[~fact].float().mean()) / 2)


def run(folder: Path, *, seed: int, steps: int = RUN.steps) -> None:
    """Train a tower; writes FILE and its log."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def save(module: nn.Module) -> None:
        assert isinstance(module, TowerWithHeads)
        tensors = {name: tensor.contiguous() for name, tensor in module.vision.state_dict().items()}
        save_file(tensors, folder / FILE)

    fit(
        TowerWithHeads(),
        replace(RUN, steps=steps),
        loss=lambda module, step: loss(module, seed, step),
        measure=measure,
        log=folder / "tower.jsonl",
        save=save,
    )
