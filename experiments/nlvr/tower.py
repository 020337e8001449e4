"""Pretraining of the tower on drawn pictures, with the facts of `labels`. The classifiers are thrown away."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from experiments.nlvr.labels import GROUPS, IN_BOX, box_facts, patch_facts
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
BATCH = 32
"""Pictures per step."""
_WEIGHTS = {"patch": 1.0, "box": 1.0, "picture": 1.0}
_GAP = np.flatnonzero(~IN_BOX).reshape(ROWS, -1)
"""Numbers of the patches in the gaps, row by row."""
Batch = tuple[Tensor, Tensor, Tensor, list[Tensor]]
"""Patches; facts of every patch in a box, of its box, and of the picture by group."""


class TowerWithHeads(nn.Module):
    """The tower and one linear classifier per level of facts."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = VisionTower(TOWER)
        *_, patch, box, picture = batch(0, 0, 1, "heldout")
        self.patch = nn.Linear(TOWER.dim, patch.shape[-1])
        self.box = nn.Linear(TOWER.dim, box.shape[-1])
        self.picture = nn.ModuleList(nn.Linear(TOWER.dim, facts.shape[-1]) for facts in picture)
        for name, tensor in self.vision.named_parameters():
            if name == "positions":
                nn.init.normal_(tensor, std=0.3)
            elif tensor.ndim == 2:
                spread_normal_(tensor)
            elif name.endswith("bias"):
                nn.init.zeros_(tensor)
        for tensor in (*self.patch.parameters(), *self.box.parameters(), *self.picture.parameters()):
            nn.init.zeros_(tensor)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """patches: (N * 64, 3 * PATCH * PATCH) -> logits (N, 48, facts) of patches and of their boxes; of the picture
        (N, 8, facts) by group."""
        grids = torch.tensor([[1, ROWS, COLUMNS]]).expand(len(patches) // (ROWS * COLUMNS), 3)
        features = self.vision(patches, grids).view(len(grids), ROWS * COLUMNS, TOWER.dim)
        boxes = features[:, torch.from_numpy(IN_BOX)]
        picture = [head(features[:, torch.from_numpy(row)]) for head, row in zip(self.picture, _GAP, strict=True)]
        return self.patch(boxes), self.box(boxes), picture


def to_patches(pictures: NDArray[np.uint8]) -> Tensor:
    """pictures: (N, 100, 400, 3) -> (N * 64, 3 * PATCH * PATCH), as `media.prepare` makes them."""
    cut = pictures.reshape(-1, ROWS, PATCH, COLUMNS, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    pixels = torch.from_numpy(np.ascontiguousarray(cut)).float().view(-1, 3, PATCH**2)
    mean, std = (255 * torch.tensor(each)[:, None] for each in (TOWER.mean, TOWER.std))
    return ((pixels - mean) / std).flatten(1)


def batch(seed: int, start: int, count: int, split: str) -> Batch:
    """Pictures start..start+count-1 of a split, with their facts."""
    scenes = [draw_scene(random.Random(f"tower/{seed}/{split}/{index}")) for index in range(start, start + count)]
    by_patch = np.stack([patch_facts(scene) for scene in scenes]).reshape(count, ROWS * COLUMNS, -1)[:, IN_BOX]
    by_box = torch.tensor([[box_facts(scene, box) for box in scene.boxes] for scene in scenes], dtype=torch.float32)
    # Patches run row by row: four of each box, ROWS times.
    by_box = by_box.repeat_interleave(4, dim=1).repeat(1, ROWS, 1)
    picture = [torch.tensor([facts(scene) for scene in scenes], dtype=torch.float32) for facts in GROUPS]
    patches = to_patches(np.stack([render(scene) for scene in scenes]))
    return patches, torch.from_numpy(by_patch), by_box, [facts[:, None] for facts in picture]


def loss(module: nn.Module, seed: int, step: int) -> Tensor:
    """Sum over levels of the cross-entropy in bits of all facts of a patch, box or picture, each level's own mean."""
    patches, *facts, picture = batch(seed, step * BATCH, BATCH, "train")
    *logits, whole = module(patches.bfloat16())
    total = sum(
        weight * _entropy(guess, fact)
        for weight, guess, fact in zip((_WEIGHTS["patch"], _WEIGHTS["box"]), logits, facts, strict=True)
    )
    for guess, fact in zip(whole, picture, strict=True):
        total = total + _WEIGHTS["picture"] / len(whole) * _entropy(guess, fact)
    return total


def _entropy(guess: Tensor, fact: Tensor) -> Tensor:
    return 10 * F.binary_cross_entropy_with_logits(guess.float(), fact.expand(guess.shape))


@torch.no_grad()
def measure(module: nn.Module, *, count: int = 256) -> dict[str, float]:
    """On unseen pictures: balanced accuracy over the facts of each level (0.5 is chance)."""
    patches, *facts, picture = batch(1, 0, count, "heldout")
    *logits, whole = module(patches)
    figures = {name: _balanced(guess, fact) for name, guess, fact in zip(("patch", "box"), logits, facts, strict=True)}
    names = ("counted", "places", "towers", "contents")
    return figures | {name: _balanced(guess, fact) for name, guess, fact in zip(names, whole, picture, strict=True)}


def _balanced(guess: Tensor, fact: Tensor) -> float:
    fact = fact.expand(guess.shape) > 0.5
    right = (guess > 0) == fact
    return float((right[fact].float().mean() + right[~fact].float().mean()) / 2)


def run(folder: Path, *, seed: int, steps: int = RUN.steps) -> None:
    """Train a tower; writes tower.safetensors and its log."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def save(module: nn.Module) -> None:
        assert isinstance(module, TowerWithHeads)
        tensors = {name: tensor.contiguous() for name, tensor in module.vision.state_dict().items()}
        save_file(tensors, folder / "tower.safetensors")

    fit(
        TowerWithHeads(),
        replace(RUN, steps=steps),
        loss=lambda module, step: loss(module, seed, step),
        measure=measure,
        log=folder / "tower.jsonl",
        save=save,
    )
