"""`opsin chat --draw`."""

import pytest
import torch
from PIL import Image

from opsin import families, weights
from opsin.generate import Chat
from toys import byte_tokenizer


@pytest.fixture(scope="module")
def grounded(tmp_path_factory):
    """A tiny model whose format has boxes."""
    folder = tmp_path_factory.mktemp("grounded")
    config = families.preset("llava-1.5-tiny").config
    torch.manual_seed(0)
    weights.save_native(folder / "m", weights.build(config), config, byte_tokenizer(folder / "tokenizer"))
    return folder / "m"


@pytest.fixture
def says(monkeypatch):
    """Put words into the mouth of the model."""

    def put(text):
        spelt = "opsin.generate.session.spell"
        monkeypatch.setattr(spelt, lambda ids, tokenizer, grounding: text)

    return put


def test_boxes_of_an_answer_are_drawn(opsin, grounded, pictures, tmp_path, says):
    says("[0.25, 0.25, 0.75, 0.75] and [0.1, 0.2]")
    out = tmp_path / "out.png"
    done = opsin("chat", grounded, "Where?", "-i", pictures / "good.png", "--max-new-tokens", 2, "--draw", out)
    assert done.code == 0
    assert "1 box(es) drawn" in done.err
    assert "not read as a box: [0.1, 0.2]" in done.err
    assert Image.open(out).size == (320, 240)


def test_an_answer_without_a_box_says_so(opsin, grounded, pictures, tmp_path, says):
    says("a cat")
    out = tmp_path / "out.png"
    done = opsin("chat", grounded, "What?", "-i", pictures / "good.png", "--max-new-tokens", 2, "--draw", out)
    assert done.code == 0
    assert "holds no box" in done.err
    assert not out.exists()


def test_boxes_out_of_range_are_not_drawn(opsin, grounded, pictures, tmp_path, says):
    says("[0.25, 0.25, 0.75, 7.5]")
    out = tmp_path / "out.png"
    done = opsin("chat", grounded, "What?", "-i", pictures / "good.png", "--max-new-tokens", 2, "--draw", out)
    assert done.code == 0
    assert "7.5 lies outside 0 to 1" in done.err
    assert "Traceback" not in done.err
    assert not out.exists()


def test_what_cannot_be_drawn_is_one_clear_error(opsin, model, grounded, pictures, tmp_path):
    good, out = pictures / "good.png", tmp_path / "out.png"
    (tmp_path / "there.png").write_bytes(b"x")
    one = ("chat", grounded, "Where?", "-i", good)
    assert "exists already" in opsin(*one, "--draw", tmp_path / "there.png").refused()
    assert "no folder" in opsin(*one, "--draw", tmp_path / "no" / "a.png").refused()
    assert "must end in" in opsin(*one, "--draw", tmp_path / "a.txt").refused()
    assert "exactly one picture, not 2" in opsin(*one, "-i", good, "--draw", out).refused()
    assert "exactly one" in opsin("chat", grounded, "--draw", out).refused()
    assert "not taught" in opsin("chat", model, "Where?", "-i", good, "--draw", out).refused()


def test_from_python_it_is_two_lines(grounded, pictures, says):
    from opsin.inspect.boxes import draw_boxes

    chat = Chat(weights.load(str(grounded)))
    with pytest.raises(ValueError, match="about a picture"):
        chat.boxes()
    says("[0.25, 0.25, 0.75, 0.75]")
    chat.ask("Where?", str(pictures / "good.png"))
    assert draw_boxes(pictures / "good.png", chat.boxes().boxes).size == (320, 240)
    # The middle half of the square is 40x40 px of the 80x60 picture, 10 px of padding above it.
    assert chat.boxes().boxes[0].sides == pytest.approx((20, 10, 60, 50))
