"""First stage: the vision tower learns what stands in each patch.

A tower of this size learns far faster when every patch is told what it shows than from captions (docs/demo_parts.md).
The pictures are fuller than those of the questions: lines of letters and digits, rows of things, charts; each an
example of dozens of patches. The classifiers are thrown away.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from opsin.demo.drawn import draw
from opsin.demo.fit import Fit, fit, save_half, spread_normal_
from opsin.demo.labels import ANCHORS, COVERS, DIGITS, INKS
from opsin.demo.scene import COLORS, LETTERS, MAX_BAR, SHAPES, Scene, Split, Thing, Writing, draw_ground, pick_pair
from opsin.mini.labels import (
    ACROSS,
    ANCHOR,
    BEFORE,
    COVER,
    DOWN,
    INK,
    NUM_WAVES,
    PREVIOUS,
    THIRDS_ACROSS,
    THIRDS_DOWN,
    VALUE,
    patch_labels,
    waves,
)
from opsin.mini.model import PATCH, TOKEN, TOWER
from opsin.mini.scenes import CHART_HEIGHT, MAX_AREA, SIDES, chart, objects, thing, writing
from opsin.nn.positions import patch_places
from opsin.nn.vision import VisionTower
from opsin.spec.recipe import AdamW, Muon

FILE = "tower.safetensors"
RUN = Fit(
    steps=3600,
    optim=Muon(lr=0.005, weight_decay=0.02, scale="match_rms_adamw", rest=AdamW(lr=0.002, betas=(0.9, 0.98))),
)
PATCHES = 3600
"""Patches per step, about: 25 pictures of 96x96."""
_NOTHING_WEIGHT = {"anchor": 0.1, "cover": 0.3, "ink": 0.3, "previous": 0.1, "value": 0.2, "down": 0.1, "across": 0.1}
"""Weight of the patches that show nothing, which are most."""
_LOSS_WEIGHT = {"anchor": 1.0, "cover": 0.5, "ink": 0.7, "previous": 0.7, "value": 0.5, "down": 0.3, "across": 0.3}
_REACH_WEIGHT, _PLACE_WEIGHT, _WAVES_WEIGHT = 1.0, 3.0, 2.0
_EMPTY_WEIGHT = 0.05
"""Weight, beside the patches in which a thing is centred, of those whose waves are to be none."""
REACH = 12.0
"""Pixels."""
_KINDS = {"shapes": (1, 11), "letters": (11, 37), "digits": (37, 47), "values": (47, 56)}
"""Ranges of ANCHORS that the log reports apart."""
_FIELDS = {
    "anchor": (ANCHOR, ANCHORS),
    "cover": (COVER, COVERS),
    "ink": (INK, INKS),
    "previous": (PREVIOUS, BEFORE),
    "value": (VALUE, tuple(range(MAX_BAR + 1))),
    "down": (DOWN, THIRDS_DOWN),
    "across": (ACROSS, THIRDS_ACROSS),
}
Picture = tuple[Scene, Scene]
"""Two frames; of a still picture the same twice."""


class TowerWithHeads(nn.Module):
    """The tower, and one linear classifier per question about a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = VisionTower(TOWER)
        self.norm = nn.LayerNorm(TOWER.dim)
        self.heads = nn.ModuleDict({name: nn.Linear(TOWER.dim, len(names)) for name, (_, names) in _FIELDS.items()})
        self.heads["reach"] = nn.Linear(TOWER.dim, 4)
        self.heads["place"] = nn.Linear(TOWER.dim, 2)
        self.heads["waves"] = nn.Linear(TOWER.dim, NUM_WAVES)
        for name, tensor in self.vision.named_parameters():
            if name == "positions":
                nn.init.zeros_(tensor)
            elif tensor.ndim == 2:
                spread_normal_(tensor, 0.5 if name.endswith(("out.weight", "down.weight")) else 1.0)
            elif name.endswith("bias"):
                nn.init.zeros_(tensor)
        for tensor in self.heads.parameters():
            nn.init.zeros_(tensor)

    def forward(self, patches: Tensor, grids: Tensor) -> dict[str, Tensor]:
        """patches: (P, 3 * 2 * PATCH * PATCH), grids: (N, 3) -> (P, classes or numbers) by question."""
        features = self.norm(self.vision(patches, grids))
        return {name: head(features) for name, head in self.heads.items()}


