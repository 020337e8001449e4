"""Continuous batching: whoever comes and goes beside a prompt, its answers are those that it gets alone."""

import itertools
from dataclasses import replace

import pytest
import torch

from generate.conftest import Toy, sharpen
from opsin import families, weights
from opsin.errors import GenerationError
from opsin.families.blip2 import TINY_T5
from opsin.generate.decode import generate
from opsin.generate.engine import Engine, Failure
from opsin.generate.sampling import Sampling
from opsin.text.messages import ask
from toys import picture

GREEDY = Sampling(max_new_tokens=14)
DRAWN = Sampling(max_new_tokens=9, temperature=1.0, top_p=0.9, seed=3, repetition_penalty=1.2)
THREE = Sampling(max_new_tokens=7, temperature=0.7, top_k=20, seed=8, num_sequences=3)


@pytest.fixture(scope="module", params=["llava-1.5-tiny", "qwen2-vl-tiny", "qwen-vl-tiny", "blip2-tiny", "t5"])
def kind(request, tokenizer) -> Toy:
    """One position axis and three, positions that depend on the length, learned ones, an encoder with a decoder."""
    config = TINY_T5 if request.param == "t5" else families.preset(request.param).config
    return Toy(sharpen(weights.build(config, seed=1)), config, tokenizer)


def work(toy):
    """Prompts of several lengths with the settings of their answers."""
    encode = toy.encoder.encode
    return [
        (encode(ask("Which of them is it?", picture((80, 60)))), GREEDY),
        (encode(ask("Name all that you see here, one after the other.", picture((30, 90), 1))), DRAWN),
        (encode(ask("Hm?", picture((50, 50), 2))), THREE),
        (encode(ask("And now?", picture((90, 30), 3))), replace(GREEDY, max_new_tokens=3)),
        (encode(ask("The last one", picture((44, 70), 4))), DRAWN),
    ]


def run(engine, *, until=None):
    """All events of the engine, step by step."""
    for number in itertools.count():
        if engine.is_idle or number == until:
            return
        yield from engine.step()


def collect(events, into):
    for event in events:
        assert not isinstance(event, Failure), event
        key = event.ticket, event.sequence
        into.setdefault(key, ["", None])
        assert into[key][1] is None, "nothing comes after the end of an answer"
        into[key][0] += event.text
        into[key][1] = event.answer


def test_prompts_that_join_late_and_leave_early_are_answered_as_if_alone(kind):
    prompts = work(kind)
    engine, found = Engine(kind.vlm, kind.tokenizer, max_rows=6), {}
    tickets = []
    for prompt, sampling in prompts:  # each joins while the ones before it are two tokens further
        tickets.append(engine.submit(prompt, sampling))
        collect(run(engine, until=2), found)
    collect(run(engine), found)
    for ticket, (prompt, sampling) in zip(tickets, prompts, strict=True):
        alone = generate(kind.vlm, [prompt], kind.tokenizer, sampling)
        for answer in alone:
            text, together = found[ticket, answer.sequence]
            assert (together.ids, together.finish) == (answer.ids, answer.finish)
            assert text == together.text == answer.text
            assert together.usage == answer.usage
    assert engine.num_rows == 0


def test_no_more_rows_run_than_fit_and_prompts_keep_their_order(llava15):
    prompts = work(llava15)
    engine, found = Engine(llava15.vlm, llava15.tokenizer, max_rows=3), {}
    tickets = [engine.submit(prompt, sampling) for prompt, sampling in prompts]
    begun: dict[int, None] = {}
    while not engine.is_idle:
        events = engine.step()
        assert engine.num_rows <= 3
        begun.update(dict.fromkeys(event.ticket for event in events))
        collect(events, found)
    assert list(begun) == tickets, "a prompt that needs three rows is not overtaken by one that needs one"
    assert len(found) == 7
    with pytest.raises(GenerationError, match="4 answers to one prompt are asked for; at most 3"):
        engine.submit(prompts[0][0], replace(THREE, num_sequences=4))


