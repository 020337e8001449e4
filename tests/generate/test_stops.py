"""Stop strings, characters of several tokens, and white space, while an answer is streamed."""

import random
import time

import pytest

from opsin.errors import GenerationError
from opsin.families import chat
from opsin.generate.stops import AnswerText, Stops
from toys import byte_tokenizer


class Pieces:
    """A tokenizer whose ids are positions in a list of texts."""

    strips_first_space = False

    def __init__(self, pieces):
        self.pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]

    def token_bytes(self, token_id):
        return self.pieces[token_id]


def stream(pieces, stops):
    """(every portion that was handed out, whether a stop ended it)."""
    text = AnswerText(Pieces(pieces), stops)
    portions = []
    for token_id in range(len(pieces)):
        portion, stopped = text.push(token_id)
        portions.append(portion)
        if stopped:
            return portions, True
    return [*portions, text.finish()], False


def cut(text, stop):
    """`text` in every way cut into two or three pieces."""
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            yield [text[:first], text[first:second], text[second:]]


def test_nothing_of_a_stop_string_comes_out_however_tokens_cut_it():
    for pieces in cut("red ###Human", "###"):
        portions, stopped = stream(pieces, ("###",))
        assert stopped
        assert "".join(portions) == "red"


def test_what_only_looks_like_a_stop_string_comes_out():
    for pieces in cut("a ## b #", "###"):
        portions, stopped = stream(pieces, ("###",))
        assert not stopped
        assert "".join(portions) == "a ## b #"


def test_the_stop_that_is_complete_first_counts_however_the_text_comes():
    for pieces in cut("xabcy", ""):
        assert "".join(stream(pieces, ("abc", "b"))[0]) == "xa"
        assert "".join(stream(pieces, ("abcy", "bc"))[0]) == "xa"
        assert "".join(stream(pieces, ("abc", "bc"))[0]) == "x"


def test_random_texts_give_the_same_answer_in_portions_as_whole():
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices("ab \n", k=30))
        stops = tuple("".join(generator.choices("ab ", k=generator.randint(1, 4))) for _ in range(3))
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = (text[: min(ends)[1]] if ends else text).strip()
        cuts = sorted(generator.sample(range(31), 5))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 30], strict=True)]
        portions, stopped = stream(pieces, stops)
        assert "".join(portions) == expected, (text, stops, pieces)
        assert stopped == bool(ends)


def test_characters_come_out_whole():
    portions, _ = stream(["é".encode()[:1], "é".encode()[1:], "🙂".encode()[:3], "🙂".encode()[3:]], ())
    assert portions == ["", "é", "", "🙂", ""]
    assert "".join(stream(["a", "é".encode()[:1]], ())[0]) == "a\N{REPLACEMENT CHARACTER}"


def test_white_space_around_the_answer_is_cut_and_inside_it_kept():
    assert stream([" ", "\n a", " ", " \n", "b", "  ", "\n"], ())[0] == ["", "a", "", "", "  \nb", "", "", ""]


def test_many_long_stop_strings_cost_little():
    stops = tuple("a" * 200 + letter for letter in "bcdefghijklmnopq")
    start = time.perf_counter()
    stream(["a"] * 600, stops)
    # About 0.3 s here; a search that grows with the text would take minutes.
    assert time.perf_counter() - start < 5


def test_stops_come_from_the_chat_format_and_the_request(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    stops = Stops.of(chat("llava_v0"), tokenizer, ids=(7,), strings=("END",))
    assert stops == Stops(frozenset({tokenizer.control_id("</s>"), 7}), ("###", "END"))
    assert Stops.of(chat("llava_v0"), None, ids=(7,)) == Stops(frozenset({7}), ())
    with pytest.raises(GenerationError, match="need a tokenizer"):
        Stops.of(chat("llava_v0"), None, strings=("END",))
