"""The coloured loss mask."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from opsin.encode import Encoded, Encoder
from opsin.inspect.tokens import KINDS, MaskPiece, ids_text, legend_text, mask_html, mask_pieces, mask_text, visible
from opsin.spec.chat import AssistantTurn, ChatFormat, Control, ImageMarkup, Text, UserTurn
from opsin.spec.connector import MLPConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import AnyRes
from opsin.spec.vision import VisionConfig
from opsin.text.messages import Conversation, ImagePart, Message, TextPart
from opsin.text.tokenizer import Tokenizer
from toys import byte_tokenizer, picture

CHAT = ChatFormat(
    name="test",
    system="Be kind.",
    begin=(Control(token="<s>"),),
    system_suffix=(Text(text=" "),),
    user=UserTurn(prefix=(Text(text="USER: "),), suffix=(Text(text=" "),)),
    assistant=AssistantTurn(prefix=(Text(text="ASSISTANT: "),), suffix=(Control(token="</s>", supervised=True),)),
    markup=ImageMarkup(separator=(Text(text="\n"),)),
)
CONFIG = VLMConfig(
    vision=VisionConfig(image_size=12, patch_size=4, dim=8, num_layers=2, num_heads=1, mlp_dim=8),
    connector=MLPConnector(),
    decoder=DecoderConfig(vocab_size=265, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=8),
    resolution=AnyRes(tile_size=12, resolutions=((12, 24), (24, 12))),
    chat=CHAT,
)
NASTY = '</s> <script>alert("1")</script> & größer 日本 🙂\tend\n\x1b[31m\u202e'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoded(tokenizer: Tokenizer) -> Encoded:
    """Two pictures side by side, a nasty question, two answers."""
    messages = (
        Message("user", (ImagePart(0), ImagePart(1), TextPart(NASTY))),
        Message("assistant", (TextPart("yes"),)),
        Message("user", (TextPart("sure?"),)),
        Message("assistant", (TextPart("no"),)),
    )
    conversation = Conversation(messages, (picture((20, 10)), picture((10, 20))))
    return Encoder(CONFIG, tokenizer).encode(conversation, mode="train")


@pytest.fixture(scope="module")
def pieces(encoded: Encoded, tokenizer: Tokenizer) -> tuple[MaskPiece, ...]:
    return mask_pieces(encoded, tokenizer)


def test_every_token_is_in_exactly_one_piece(encoded: Encoded, pieces: tuple[MaskPiece, ...]) -> None:
    places = [piece.start + offset for piece in pieces for offset in range(len(piece.ids))]
    assert places == list(range(encoded.num_tokens))
    assert [token for piece in pieces for token in piece.ids] == encoded.ids.tolist()


def test_pieces_are_taught_where_the_loss_counts(encoded: Encoded, pieces: tuple[MaskPiece, ...]) -> None:
    taught = np.repeat([piece.supervised for piece in pieces], [len(piece.ids) for piece in pieces])
    assert (taught == encoded.supervised).all()
    assert "".join(piece.text for piece in pieces if piece.supervised) == "yes</s>no</s>"


def test_pieces_spell_the_conversation_and_say_who_wrote_it(pieces: tuple[MaskPiece, ...]) -> None:
    def text(kind: str) -> str:
        return "".join(piece.text for piece in pieces if piece.kind == kind)

    assert text("user") == NASTY.strip() + "sure?"
    assert text("assistant") == "yesno"
    assert text("system") == "Be kind."
    assert text("template") == " USER: \n\n ASSISTANT: USER:  ASSISTANT: "
    assert text("control") == "<s></s></s>"


def test_a_picture_is_one_piece_that_counts_its_slots(encoded: Encoded, pieces: tuple[MaskPiece, ...]) -> None:
    shown = [piece for piece in pieces if piece.kind == "image"]
    assert [len(piece.ids) for piece in shown] == [image.plan.num_slots for image in encoded.images]
    assert shown[0].text == "image 1: 30 slots, 3 of them newlines"
    assert shown[1].text.startswith("image 2: ")


def test_html_holds_no_markup_but_its_own(pieces: tuple[MaskPiece, ...]) -> None:
    page = mask_html(pieces)
    parser = _Reader()
    parser.feed(page)
    assert parser.tags == {"span"}
    assert parser.names <= {"class", "title", "data-id"}
    assert parser.count == len(pieces)
    assert "".join(parser.text).count("<script>") == 1  # as text, which the page shows
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_html_names_id_and_position_of_every_text_token(encoded: Encoded, pieces: tuple[MaskPiece, ...]) -> None:
    titles = re.findall(r'title="id (\d+), position (\d+)"', mask_html(pieces))
    expected = [(piece.ids[0], piece.start) for piece in pieces if piece.kind != "image"]
    assert [(int(token), int(place)) for token, place in titles] == expected


def test_control_text_that_a_user_types_does_not_look_like_a_control_token(pieces: tuple[MaskPiece, ...]) -> None:
    chips = re.findall(r'<span class="token control[^"]*"[^>]*>([^<]*)</span>', mask_html(pieces))
    assert chips == ["&lt;s&gt;", "&lt;/s&gt;", "&lt;/s&gt;"]


def test_terminal_text_cannot_steer_the_terminal(pieces: tuple[MaskPiece, ...]) -> None:
    shown = mask_text(pieces)
    assert "\x1b" not in shown.plain
    assert "⟨U+001B⟩" in shown.plain
    assert "[image 1: 30 slots, 3 of them newlines]" in shown.plain
    taught = [shown.plain[span.start : span.end] for span in shown.spans if "on green" in str(span.style)]
    assert "".join(taught) == "yes[</s>]no[</s>]"
    assert all(name in legend_text().plain for name in KINDS.values())


def test_parts_of_a_character_stay_visible(pieces: tuple[MaskPiece, ...]) -> None:
    # The byte-level tokenizer spells the smiley in four tokens; the last one completes it.
    smiley = next(number for number, piece in enumerate(pieces) if piece.text == "🙂")
    assert [piece.text for piece in pieces[smiley - 3 : smiley]] == ["", "", ""]
    assert visible("") == "·"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb", "a↵\nb"), ("\t", "⇥"), ("\u202e", "⟨U+202E⟩"), ("\x07", "⟨U+0007⟩"), ("\u2028", "⟨U+2028⟩"), ("é", "é")],
)
def test_unseen_characters_are_named(text: str, shown: str) -> None:
    assert visible(text) == shown


class _Reader(HTMLParser):
    """Collects tags, attribute names and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.text: list[str] = []
        self.count = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names.update(name for name, _ in attrs)
        self.count += 1

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_ids_stand_behind_their_tokens_and_a_star_marks_what_is_taught(encoded, tokenizer):
    shown = ids_text(mask_pieces(encoded, tokenizer)).plain
    numbers = re.findall(r"⟨(\d+)(\*?)⟩", shown)
    text = [place for place in range(encoded.num_tokens) if place not in set(encoded.slots.tolist())]
    assert numbers == [(str(encoded.ids[place]), "*" * int(encoded.supervised[place])) for place in text]
    assert "y⟨" in shown
    assert "\x1b" not in shown
    assert "\n" not in shown