def test_a_cancelled_prompt_leaves_at_once_and_the_others_do_not_notice(llava15):
    prompts = work(llava15)
    engine, found = Engine(llava15.vlm, llava15.tokenizer, max_rows=8), {}
    tickets = [engine.submit(prompt, sampling) for prompt, sampling in prompts]
    collect(run(engine, until=4), {})
    engine = Engine(llava15.vlm, llava15.tokenizer, max_rows=5)
    tickets = [engine.submit(prompt, sampling) for prompt, sampling in prompts]
    collect(run(engine, until=3), found)
    rows = engine.num_rows
    engine.cancel(tickets[2])  # three answers in the making
    assert engine.num_rows == rows - 3
    engine.cancel(tickets[4])  # still waiting
    engine.cancel(99)
    collect(run(engine), found)
    assert (tickets[4], 0) not in found
    for number in (0, 1, 3):
        alone = generate(llava15.vlm, [prompts[number][0]], llava15.tokenizer, prompts[number][1])[0]
        assert found[tickets[number], 0][1].ids == alone.ids
    engine.cancel(tickets[0])
    assert engine.is_idle


def test_a_row_without_numbers_fails_alone(llava15):
    prompts = work(llava15)
    engine = Engine(llava15.vlm, llava15.tokenizer)
    tickets = [engine.submit(prompt, sampling) for prompt, sampling in prompts[:3]]
    before = list(run(engine, until=3))
    row = next(place for place, each in enumerate(engine._rows) if each.ticket == tickets[2])
    with torch.inference_mode():
        engine._state.logits[row] = torch.nan
    after = list(run(engine))
    failures = [event for event in after if isinstance(event, Failure)]
    assert [event.ticket for event in failures] == [tickets[2]]
    assert "instead of numbers after 1 new tokens" in str(failures[0].error)
    found = {}
    collect([event for event in (*before, *after) if event.ticket != tickets[2]], found)
    for number in (0, 1):
        alone = generate(llava15.vlm, [prompts[number][0]], llava15.tokenizer, prompts[number][1])[0]
        assert found[tickets[number], 0][1].ids == alone.ids


def test_what_breaks_a_prompt_or_a_step_is_told_and_the_engine_goes_on(llava15, monkeypatch):
    prompts = work(llava15)
    engine = Engine(llava15.vlm, llava15.tokenizer)
    real = llava15.vlm.hidden

    def broken(batch, *arguments, **options):
        if batch.ids.shape[1] == (1 if break_steps else prompts[1][0].num_tokens):
            raise RuntimeError("no memory left")
        return real(batch, *arguments, **options)

    monkeypatch.setattr(llava15.vlm, "hidden", broken)
    break_steps = False
    tickets = [engine.submit(prompt, sampling) for prompt, sampling in prompts[:2]]
    failed = [event.ticket for event in run(engine) if isinstance(event, Failure)]
    assert failed == [tickets[1]], "the prompt that cannot be run, alone"
    break_steps = True
    tickets = [engine.submit(prompts[0][0], GREEDY), engine.submit(prompts[2][0], THREE)]
    failed = [event.ticket for event in run(engine) if isinstance(event, Failure)]
    assert failed == tickets, "whoever was in the step"
    assert engine.num_rows == 0
    monkeypatch.undo()
    ticket, found = engine.submit(*prompts[0]), {}
    collect(run(engine), found)
    assert found[ticket, 0][1].ids == generate(llava15.vlm, [prompts[0][0]], None, GREEDY)[0].ids


def test_an_encoders_padding_stays_unseen_when_the_longest_row_has_left(tokenizer):
    """Of unequal prompts only a shorter one is left: nothing may look at where the longest one's keys were."""
    toy = Toy(sharpen(weights.build(TINY_T5, seed=1)), TINY_T5, tokenizer)
    long, short = work(toy)[1][0], work(toy)[2][0]
    stop = generate(toy.vlm, [long], None, GREEDY)[0].ids[1]
    together = generate(toy.vlm, [long, short], None, replace(GREEDY, stop_ids=(stop,)))
    assert len(together[0].ids) == 2
    assert together[1].ids == generate(toy.vlm, [short], None, replace(GREEDY, stop_ids=(stop,)))[0].ids
