"""Boxes with their labels, drawn on a picture.

chat.ask("Where is the cat?", "photo.jpg")
draw_boxes("photo.jpg", chat.boxes().boxes).save("boxes.png")
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from opsin.media.image import ImageMode, ImageSource, open_image
from opsin.spec.plan import Color
from opsin.text.grounding import Box

# Apart from one another also without colour vision (Okabe and Ito), and each light enough for dark letters.
COLORS: tuple[Color, ...] = ((240, 228, 66), (86, 180, 233), (230, 159, 0), (0, 190, 140), (224, 146, 190))
_DARK = (15, 17, 22)
_MIN_SIDE = 320
"""Smaller pictures are enlarged by a whole factor, so that labels can be read."""
_MAX_FACTOR = 16


def draw_boxes(picture: ImageSource, boxes: Sequence[Box], *, image_mode: ImageMode = "display") -> Image.Image:
    """The picture with its boxes; lines and letters grow with it. A small picture is enlarged first.

    boxes: in any space, of this picture. Boxes of one label share a colour. Raises MediaError, and MessageError for a
    box outside the picture.
    """
    source = open_image(picture, mode=image_mode).pixels
    placed = [box.to("unit", source.size) for box in boxes]
    factor = max(1, min(_MAX_FACTOR, -(-_MIN_SIDE // max(source.size))))
    drawing = source.resize((source.width * factor, source.height * factor), Image.Resampling.NEAREST)
    line = max(2, round(max(drawing.size) / 300))
    font = ImageFont.load_default(max(12, round(max(drawing.size) / 45)))
    pen = ImageDraw.Draw(drawing)
    names = list(dict.fromkeys(box.label or index for index, box in enumerate(boxes)))
    drawn = [(box.to("pixels", drawing.size), COLORS[names.index(box.label or i) % 5]) for i, box in enumerate(placed)]
    for box, color in drawn:
        left, top, right, bottom = box.sides
        corners = box.points if len(box.points) == 4 else ((left, top), (right, top), (right, bottom), (left, bottom))
        # The last column is one before the side; dark around light shows on any ground.
        path = [(min(x, drawing.width - 1), min(y, drawing.height - 1)) for x, y in (*corners, *corners[:2])]
        pen.line(path, fill=_DARK, width=line + max(2, line // 2 * 2), joint="curve")
        pen.line(path, fill=color, width=line, joint="curve")
    for box, color in drawn:  # above all lines
        if box.label:
            _tag(pen, drawing.size, box, color, font)
    return drawing


def _tag(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Box,
    color: Color,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """The label above its box where there is room, else inside it; moved and cut to stay on the picture."""
    text = " ".join(box.label.split())
    while len(text) > 1 and pen.textlength(text, font=font) + 6 > size[0]:
        text = text[: max(1, len(text) * 3 // 4 - 1)] + "…" if len(text) > 2 else text[:1]
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
    width, height = x1 - x0 + 6, y1 - y0 + 6
    left = max(0.0, min(box.sides[0], size[0] - width))
    top = box.sides[1] - height if box.sides[1] >= height else max(0.0, min(box.sides[1], size[1] - height))
    pen.rectangle((left, top, left + width, top + height), fill=color, outline=_DARK)
    pen.text((left + 3 - x0, top + 3 - y0), text, font=font, fill=_DARK)
