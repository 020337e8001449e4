"""Boxes drawn on pictures of any size."""

import numpy as np
import pytest
from PIL import Image

from opsin.errors import MessageError
from opsin.inspect.boxes import COLORS, draw_boxes
from opsin.text.grounding import Box


@pytest.mark.parametrize("size", [(1, 1), (8, 5), (640, 480), (3000, 20), (20, 3000), (2500, 2500)])
def test_boxes_and_labels_show_on_any_picture(size):
    box = Box.of(0.1, 0.1, 0.9, 0.9, "unit", "a cat with a very long name that has to be cut somewhere")
    quad = Box(((0, 0), (1, 0), (1, 1), (0, 1)), "unit")
    drawing = draw_boxes(Image.new("RGB", size, (90, 90, 90)), [box, quad])
    pixels = np.asarray(drawing).reshape(-1, 3)
    assert max(drawing.size) >= min(320, 16 * max(size))
    assert drawing.width * size[1] == drawing.height * size[0]
    for color in COLORS[:2]:
        assert (pixels == color).all(axis=1).any()


def test_a_box_lies_where_it_says():
    drawing = np.asarray(draw_boxes(Image.new("RGB", (400, 400)), [Box.of(100, 100, 300, 200)]))
    yellow = np.argwhere((drawing == COLORS[0]).all(axis=-1))
    assert np.abs(yellow.min(axis=0) - (100, 100)).max() <= 2
    assert np.abs(yellow.max(axis=0) - (200, 300)).max() <= 2


def test_a_box_outside_the_picture_is_refused():
    with pytest.raises(MessageError, match="leaves the picture"):
        draw_boxes(Image.new("RGB", (40, 40)), [Box.of(0, 0, 41, 5)])
