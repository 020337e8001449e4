"""Pretraining of the vision tower with dense supervision: what stands in each patch, what covers it, in which colour.

CLIP learns from hundreds of millions of captions; a tower of this size learns far faster when every patch is told what
it shows. The classifiers are thrown away. The last block and the class token, which LLaVA does not read, learn what the
whole picture shows, so that every tensor of the tower has been trained.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from opsin.demo.drawn import draw
from opsin.demo.fit import Fit, fit, save_half, spread_normal_
from opsin.demo.labels import ANCHORS, COVERS, GRID, INKS, PatchLabels, patch_labels
from opsin.demo.scene import PATCH, Split, draw_scene
from opsin.demo.shipped import TOWER, TOWER_FILE
from opsin.nn.vision import VisionTower
from opsin.spec.recipe import AdamW, Muon

RUN = Fit(
    steps=5000,
    optim=Muon(lr=0.005, weight_decay=0.02, scale="match_rms_adamw", rest=AdamW(lr=0.002, betas=(0.9, 0.98))),
)
BATCH = 32
"""Pictures per step."""
_NOTHING_WEIGHT = {"anchor": 0.1, "cover": 0.3, "ink": 0.3}
"""Weight of the patches that show nothing, which are most."""
_LOSS_WEIGHT = {"anchor": 1.0, "cover": 0.5, "ink": 1.0}
_PICTURE_WEIGHT = 0.1
"""Weight of what the class token is asked."""
SUMMARY = (*COVERS[1:], *INKS[1:])
"""What the class token must tell of the whole picture: is there any?"""
_KINDS = {"shapes": (1, 11), "letters": (11, 37), "digits": (37, 47), "values": (47, 56)}
"""Ranges of ANCHORS that the log reports apart."""


class TowerWithHeads(nn.Module):
    """The tower, one linear classifier per question about a patch, and one about the picture."""

    def __init__(self) -> None:
        super().__init__()
        # Both the hidden state that the demo reads and the last one come out, with the class token.
        config = TOWER.replace(out_layers=(-2, -1), class_token="keep")
        self.vision = VisionTower(config)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(TOWER.dim, len(names))
                for name, names in zip(_LOSS_WEIGHT, (ANCHORS, COVERS, INKS), strict=True)
            }
        )
        self.summary = nn.Linear(TOWER.dim, len(SUMMARY))
        for name, tensor in self.vision.named_parameters():
            if name == "positions" or name == "class_token":
                nn.init.normal_(tensor, std=0.3)
            elif tensor.ndim == 2:
                spread_normal_(tensor)
        for tensor in (*self.heads.parameters(), *self.summary.parameters()):
            nn.init.zeros_(tensor)

    def forward(self, patches: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """patches: (N * GRID * GRID, 3 * PATCH * PATCH) -> logits per patch by question; (N, len(SUMMARY)) logits."""
        grids = torch.tensor([[1, GRID, GRID]]).expand(len(patches) // GRID**2, 3)
        states = self.vision(patches, grids).view(len(grids), GRID**2 + 1, 2, TOWER.dim)
        features = states[:, 1:, 0].flatten(0, 1)
        assert self.vision.norm_post is not None
        whole = self.vision.norm_post(states[:, 0, 1])
        return {name: head(features) for name, head in self.heads.items()}, self.summary(whole)


def to_patches(pictures: NDArray[np.uint8]) -> Tensor:
    """pictures: (N, SIDE, SIDE, 3) -> (N * GRID * GRID, 3 * PATCH * PATCH), as `media.prepare` makes them."""
    pixels = (pictures.astype(np.float32) / 255 - np.array(TOWER.mean, np.float32)) / np.array(TOWER.std, np.float32)
    cut = pixels.reshape(-1, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    return torch.from_numpy(np.ascontiguousarray(cut).reshape(-1, 3 * PATCH**2))


def batch(seed: int, start: int, count: int, split: Split) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Pictures start..start+count-1 of a split: patches, labels by question, and what the pictures show at all."""
    pictures: list[NDArray[np.uint8]] = []
    labels: list[PatchLabels] = []
    for index in range(start, start + count):
        scene = draw_scene(random.Random(f"tower/{seed}/{split}/{index}"), split)
        pictures.append(np.asarray(draw(scene)))
        labels.append(patch_labels(scene))
    stacked = {name: torch.from_numpy(np.stack([getattr(item, name) for item in labels])) for name in _LOSS_WEIGHT}
    flat = {name: value.flatten() for name, value in stacked.items()}
    seen = [
        F.one_hot(stacked[name].flatten(1), len(names)).amax(1)[:, 1:]
        for name, names in (("cover", COVERS), ("ink", INKS))
    ]
    return to_patches(np.stack(pictures)), flat, torch.cat(seen, dim=1).float()


def loss(module: nn.Module, seed: int, step: int) -> Tensor:
    """Weighted cross-entropies of one batch."""
    patches, labels, shown = batch(seed, step * BATCH, BATCH, "train")
    logits, whole = module(patches.bfloat16())
    total = _PICTURE_WEIGHT * F.binary_cross_entropy_with_logits(whole.float(), shown)
    for name, weight in _LOSS_WEIGHT.items():
        by_class = torch.ones(logits[name].shape[1])
        by_class[0] = _NOTHING_WEIGHT[name]
        total = total + weight * F.cross_entropy(logits[name].float(), labels[name], weight=by_class)
    return total


@torch.no_grad()
def measure(module: nn.Module, *, count: int = 500) -> dict[str, float]:
    """Accuracy on patches of held-out pictures, by kind of what stands there."""
    patches, labels, _ = batch(1, 0, count, "heldout")
    logits, _ = module(patches)
    anchor, guess = labels["anchor"], logits["anchor"].argmax(-1)
    figures = {"nothing": _share(guess[anchor == 0] == 0)}
    for kind, (first, stop) in _KINDS.items():
        here = (anchor >= first) & (anchor < stop)
        figures[kind] = _share(guess[here] == anchor[here])
    for name in ("cover", "ink"):
        here = labels[name] > 0
        figures[name] = _share(logits[name].argmax(-1)[here] == labels[name][here])
    return figures


def _share(right: Tensor) -> float:
    return float(right.float().mean())


def run(folder: Path, *, seed: int, settings: Fit = RUN) -> None:
    """Train a tower and write it and its log to `folder`."""
    torch.manual_seed(seed)
    module = TowerWithHeads()

    def save(module: nn.Module) -> None:
        assert isinstance(module, TowerWithHeads)
        save_half(module.vision.state_dict(), folder / TOWER_FILE, {"made_by": "opsin.demo.pretrain tower"})

    fit(
        module,
        settings,
        loss=lambda module, step: loss(module, seed, step),
        measure=measure,
        log=folder / "tower.jsonl",
        save=save,
    )
