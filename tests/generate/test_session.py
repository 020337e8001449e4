"""A conversation over several turns: what was run once is not run again, and nothing else changes."""

import pytest

from opsin.errors import GenerationError, MediaError
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.generate.session import Chat
from opsin.text.messages import Conversation, assistant, user
from toys import picture

SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture
def runs(toy, monkeypatch):
    """Tokens that each run of the decoder sees, and how often pictures are run."""
    seen = {"tokens": [], "pictures": 0}
    hidden, rows = toy.vlm.hidden, toy.vlm.rows

    def count_tokens(batch, cache=None, **options):
        seen["tokens"].append(batch.ids.shape[1])
        return hidden(batch, cache, **options)

    def count_pictures(patches, grids):
        seen["pictures"] += 1
        return rows(patches, grids)

    monkeypatch.setattr(toy.vlm, "hidden", count_tokens)
    monkeypatch.setattr(toy.vlm, "rows", count_pictures)
    return seen


def test_later_turns_run_only_what_is_new_and_answer_as_if_all_were(toy, runs):
    chat = Chat(toy, sampling=SAMPLING)
    turns = [
        ("What is it?", [picture((80, 60))]),
        ("Sure?", []),
        ("And this?", [picture((60, 90), seed=1)]),
        ("Ok", []),
    ]
    before = 0
    for number, (text, images) in enumerate(turns):
        runs["tokens"].clear()
        answer = chat.ask(text, *images)
        prefilled = runs["tokens"][0]
        assert runs["pictures"] == (1 if number < 2 else 2), "each picture goes through the tower once"
        # Of the last turn all but its last id is cached, unless its text is tokenised otherwise once it is written.
        assert prefilled <= chat.prompt.num_tokens - before
        before = chat.prompt.num_tokens
        fresh = generate(toy.vlm, [chat.prompt], toy.tokenizer, SAMPLING)[0]
        runs["pictures"] = 1 if number < 2 else 2
        assert (answer.ids, answer.text) == (fresh.ids, fresh.text)
        assert answer.usage == fresh.usage


def test_the_prompt_of_a_turn_is_that_of_the_whole_conversation(llava15):
    chat = Chat(llava15, sampling=SAMPLING)
    first = chat.ask("What is it?", picture((80, 60)))
    chat.ask("Sure?")
    whole = Conversation((user("What is it?", images=[0]), assistant(first.text), user("Sure?")), (picture((80, 60)),))
    assert chat.prompt.ids.tolist() == llava15.encoder.encode(whole).ids.tolist()


def test_a_stopped_answer_stays_as_far_as_it_came_and_the_conversation_goes_on(toy):
    chat = Chat(toy, sampling=Sampling(max_new_tokens=30))
    stream = chat.stream("What is it?", picture((80, 60)))
    said = next(stream)
    stream.close()
    assert chat.answer is None
    assert chat.messages[-1].text == said.strip()
    answer = chat.ask("Go on")
    assert answer.ids == generate(toy.vlm, [chat.prompt], toy.tokenizer, Sampling(max_new_tokens=30))[0].ids


def test_an_interruption_inside_the_model_leaves_the_cache_usable(toy, monkeypatch):
    chat = Chat(toy, sampling=Sampling(max_new_tokens=30))
    hidden, calls = toy.vlm.decoder.layers[1].forward, []

    def interrupt(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return hidden(*args, **options)

    monkeypatch.setattr(toy.vlm.decoder.layers[1], "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("What is it?", picture((80, 60)))
    answer = chat.ask("Go on")
    assert answer.ids == generate(toy.vlm, [chat.prompt], toy.tokenizer, Sampling(max_new_tokens=30))[0].ids


def test_a_turn_that_cannot_be_read_leaves_the_conversation_as_it_was(llava15):
    chat = Chat(llava15, sampling=SAMPLING)
    chat.ask("Hello")
    messages = list(chat.messages)
    with pytest.raises(MediaError):
        chat.ask("And this?", picture((40, 40)), b"no picture")
    assert (chat.messages, chat.images) == (messages, [])
    # The good picture of the failed turn must not stand in for this one.
    other = picture((90, 30), seed=4)
    answer = chat.ask("And this?", other)
    fresh = Chat(llava15, sampling=SAMPLING)
    fresh.ask("Hello")
    assert answer.ids == fresh.ask("And this?", other).ids


def test_reset_forgets_words_and_pictures(llava15):
    chat = Chat(llava15, sampling=SAMPLING)
    first = chat.ask("What is it?", picture((80, 60)))
    chat.ask("Sure?")
    chat.reset()
    assert chat.messages == []
    assert chat.ask("What is it?", picture((80, 60))).ids == first.ids
    other = chat.ask("What is it?", picture((60, 80), seed=3))
    assert other.usage.image_tokens == 2 * first.usage.image_tokens


def test_a_system_text_replaces_the_formats_own(llava15):
    chat = Chat(llava15, sampling=SAMPLING, system_text="Be brief.")
    chat.ask("Hello")
    text = llava15.tokenizer.decode(chat.prompt.ids)
    assert "Be brief." in text
    assert "curious user" not in text


def test_a_chat_gives_one_answer_a_turn(llava15):
    with pytest.raises(GenerationError, match="num_sequences is 2"):
        Chat(llava15, sampling=Sampling(temperature=1.0, num_sequences=2))
