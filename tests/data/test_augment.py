"""Random crops, flips and turns of pictures (BLIP-2's training)."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from opsin.data.augment import RATIOS, AugmentedPictures, augmented, picture_name, random_part
from opsin.encode import Encoded
from opsin.errors import ConfigError, DataError
from opsin.spec.recipe import Augment
from opsin.text.grounding import Box
from opsin.text.messages import BoxPart, Conversation, Message, assistant, user

WHOLE = Augment(crop=None, flip=0.0)


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Every pixel differs."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


class Pictures:
    """Twenty samples of one file."""

    fingerprint = "pictures"

    def __init__(self, path) -> None:
        self.path = path
        picture().save(path)

    def __len__(self) -> int:
        return 20

    def sample(self, index: int, epoch: int) -> Conversation | Encoded:
        return Conversation((user("", images=[0]), assistant(f"caption {index}")), (self.path,), id=f"record {index}")


def test_parts_have_the_shares_and_proportions_that_are_asked_for():
    drawn = random.Random(0)
    parts = [random_part((200, 160), (0.5, 1.0), drawn) for _ in range(300)]
    for left, top, width, height in parts:
        assert left >= 0
        assert top >= 0
        assert left + width <= 200
        assert top + height <= 160
        assert 0.49 < width * height / (200 * 160) <= 1
        assert RATIOS[0] - 0.02 < width / height < RATIOS[1] + 0.02
    shares = [width * height / (200 * 160) for _, _, width, height in parts]
    assert min(shares) < 0.55
    assert max(shares) > 0.9
    assert len({(left, top) for left, top, _, _ in parts}) > 200


def test_of_an_elongated_picture_the_middle_is_shown():
    """As torchvision: no part of 3:4 to 4:3 holds half of it, so the widest that fits is cut from the middle."""
    assert random_part((1000, 30), (0.5, 1.0), random.Random(0)) == (480, 0, 40, 30)
    assert random_part((30, 1000), (0.5, 1.0), random.Random(0)) == (0, 480, 30, 40)


def test_pixels_are_moved_and_never_changed():
    whole = picture()
    assert np.array_equal(augmented(whole, WHOLE, random.Random(1)), whole)
    assert np.array_equal(augmented(whole, Augment(crop=None, flip=1.0), random.Random(1)), np.asarray(whole)[:, ::-1])
    pixels = {tuple(pixel) for pixel in np.asarray(whole).reshape(-1, 3)}
    for seed in range(20):
        shown = np.asarray(augmented(whole, Augment(turns=True), random.Random(seed)))
        assert {tuple(pixel) for pixel in shown.reshape(-1, 3)} <= pixels
        assert len({tuple(pixel) for pixel in shown.reshape(-1, 3)}) == shown.shape[0] * shown.shape[1]


def test_each_turn_and_each_side_comes_about_equally_often():
    turned = Counter(
        augmented(picture(), Augment(crop=None, turns=True), random.Random(seed)).tobytes() for seed in range(800)
    )
    assert len(turned) == 8
    assert max(turned.values()) < 2 * min(turned.values())


def test_what_is_shown_follows_from_seed_epoch_and_sample(tmp_path):
    source = Pictures(tmp_path / "a.png")

    def shown(seed: int, epoch: int) -> list[bytes]:
        made = AugmentedPictures(source, Augment(), seed=seed)
        return [made.sample(index, epoch).images[0].tobytes() for index in range(20)]

    assert shown(1, 0) == shown(1, 0)
    assert shown(1, 0) != shown(1, 1)
    assert shown(1, 0) != shown(2, 0)
    assert len(set(shown(1, 0))) > 15
    assert AugmentedPictures(source, Augment(), seed=1).fingerprint == "pictures"


def test_a_picture_keeps_its_name_whatever_part_of_it_is_shown(tmp_path):
    """Stage 1 tells by it which pairs show one picture."""
    sample = AugmentedPictures(Pictures(tmp_path / "a.png"), Augment(), seed=1).sample(3, 0)
    assert picture_name(sample.images[0]) == str(tmp_path / "a.png")
    assert sample.id == "record 3"
    assert [picture_name(each) for each in (b"bytes", picture(), "b.png")] == ["", "", "b.png"]


def test_what_cannot_be_augmented_is_named(tmp_path):
    class One(Pictures):
        made: Conversation

        def sample(self, index: int, epoch: int) -> Conversation:
            return self.made

    source = One(tmp_path / "a.png")
    box = BoxPart((Box(((0, 0), (10, 10))),), 0)
    source.made = Conversation((user("", images=[0]), Message("assistant", (box,))), (source.path,), id="record 7")
    with pytest.raises(DataError, match="record 7: its boxes count from the whole picture"):
        AugmentedPictures(source, Augment(), seed=0).sample(0, 0)
    source.made = Conversation((user("", videos=[0]), assistant("a")), videos=("v.mp4",), id="record 8")
    with pytest.raises(DataError, match="record 8: augment is for pictures"):
        AugmentedPictures(source, Augment(), seed=0).sample(0, 0)


@pytest.mark.parametrize("crop", [(0, 1), (0.6, 0.5), (0.5, 1.5)])
def test_shares_of_an_area_are_checked(crop):
    with pytest.raises(ConfigError, match="least and the most share"):
        Augment.parse({"crop": crop}, where="test")


def test_a_share_is_uniform_in_area_and_proportions_in_their_logarithm():
    drawn = random.Random(5)
    parts = [random_part((1000, 1000), (0.2, 0.6), drawn) for _ in range(2000)]
    assert np.mean([width * height for _, _, width, height in parts]) == pytest.approx(400_000, rel=0.02)
    assert np.mean([math.log(width / height) for _, _, width, height in parts]) == pytest.approx(0, abs=0.02)
