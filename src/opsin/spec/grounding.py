"""How a model writes rectangles on a picture into text, as data. `text.grounding` acts on it."""

from typing import Literal

from pydantic import PositiveInt

from opsin.spec.base import Spec

Space = Literal["pixels", "unit", "per_1000", "per_999"]
"""What coordinates count: source pixels; shares of a side from 0 to 1; from 0 to 1000; from 0 to 999."""
Marks = tuple[str, str]
"""What stands before and after."""


class Grounding(Spec):
    """One way to write boxes."""

    space: Space
    largest: PositiveInt | None = None
    """Largest coordinate that is written, where it is less than the space's own: 999 of half-open 0..1000."""
    form: Literal["points", "lists", "bare"]
    """`points`: (x1,y1),(x2,y2) between marks. `lists`: [[x1, y1, x2, y2], ...] between marks. `bare`: [x1, y1, x2, y2]
    without any, and without a name."""
    frame: Literal["picture", "square"] = "picture"
    """What the axes span: the picture, or the square that it stands in the middle of once it is padded."""
    ref: Marks = ("<ref>", "</ref>")
    """Around the name of what the boxes after it show."""
    box: Marks = ("<box>", "</box>")
    quad: Marks | None = None
    """Around four corners."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks; they may be control tokens, which the text of an answer leaves out."""
        return () if self.form == "bare" else (*self.ref, *self.box, *(self.quad or ()))
