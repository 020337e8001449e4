"""How a conversation is written down, as data: prefixes, suffixes, image markup, stops. `text.render` acts on it."""

from typing import Annotated, Literal

from pydantic import Field

from opsin.spec.base import Spec
from opsin.spec.grounding import Grounding


class Text(Spec):
    """Literal template text. It can never become a control token, and neither can what users write around it."""

    kind: Literal["text"] = "text"
    text: str
    supervised: bool = False
    """Whether training teaches it. A token is taught iff it starts in supervised text."""


class Control(Spec):
    """One control token, by its name in the vocabulary, such as `</s>`."""

    kind: Literal["control"] = "control"
    token: str
    supervised: bool = False


class Break(Spec):
    """Text that stands before and after it is tokenised apart (Qwen-VL hands its tokenizer a turn's name and what is
    said in it one by one)."""

    kind: Literal["break"] = "break"


Piece = Annotated[Text | Control | Break, Field(discriminator="kind")]
Pieces = tuple[Piece, ...]


class ImageMarkup(Spec):
    """What surrounds the slots of a picture or video, and where in its turn it stands."""

    label: str = ""
    """Text in front, in which {} is the picture's number in the conversation, from 1: `Picture {}: `."""
    labelled: Literal["all", "beside", "several_beside"] = "all"
    """Which pictures have a label. `beside`: those that stand beside the text of their turn; `several_beside`: only
    where there are several of these. Text that says where pictures belong names them itself (InternVL, Qwen-VL)."""
    video_label: str = ""
    """The same for videos, which are counted for themselves."""
    before: Pieces = ()
    after: Pieces = ()
    placement: Literal["front", "inline", "first"] = "front"
    """`front` moves a turn's pictures before its text, whose outer white space is cut (llava/train/train.py,
    preprocess_multimodal); `inline` leaves everything where it is; `first` is `front`, but the pictures of the first
    turn stand before everything, `begin` included (BLIP-2)."""
    separator: Pieces = ()
    """Between a picture and what follows it in its turn; nothing follows a picture without text. With `inline` only
    after pictures that stand beside the text: text that says where pictures belong has its own."""
    separated: Literal["each", "last", "always"] = "each"
    """Whether `separator` follows each picture, or only the last before a text; `always`: also where nothing follows
    the picture."""


class UserTurn(Spec):
    """`prefix` `lead` user text `suffix`."""

    prefix: Pieces = ()
    lead: Pieces = ()
    suffix: Pieces = ()
    text: Literal["keep", "discard"] = "keep"
    """`discard`: only the pictures of the turn are written (caption training)."""


class AssistantTurn(Spec):
    """`prefix` `lead` answer `suffix`. A prompt for generation ends after `prefix`; the answer is always supervised."""

    prefix: Pieces = ()
    lead: Pieces = ()
    suffix: Pieces = ()


class ChatFormat(Spec):
    """One way to write a conversation."""

    name: str
    system: str = ""
    """Default system text; an empty one is not written."""
    begin: Pieces = ()
    """Before everything: the begin-of-sequence token where the tokenizer itself adds one. Text after it is tokenised as
    the start of a text, whereas text after any other control token is tokenised as its continuation."""
    system_prefix: Pieces = ()
    system_suffix: Pieces = ()
    system_place: Literal["before", "in_first_user"] = "before"
    """Before the first turn, or inside it, after the user's `lead` (Llama-2)."""
    between: Pieces = ()
    """Before every user turn but the first, and but those of which only the prefix is written."""
    user: UserTurn
    assistant: AssistantTurn
    end: Pieces = ()
    """After the last turn; written for training only."""
    encoder_end: Pieces = ()
    """Of models with an encoder: after all that it reads, which is everything but the last answer."""
    decoder_start: str = ""
    """Of models with an encoder: the control token that the decoder starts from. The last answer follows it and ends
    with `end`; only that one is taught."""
    turns: Literal["alternate", "any"] = "alternate"
    """`alternate`: user and assistant take turns and the user begins; a greeting of the assistant's that stands before
    is left out (llava/train/train.py, preprocess_v1). `any`: turns are written as they come."""
    outer_space: Literal["keep", "cut"] = "keep"
    """White space around what people and the model say in a turn."""
    empty_turn: Literal["prefix", "whole"] = "prefix"
    """How a turn that says nothing is written: its `prefix` alone (llava/conversation.py, get_prompt), or like any
    other."""
    markup: ImageMarkup = ImageMarkup()
    tags: tuple[str, ...] = ()
    """Control tokens that are also found in what people and the model say: marks of boxes and what they refer to
    (Qwen-VL), which show nothing and end nothing."""
    example: tuple[tuple[Literal["user", "assistant"], str], ...] = ()
    """Turns that always stand before the conversation, never supervised."""
    stop_tokens: tuple[str, ...] = ()
    """Control tokens that end an answer."""
    stop_strings: tuple[str, ...] = ()
    """Text that ends an answer and is cut from it."""
    grounding: Grounding | None = None
    """How boxes on pictures are written; None: the model was not taught to."""


class Placeholder(Spec):
    """What a prompt of transformers holds where a picture belongs; its processor turns that into the slots."""

    image: str
    """Text of the token, such as `<image>`."""
    video: str = ""
    wraps: bool = False
    """Whether the processor itself writes what stands around a picture (InternVL's `<img>` and `</img>`)."""
    attributes: dict[str, str] = Field(default_factory=dict)
    """Tokens that the processor asks the tokenizer for, by the names of the tokenizer's attributes."""
