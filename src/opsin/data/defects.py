"""What can be wrong with data, each in one word: what it means, whether training stops at it, and what helps."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]
"""`error`: the loader refuses the record. `warning`: it trains, and perhaps on something that nobody meant."""


@dataclass(frozen=True)
class Defect:
    """One kind of problem."""

    severity: Severity
    title: str
    fix: str
    """What helps, where the problem itself does not say."""


def _error(title: str, fix: str) -> Defect:
    return Defect("error", title, fix)


def _warning(title: str, fix: str) -> Defect:
    return Defect("warning", title, fix)


_AGAIN = "copy or download it again"

DEFECTS: dict[str, Defect] = {
    # the file
    "file": _error("a file that cannot be read", "check the path and the file's rights"),
    "download": _error("a file that its server does not give whole", "check the address and the network"),
    "empty": _error("no record at all", "check that it is the file that was meant"),
    "changed": _error("a file that changes while it is read", "wait until it is written"),
    "package": _error("a kind of file that needs a package", "install it as the message says"),
    "answers": _error("questions without the file of their answers", "name it under `answers`"),
    "encoding": _error("not UTF-8", "save the file as UTF-8"),
    "json": _error("not JSON", "write each record with a JSON library; for JSONL one on each line"),
    "not_finite": _warning("a number that is NaN or infinite, which JSON does not know", "leave it out or correct it"),
    "duplicate_key": _warning("a key that stands twice in one object; the last one counts", "keep one of them"),
    # the record
    "shape": _error("no conversation in a known shape", "write it in one of the shapes of docs/data.md"),
    "mixed_shapes": _warning("another shape than most records of its file", "convert them to one shape"),
    "unknown_key": _warning("an unknown key that looks like a known one", "spell it as the known one"),
    "question": _error("a question that is no text", "write it as text"),
    "answer": _error("no answer that can be read", "give one, as text or as the number of a choice"),
    "choices": _error("no list of choices", "list them as texts"),
    "caption": _error("a picture without a caption", "give one, or a conversation"),
    "expression": _error("a box without words for what it shows", "give the expression as text"),
    "image_id": _error("a picture that the list of pictures lacks", "list it, or leave the record out"),
    "keys": _error("two keys for the same thing", "keep one of them"),
    "turns": _error("no list of messages, or an empty one", "give at least a question and an answer"),
    "turn": _error("a message that is no object with a speaker and a text", "give its speaker and its text"),
    "role": _error("an unknown speaker", "name it user, assistant or system"),
    "content": _error("a message that is neither text nor a list of parts", "write it as text"),
    "part": _error("a part of a message that is not understood", "give it a type: text, image or video"),
    "loss": _error("a mark for teaching that is not understood", "write true or false, at answers only"),
    "max_pixels": _error("a bound for pictures that is no number", "write a whole number above 0"),
    "text": _error("text that is not valid Unicode", "write the character itself, or both halves of its pair"),
    # pictures and videos
    "marks": _error("marks and what they stand for differ in number", "put one mark where each belongs"),
    "picture": _error("a picture that is neither path nor bytes", "give its path as text"),
    "video": _error("a video that is neither path nor frames", "give its path as text"),
    "picture_missing": _error("a file that is not there", "correct the path, or set image_root"),
    "video_missing": _error("a video that is not there", "correct the path, or set image_root"),
    "member_missing": _error("a member of a shard that its record names and that is not there", "pack the shard anew"),
    "members": _error("members of a shard that do not fit together", "pack the shard anew"),
    "address": _error("a web address", "download it and give its path: training reads files only"),
    "media_data": _error("an address that holds a picture, but not as base64", "write data:image/png;base64,..."),
    "media_empty": _error("an empty file", _AGAIN),
    "media_format": _error("a file that is no picture", "convert it to JPEG or PNG"),
    "media_damaged": _error("a damaged or cut-off file", _AGAIN),
    "media_large": _error("more pixels or bytes than are read", "shrink it"),
    "media_ratio": _error("one side far longer than the other", "cut it into pieces"),
    # the conversation
    "order": _error("speakers in an order that the chat format cannot write", "let user and assistant take turns"),
    "no_answer": _warning("a question without an answer at its end", "give the answer, or leave the question out"),
    "empty_answer": _warning("an empty answer: the model learns to say nothing", "give the answer, or leave it out"),
    "empty_question": _warning("an empty question", "write the question, or show a picture in its place"),
    "control_text": _warning("text that spells a control token; it is read as text", "take it out, or write roles"),
    "mark_text": _warning("a mark that shows nothing: it is read as text", "list the picture, or take the mark out"),
    "damaged_text": _warning("characters that only damaged text has", "read the source in its own encoding"),
    # boxes
    "objects": _error("names or boxes that are not understood", "see the neutral form in docs/data.md"),
    "box": _error("a box that is no box on its picture", "give left, top, right, bottom inside it"),
    "box_text": _warning("a box in the text that is no box", "give left, top, right, bottom"),
    "grounding": _error("boxes for a model that has none", "leave them out, or write them as text"),
    # the model
    "too_long": _error("more tokens than the stage allows", "raise max_tokens, shorten it, or set overlong"),
    "nothing_taught": _error("no token to learn", "give it an answer, or leave it out"),
    # records together
    "duplicate_id": _warning("an id that another record has", "number the records anew"),
    "duplicate_record": _warning("the same as another record", "keep one of them"),
    "held_out": _warning("also among the held-out data", "take it out of one of the two"),
    "record": _error("something else", "see the message"),
}
"""By kind. Every problem that the loader or the check names has one of them."""


def defect(kind: str) -> Defect:
    """The kind of a problem."""
    return DEFECTS.get(kind, DEFECTS["record"])
