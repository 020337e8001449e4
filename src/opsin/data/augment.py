"""Pictures shown differently in every epoch: a random part of them, mirrored, turned.

    whole picture --crop--> part --flip--> mirrored or not --turns--> by 0, 90, 180 or 270 degrees

The part is drawn as torchvision's RandomResizedCrop draws it, which the authors of BLIP-2 use: area and proportions at
random, ten tries to find one that fits, then the middle. Resizing is left to the model's own resolution.
"""

import math
import random
from dataclasses import replace

from PIL import Image

from opsin.data.order import derive_seed
from opsin.data.source import Fingerprinted, Source
from opsin.encode import Encoded
from opsin.errors import DataError
from opsin.media.image import open_image
from opsin.spec.plan import Size
from opsin.spec.recipe import Augment
from opsin.text.messages import BoxPart, Conversation, ImageSource

RATIOS = (3 / 4, 4 / 3)
"""Narrowest and widest part, width by height (torchvision's default)."""
TRIES = 10
_QUARTERS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


class AugmentedPictures:
    """Another source's conversations with their pictures augmented."""

    def __init__(self, source: Source, augment: Augment, *, seed: int) -> None:
        self.source, self.augment, self.seed = source, augment, seed

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, epoch: int) -> Conversation | Encoded:
        """One conversation. Raises DataError where it has boxes or videos, and MediaError for a bad picture."""
        conversation = self.source.sample(index, epoch)
        if not isinstance(conversation, Conversation):
            raise DataError("pictures are augmented in conversations; this source encodes for itself")
        where = conversation.id or f"sample {index}"
        if conversation.videos:
            raise DataError(f"{where}: augment is for pictures, and this sample shows a video; leave augment out")
        if any(isinstance(part, BoxPart) for message in conversation.messages for part in message.parts):
            raise DataError(f"{where}: its boxes count from the whole picture, and augment shows a part; leave it out")
        pictures = tuple(
            self._shown(picture, random.Random(derive_seed(self.seed, "augment", epoch, index, number)), number, where)
            for number, picture in enumerate(conversation.images)
        )
        return replace(conversation, images=pictures)

    @property
    def fingerprint(self) -> str:
        """That of the source."""
        return self.source.fingerprint if isinstance(self.source, Fingerprinted) else ""

    def _shown(self, source: ImageSource, drawn: random.Random, number: int, where: str) -> Image.Image:
        opened = open_image(source, mode="display", name=f"{where}: image {number + 1}")
        picture = augmented(opened.pixels, self.augment, drawn)
        if not isinstance(source, bytes):
            picture.filename = picture_name(source)  # type: ignore[attr-defined] # where Pillow keeps it, too
        return picture


def picture_name(source: ImageSource) -> str:
    """What tells a picture from others, whatever part of it is shown: its path or address. Empty where it has none."""
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", ""))
    return "" if isinstance(source, bytes) else str(source)


def augmented(picture: Image.Image, augment: Augment, drawn: random.Random) -> Image.Image:
    """A copy of a picture as it is shown once."""
    left, top, width, height = (0, 0, *picture.size)
    if augment.crop is not None:
        left, top, width, height = random_part(picture.size, augment.crop, drawn)
    picture = picture.crop((left, top, left + width, top + height))
    if drawn.random() < augment.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    quarter = drawn.choice(_QUARTERS) if augment.turns else None
    return picture if quarter is None else picture.transpose(quarter)


def random_part(size: Size, shares: tuple[float, float], drawn: random.Random) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random part of a picture, in pixels. shares: of its area, least and most."""
    width, height = size
    for _ in range(TRIES):
        area = width * height * drawn.uniform(*shares)
        ratio = math.exp(drawn.uniform(*map(math.log, RATIOS)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return drawn.randint(0, width - across), drawn.randint(0, height - down), across, down
    # The widest of the allowed proportions, in the middle: a picture that is more elongated than any of them.
    narrowest, widest = RATIOS
    across, down = min(width, round(height * widest)), min(height, round(width / narrowest))
    return (width - across) // 2, (height - down) // 2, across, down
