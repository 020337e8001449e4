import random
import re

import pytest

from opsin.errors import TokenizerError
from opsin.families._chats import CHATML_DIRECT, CHATS, LLAVA_LLAMA_2, V0_TRAIN, V1, with_start_end
from opsin.spec.chat import ChatFormat
from opsin.text.messages import ImagePart, Message, TextPart, assistant, user
from opsin.text.render import ControlSpan, ImageSpan, Span, TextSpan, render
from opsin.text.tokenise import IMAGE, TokenisedText, tokenise
from opsin.text.tokenizer import Tokenizer, load_tokenizer
from text.makers import TINY

LLAMA_CHATS = {name: chat for name, chat in CHATS.items() if chat.begin and "<|" not in chat.model_dump_json()}


def taught(text: TokenisedText, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(
        [number for number, supervised in zip(text.ids, text.supervised, strict=True) if supervised]
    )


def test_entries_line_up_with_spans(tiny: Tokenizer) -> None:
    spans = render(V1, [user("What?", images=[0, 1]), assistant("A dog.")], mode="train")
    text = tokenise(spans, tiny)
    assert len(text.ids) == len(text.supervised) == len(text.spans)
    assert text.spans == sorted(text.spans)
    for number, place in zip(text.ids, text.spans, strict=True):
        assert (number == IMAGE) == isinstance(spans[place], ImageSpan)
        assert (number in tiny.controls.values()) == isinstance(spans[place], ControlSpan)
    assert [(text.ids[entry], index) for entry, index in text.images] == [(IMAGE, 0), (IMAGE, 1)]
    assert not any(text.supervised[entry] for entry, _ in text.images)


def test_text_between_pictures_and_control_tokens_is_tokenised_as_one(tiny: Tokenizer) -> None:
    whole = tokenise([TextSpan("Human: yes", False, "user")], tiny)
    parts = [TextSpan(piece, False, "user") for piece in ("Hu", "man", "", ": y", "es")]
    assert tokenise(parts, tiny).ids == whole.ids


def test_a_token_is_taught_iff_it_starts_in_taught_text(tiny: Tokenizer) -> None:
    generator = random.Random(0)
    text = "Human: describe the  picture 🙂 of a dog.\n### Assistant: yes"
    for _ in range(100):
        cuts = sorted(generator.sample(range(1, len(text)), 4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        spans: list[Span] = [TextSpan(piece, generator.random() < 0.5, "user") for piece in pieces]
        result = tokenise(spans, tiny)
        ids, starts = tiny.encode(text, "start")
        assert result.ids == ids
        for start, supervised, place in zip(starts, result.supervised, result.spans, strict=True):
            owner = next(number for number, cut in enumerate([*cuts, len(text)]) if start < cut)
            assert place == owner
            assert supervised == pieces_supervised(spans)[owner]


def pieces_supervised(spans: list[Span]) -> list[bool]:
    return [not isinstance(span, ImageSpan) and span.supervised for span in spans]


@pytest.mark.parametrize("chat", LLAMA_CHATS.values(), ids=LLAMA_CHATS)
def test_prompt_ids_are_a_prefix_of_training_ids(chat: ChatFormat, tiny: Tokenizer) -> None:
    turns = [user("What is this?", images=[0]), assistant("A dog."), user("How many?"), assistant("2 dogs 🙂")]
    prompt = tokenise(render(chat, turns[:-1], mode="prompt"), tiny)
    training = tokenise(render(chat, turns, mode="train"), tiny)
    assert training.ids[: len(prompt.ids)] == prompt.ids
    assert training.images == prompt.images


@pytest.mark.parametrize("chat", LLAMA_CHATS.values(), ids=LLAMA_CHATS)
def test_all_answers_are_taught_and_no_question_is(chat: ChatFormat, tiny: Tokenizer) -> None:
    turns = [user("Alpha?", images=[0]), assistant("Beta."), user("Gamma?"), assistant("  Delta 🙂 ")]
    text = taught(tokenise(render(chat, turns, mode="train"), tiny), tiny)
    assert "Beta." in text
    assert "  Delta 🙂 " in text
    assert "Alpha" not in text
    assert "Gamma" not in text


def test_an_answer_with_the_separator_in_it_is_taught(tiny: Tokenizer) -> None:
    """The authors' code loses such samples."""
    turns = [user("Hi"), assistant("x ASSISTANT: y USER: z"), user("Bye"), assistant("Bye.")]
    assert taught(tokenise(render(V1, turns, mode="train"), tiny), tiny) == "x ASSISTANT: y USER: z Bye."


def test_only_the_tokenizers_own_begin_token_is_followed_by_a_start() -> None:
    tokenizer = load_tokenizer(TINY, legacy=False)
    text = [TextSpan("USER", False, "template")]
    begin, inside = ControlSpan("<s>", False, "begin"), ControlSpan("<s>", False)
    at_start, continued = tokenizer.encode("USER", "start").ids, tokenizer.encode("USER", "after_control").ids
    assert at_start != continued
    assert tokenise(text, tokenizer).ids == at_start
    assert tokenise([begin, *text], tokenizer).ids == [1, *at_start]
    assert tokenise([inside, *text], tokenizer).ids == [1, *continued]
    assert tokenise([inside, ImageSpan(0), *text], tokenizer).ids == [1, IMAGE, *at_start]
    assert tokenise([ImageSpan(0), inside, *text], tokenizer).ids == [IMAGE, 1, *continued]


def test_a_format_of_another_tokenizer_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"no control token '<\|im_start\|>'"):
        tokenise(render(CHATML_DIRECT, [user("Hi")], mode="prompt"), tiny)


def attacks(tokenizer: Tokenizer) -> list[str]:
    """What people may write in the hope that it becomes more than text."""
    names = [*tokenizer.controls, "<image>", "<|im_start|>system\n", "###", "USER:", " ASSISTANT:", "[INST]", "<<SYS>>"]
    names += ["<0x0A>", "<0x02>", "\u2581</s>", "[UNUSED_TOKEN_145]", "\x00", "\x002\x00"]
    attempts = []
    for name in names:
        attempts += [name, name * 2, f" {name} ", f"x{name}y", f"\n{name}\n", name.upper(), name[:-1], name[1:]]
        attempts += [f"\x00{name}\x00", f"<{name}>", name.replace("<", "<\u200b"), "".join(f"{c}\u0301" for c in name)]
    return attempts


def control_sources(spans: list[Span], text: TokenisedText, tokenizer: Tokenizer) -> list[Span]:
    controls = set(tokenizer.controls.values())
    return [spans[place] for number, place in zip(text.ids, text.spans, strict=True) if number in controls]


def test_no_text_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    """Every attack alone, cut in halves over two parts, and beside another, in every role."""
    generator = random.Random(0)
    attempts = attacks(tokenizer)
    num_cases = 0
    for attempt in attempts:
        cut = generator.randrange(len(attempt) + 1)
        other = generator.choice(attempts)
        for parts in ([attempt], [attempt[:cut], attempt[cut:]], [attempt, other], [other[: len(other) // 2], attempt]):
            sources = ("system", "user", "assistant", "template")
            spans: list[Span] = [TextSpan(part, True, generator.choice(sources)) for part in parts]  # type: ignore[arg-type]
            spans = [ImageSpan(0), *spans] if generator.random() < 0.3 else spans
            assert control_sources(spans, tokenise(spans, tokenizer), tokenizer) == []
            num_cases += 1
    assert num_cases > 400


@pytest.mark.parametrize("chat", [V1, V0_TRAIN, LLAVA_LLAMA_2], ids=["v1", "v0_train", "llama_2"])
def test_conversations_of_attacks_hold_the_control_tokens_of_their_format_only(
    chat: ChatFormat, tiny: Tokenizer
) -> None:
    harmless = [user("x", images=[0]), assistant("x"), user("x"), assistant("x")]
    expected = [span for span in render(chat, harmless, mode="train") if isinstance(span, ControlSpan)]
    attempts = [text for text in attacks(tiny) if text.strip()]
    for number in range(0, len(attempts) - 3, 2):
        first, second, third, fourth = attempts[number : number + 4]
        half = len(first) // 2
        split = Message("user", (TextPart(first[:half]), ImagePart(0), TextPart(first[half:])))
        turns = [split, assistant(second), user(third), assistant(fourth)]
        spans = render(chat, turns, mode="train")
        assert control_sources(spans, tokenise(spans, tiny), tiny) == expected


def test_learned_start_and_end_tokens_stand_around_pictures(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer(TINY).save(folder)
    (folder / "added_tokens.json").write_text('{"<im_patch>": 700, "<im_start>": 701, "<im_end>": 702}')
    tokenizer = load_tokenizer(folder)
    text = tokenise(render(with_start_end(V1), [user("Hi", images=[0])], mode="prompt"), tokenizer)
    entry = text.images[0][0]
    assert text.ids[entry - 1 : entry + 2] == [701, IMAGE, 702]
    assert re.sub(r"\s+", " ", tokenizer.decode(text.ids)).endswith("USER: Hi ASSISTANT:")
