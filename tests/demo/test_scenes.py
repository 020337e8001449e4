"""Seeded scenes and their pixels: the same everywhere, and without the combinations that training must not see."""

import random
import subprocess
import sys

import numpy as np
import pytest

from opsin.demo.drawn import draw, shape_mask
from opsin.demo.fonts import advance, glyph, heights, mask_height
from opsin.demo.labels import ANCHORS, COVERS, GRID, INKS, patch_labels, typed_picture
from opsin.demo.scene import (
    BAR_STEP,
    COLORS,
    HELDOUT_PAIRS,
    INK_STYLES,
    LETTERS,
    SHAPES,
    SIDE,
    TRAIN_PAIRS,
    WORDS,
    Scene,
    draw_scene,
    is_heldout,
)


def scenes(split: str, count: int = 400) -> list[Scene]:
    return [draw_scene(random.Random(f"{split} {index}"), split) for index in range(count)]


def test_a_seed_gives_the_same_picture_in_any_process() -> None:
    program = (
        "import random, zlib\n"
        "from opsin.demo.drawn import draw\n"
        "from opsin.demo.scene import draw_scene\n"
        "print(zlib.crc32(b''.join(draw(draw_scene(random.Random(i), 'train')).tobytes() for i in range(20))))"
    )
    runs = {subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1


def test_training_never_shows_a_held_out_combination() -> None:
    for scene in scenes("train"):
        assert not any((thing.shape, thing.color) in HELDOUT_PAIRS for thing in scene.things)
        assert not any(is_heldout(writing.kind, writing.text) for writing in scene.writings)
        assert not is_heldout("bars", " ".join(f"{bar.color} {bar.value}" for bar in scene.bars)) or not scene.bars


def test_the_held_out_split_shows_held_out_combinations() -> None:
    shown = scenes("heldout")
    things = [thing for scene in shown for thing in scene.things]
    held_out = sum((thing.shape, thing.color) in HELDOUT_PAIRS for thing in things)
    assert 0.4 < held_out / len(things) < 0.8
    assert all(is_heldout(writing.kind, writing.text) for scene in shown for writing in scene.writings)
    assert all(
        is_heldout("bars", " ".join(f"{bar.color} {bar.value}" for bar in scene.bars)) for scene in shown if scene.bars
    )


def test_every_shape_and_colour_is_seen_in_training() -> None:
    assert len(TRAIN_PAIRS) + len(HELDOUT_PAIRS) == len(SHAPES) * len(COLORS)
    assert 10 <= len(HELDOUT_PAIRS) <= 20
    assert {shape for shape, _ in TRAIN_PAIRS} == set(SHAPES)
    assert {color for _, color in TRAIN_PAIRS} == set(COLORS)
    assert 40 <= sum(is_heldout("word", word) for word in WORDS) <= 100


def test_what_is_drawn_stays_inside_the_picture() -> None:
    for scene in scenes("train"):
        assert draw(scene).size == (SIDE, SIDE)
        for writing in scene.writings:
            half = advance(writing.style, writing.height, writing.text[-1]) / 2
            assert writing.pitch[0] > 0
            assert writing.pitch[-1] + half <= SIDE + 1
            assert writing.height <= writing.baseline <= SIDE
        for bar in scene.bars:
            assert 0 <= bar.left < bar.right <= SIDE
            assert scene.baseline - bar.value * BAR_STEP >= 0


@pytest.mark.parametrize("style", INK_STYLES)
def test_every_character_of_a_style_has_its_own_mask(style: str) -> None:
    characters = "0123456789" if style == "segments" else "0123456789" + LETTERS
    for height in heights(style):
        masks = {char: glyph(style, height, char) for char in characters}
        assert all(mask.shape[0] == mask_height(height) and mask.max() > 200 for mask in masks.values())
        assert len({(mask.shape, mask.tobytes()) for mask in masks.values()}) == len(characters)


def test_every_shape_has_its_own_mask() -> None:
    masks = {shape: shape_mask(shape, 30, 0) for shape in SHAPES}
    assert len({mask.tobytes() for mask in masks.values()}) == len(SHAPES)
    assert all(mask.shape == (30, 30) for mask in masks.values())


def test_labels_name_each_thing_letter_and_bar_exactly_once() -> None:
    for scene in scenes("train"):
        labels = patch_labels(scene)
        expected = [thing.shape for thing in scene.things]
        expected += [char for writing in scene.writings for char in writing.text]
        expected += [name for bar in scene.bars for name in (f"value {bar.value}", "bar")]
        found = [ANCHORS[index] for index in labels.anchor.flatten() if index]
        assert sorted(found) == sorted(expected)


def test_labels_give_the_colour_where_a_thing_is_centred() -> None:
    for scene in scenes("train"):
        labels = patch_labels(scene)
        for thing in scene.things:
            row, column = int(thing.y // (SIDE / GRID)), int(thing.x // (SIDE / GRID))
            assert INKS[labels.ink[row, column]] == thing.color
            assert COVERS[labels.cover[row, column]] == thing.shape


def test_a_typed_picture_tells_places_colours_and_what_is_centred() -> None:
    scene = next(scene for scene in scenes("train") if scene.things)
    labels = patch_labels(scene)
    typed = typed_picture(labels, random.Random(0))
    assert len(typed) == GRID**2
    assert typed[0][:2] == (" top", " left")
    thing = scene.things[0]
    place = int(np.flatnonzero(labels.anchor.flatten() == ANCHORS.index(thing.shape))[0])
    assert typed[place][2:] == (f" {thing.color}", f" {thing.shape}")
