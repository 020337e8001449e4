"""From a sample to a conversation, with painted pictures or with blank ones of the same sizes."""

from PIL import Image

from opsin.demo.drawn import draw
from opsin.demo.scene import Scene
from opsin.mini.tasks import Question, Sample
from opsin.text.messages import (
    BoxPart,
    Conversation,
    ImagePart,
    Message,
    NamePart,
    Part,
    TextPart,
    VideoPart,
)


def conversation(sample: Sample, *, id: str = "", painted: bool = True) -> Conversation:
    """All questions of a sample, one after the other; the first one comes with what is shown."""
    messages: list[Message] = []
    for question in sample.questions:
        messages += [asked(sample, question.text, shows=not messages), answered(question)]
    return shown(sample, messages, id=id, painted=painted)


def asked(sample: Sample, text: str, *, shows: bool) -> Message:
    """A question, behind what is shown."""
    parts: list[Part] = []
    if shows:
        parts += [ImagePart(number) for number in range(len(sample.pictures))]
        parts += [VideoPart(0)] if sample.clip else []
    return Message("user", (*parts, TextPart(text)))


def answered(question: Question) -> Message:
    """An answer; of names with their boxes, where it has some."""
    if not question.boxes:
        return Message("assistant", (TextPart(question.answer),))
    named = [part for name, box in question.boxes for part in (NamePart(name), BoxPart((box,), 0))]
    return Message("assistant", tuple(named))


def shown(sample: Sample, messages: list[Message], *, id: str = "", painted: bool = True) -> Conversation:
    """Messages about a sample."""

    def picture(scene: Scene) -> Image.Image:
        return draw(scene) if painted else Image.new("RGB", scene.size)

    videos = (tuple(picture(frame) for frame in sample.clip.frames),) if sample.clip else ()
    return Conversation(tuple(messages), tuple(picture(scene) for scene in sample.pictures), id=id, videos=videos)