def sheet(rng: random.Random, size: tuple[int, int], split: Split) -> Scene:
    """A picture full of lines: of any letters or digits, or of things."""
    width, height = size
    writings: list[Writing] = []
    things: list[Thing] = []
    top = 0
    while top + 18 <= height:
        bottom = min(height, top + rng.randint(18, 40))
        if rng.random() < 0.6:
            pool = LETTERS if rng.random() < 0.65 else DIGITS
            text = "".join(rng.choice(pool) for _ in range(rng.randint(2, width // 13)))
            while text and not (line := writing(rng, text, size, top=top, bottom=bottom)):
                text = text[:-1]
            if text and line:
                writings.append(line)
        else:
            left = rng.uniform(0, 12)
            while left + 16 <= width:
                side = (
                    rng.randrange(16, min(36, bottom - top + 1, int(width - left) + 1), 2) if bottom - top > 16 else 16
                )
                y = rng.uniform(top + side / 2, max(top + side / 2, bottom - side / 2))
                pair = pick_pair(rng, split) if rng.random() < 0.3 else _any_pair(rng, split)
                things.append(thing(rng, *pair, left + side / 2, min(y, height - side / 2), side, size))
                left += side + rng.choice((3, 3, 8, 20))
        top = bottom + rng.randint(0, 6)
    return Scene("objects", draw_ground(rng), things=tuple(things), writings=tuple(writings), size=size)


def _any_pair(rng: random.Random, split: Split) -> tuple[str, str]:
    """A shape and a colour, every shape as often as any other."""
    return (
        pick_pair(rng, split, shape=rng.choice(SHAPES))
        if rng.random() < 0.5
        else pick_pair(rng, split, color=rng.choice(list(COLORS)))
    )


def moved(rng: random.Random, scene: Scene) -> Picture:
    """Two frames between which one thing moves; half-way it stands where `scene` has it."""
    if not scene.things:
        return scene, scene
    number = rng.randrange(len(scene.things))
    dx, dy = rng.choice(((1, 0), (-1, 0), (0, 1), (0, -1)))
    far = rng.uniform(2, 8)
    frames = []
    for share in (-0.5, 0.5):
        mover = scene.things[number]
        mover = replace(mover, x=mover.x + share * far * dx, y=mover.y + share * far * dy)
        frames.append(replace(scene, things=(*scene.things[:number], mover, *scene.things[number + 1 :])))
    return frames[0], frames[1]


@dataclass(frozen=True, eq=False, slots=True)
class Pages:
    """Pictures of one size, and what stands in each of their patches, in the patches' order."""

    patches: Tensor
    """(P, 3 * 2 * PATCH * PATCH)."""
    grids: Tensor
    """(N, 3)."""
    codes: Tensor
    """(P, 7)."""
    numbers: Tensor
    """(P, 5)."""

    @property
    def places(self) -> Tensor:
        """(P, 2) how far down and across the middle of each patch stands, as shares of the sides."""
        size = int(self.grids[0, 1]), int(self.grids[0, 2])
        places = patch_places(size, block=TOWER.patch_block, device=self.grids.device)
        return ((places + 0.5) / torch.tensor(size)).repeat(len(self.grids), 1)

    def reaches(self, here: Tensor) -> Tensor:
        """(n, 4) how far the box of the thing centred there reaches to the left, the top, the right and the bottom.

        here: (P,) which patches, n of them. In REACH pixels, less 1: about -1 to 1.
        """
        middles = self.places[here].flip(-1)  # across, down
        edges = self.numbers[here, :4]
        far = torch.cat([middles - edges[:, :2], edges[:, 2:] - middles], dim=1)
        sides = self.grids[0, 1:].flip(-1).repeat(2) * PATCH
        return far * sides / REACH - 1


def batch(seed: int, step: int, split: Split) -> Pages:
    """The pictures of a step."""
    rng = random.Random(f"tower/{seed}/{split}/{step}")
    if charts := rng.random() < 0.25:
        size = (rng.choice((80, 96, 112)), CHART_HEIGHT)
    else:
        sizes = [(w, h) for w in SIDES for h in SIDES if w * h <= MAX_AREA]
        size = rng.choice(sizes)
    count = max(8, PATCHES * PATCH**2 // (size[0] * size[1]))
    frames: list[NDArray[np.uint8]] = []
    labels: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    for _ in range(count):
        if charts and rng.random() < 0.6:
            scene = chart(rng, split, width=size[0])
            first, second = scene, scene
        elif rng.random() < 0.25:
            scene = objects(rng, split, size=size)
            first, second = moved(rng, scene) if rng.random() < 0.6 else (scene, scene)
        else:
            scene = sheet(rng, size, split)
            first, second = scene, scene
        picture = np.asarray(draw(first))
        frames += [picture, picture if second is first else np.asarray(draw(second))]
        labels.append(patch_labels(scene).in_blocks())
    grids = torch.tensor([[1, size[1] // PATCH, size[0] // PATCH]]).expand(count, 3)
    codes, numbers = (torch.from_numpy(np.concatenate(each)).flatten(0, 1) for each in zip(*labels, strict=True))
    return Pages(to_patches(np.stack(frames)), grids, codes, numbers)


def to_patches(frames: NDArray[np.uint8]) -> Tensor:
    """(2 * N, height, width, 3) pairs of frames -> (P, 3 * 2 * PATCH * PATCH), as `media.prepare` makes them."""
    pixels = (frames.astype(np.float32) / 255 - np.array(TOWER.mean, np.float32)) / np.array(TOWER.std, np.float32)
    _, height, width, _ = frames.shape
    cut = pixels.reshape(-1, 2, height // TOKEN, 2, PATCH, width // TOKEN, 2, PATCH, 3)
    cut = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # block, patch in the block, channel, frame, y, x
    return torch.from_numpy(np.ascontiguousarray(cut).reshape(-1, 3 * 2 * PATCH**2))


def loss(module: nn.Module, seed: int, step: int) -> Tensor:
    """Weighted cross-entropies of the codes, and how far off the numbers are, of one batch."""
    pages = batch(seed, step, "train")
    found = {name: each.float() for name, each in module(pages.patches.bfloat16(), pages.grids).items()}
    total = _PLACE_WEIGHT * F.smooth_l1_loss(found["place"], 2 * pages.places - 1, beta=0.05)
    for name, (place, names) in _FIELDS.items():
        by_class = torch.ones(len(names))
        by_class[0] = _NOTHING_WEIGHT[name]
        total = total + _LOSS_WEIGHT[name] * F.cross_entropy(found[name], pages.codes[:, place], weight=by_class)
    here = pages.codes[:, DOWN] > 0
    if here.any():
        total = total + _REACH_WEIGHT * F.smooth_l1_loss(found["reach"][here], pages.reaches(here), beta=0.2)
    off = (found["waves"] - torch.from_numpy(waves(pages.numbers.numpy()))).square().mean(-1)
    weights = torch.where(here, 1.0, _EMPTY_WEIGHT)
    return total + _WAVES_WEIGHT * (off * weights).sum() / weights.sum()


@torch.no_grad()
def measure(module: nn.Module, *, count: int = 24) -> dict[str, float]:
    """Accuracy on patches of `count` batches of held-out pictures, by kind of what stands there."""
    right: dict[str, list[Tensor]] = {}
    for step in range(count):
        pages = batch(1, step, "heldout")
        found = module(pages.patches, pages.grids)
        anchor, guess = pages.codes[:, ANCHOR], found["anchor"].argmax(-1)
        right.setdefault("nothing", []).append(guess[anchor == 0] == 0)
        for kind, (first, stop) in _KINDS.items():
            here = (anchor >= first) & (anchor < stop)
            right.setdefault(kind, []).append(guess[here] == anchor[here])
        for name, (place, _) in _FIELDS.items():
            here = pages.codes[:, place] > 0
            if name != "anchor":
                right.setdefault(name, []).append(found[name].argmax(-1)[here] == pages.codes[here, place])
        here = pages.codes[:, DOWN] > 0
        off = (found["reach"][here] - pages.reaches(here)).abs() * REACH
        right.setdefault("reach_within_2px", []).append(off <= 2)
        off = (found["place"] / 2 + 0.5 - pages.places).abs().amax(-1)
        right.setdefault("place_within_2_percent", []).append(off <= 0.02)
        wanted = torch.from_numpy(waves(pages.numbers[here].numpy()))
        right.setdefault("waves_unexplained", []).append((found["waves"][here] - wanted).square() / wanted.var())
    return {
        name: float(torch.cat([each.flatten() for each in values]).float().mean()) for name, values in right.items()
    }


def run(folder: Path, *, seed: int, settings: Fit = RUN) -> None:
    """Train a tower and write it and its log to `folder`."""
    torch.manual_seed(seed)

    def save(module: nn.Module) -> None:
        assert isinstance(module, TowerWithHeads)
        save_half(module.vision.state_dict(), folder / FILE, {"made_by": "opsin.mini tower"})

    fit(
        TowerWithHeads(),
        settings,
        loss=lambda module, step: loss(module, seed, step),
        measure=measure,
        log=folder / "tower.jsonl",
        save=save,
    )
