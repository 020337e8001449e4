"""Decoding: cached equals uncached, batched equals single, and everything that ends an answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from generate.variants import sharpened_copy
from opsin.collate import pad
from opsin.errors import GenerationError, TokenizerError
from opsin.generate import decode
from opsin.generate.decode import generate, rest, stream
from opsin.generate.sampling import Sampling
from opsin.nn.cache import KVCache
from opsin.text.messages import ask
from toys import picture

GREEDY = Sampling(max_new_tokens=12)
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, seed=5, repetition_penalty=1.1)


def prompts(toy):
    """Prompts of several lengths, with no, one and two pictures."""
    encode = toy.encoder.encode
    return [
        encode(ask("What is it?", picture((80, 60)))),
        encode(ask("Hello")),
        encode(ask("Which of these two is larger, and by how much?", picture((30, 90)), picture((90, 30), seed=1))),
        encode(ask("And this?", picture((50, 50), seed=2))),
    ]


@torch.inference_mode()
def greedy_without_cache(toy, prompt, count):
    """The whole sequence is run anew for every token. Returns ids and the logits they came from."""
    ids, logits = [], []
    for _ in range(count):
        longer = replace(
            prompt,
            ids=np.append(prompt.ids, ids).astype(np.int64),
            supervised=np.zeros(prompt.num_tokens + len(ids), np.bool_),
            positions=np.arange(prompt.num_tokens + len(ids))[:, None],
        )
        logits.append(toy.vlm.logits(toy.vlm.hidden(pad([longer]))[0, -1]))
        ids.append(int(logits[-1].argmax()))
    return ids, logits


def test_cached_decoding_equals_running_everything_anew_at_every_step(toy):
    for prompt in prompts(toy):
        expected, logits = greedy_without_cache(toy, prompt, 10)
        found = generate(toy.vlm, [prompt], None, Sampling(max_new_tokens=10))[0].ids
        assert list(found) == expected
        cache = KVCache(toy.config.decoder, batch_size=1, capacity=8, dtype=torch.float32)
        for step, wanted in enumerate(logits):  # and not only the likeliest: all logits
            so_far = replace(
                prompt,
                ids=np.append(prompt.ids, expected[:step]).astype(np.int64),
                supervised=np.zeros(prompt.num_tokens + step, np.bool_),
                positions=np.arange(prompt.num_tokens + step)[:, None],
                token_spans=np.zeros(prompt.num_tokens + step, np.int64),
            )
            with torch.inference_mode():
                found_logits = toy.vlm.logits(toy.vlm.hidden(pad([rest(so_far, cache.lengths[0])]), cache)[0, -1])
            # Float32 sums in another order, through two layers, of logits up to 30: the sixth digit.
            torch.testing.assert_close(found_logits, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, replace(DRAWN, num_sequences=3)], ids=["greedy", "drawn", "three"])
def test_a_batched_answer_equals_the_single_one(toy, sampling):
    encoded = prompts(toy)
    together = generate(toy.vlm, encoded, toy.tokenizer, sampling)
    alone = [generate(toy.vlm, [prompt], toy.tokenizer, sampling) for prompt in encoded]
    count = sampling.num_sequences
    assert [(answer.prompt, answer.sequence) for answer in together] == [(p, s) for p in range(4) for s in range(count)]
    for answer in together:
        single = alone[answer.prompt][answer.sequence]
        assert (answer.ids, answer.text, answer.finish) == (single.ids, single.text, single.finish)
        assert answer.usage == single.usage


def test_prompts_run_in_groups_are_answered_like_prompts_run_together(toy, monkeypatch):
    encoded = prompts(toy)
    expected = [answer.ids for answer in generate(toy.vlm, encoded, None, GREEDY)]
    for max_tokens in (1, 2 * max(prompt.num_tokens for prompt in encoded)):
        monkeypatch.setattr(decode, "PREFILL_TOKENS", max_tokens)
        assert [answer.ids for answer in generate(toy.vlm, encoded, None, GREEDY)] == expected
        # Rows that hold different shares of their prompts, in a cache that has to grow first.
        cache = KVCache(toy.config.decoder, batch_size=4, capacity=1, dtype=torch.float32)
        with torch.inference_mode():
            toy.vlm.hidden(pad(encoded), cache)
        cache.truncate([encoded[0].num_tokens - 1, 1, 0, 0])
        assert [answer.ids for answer in generate(toy.vlm, encoded, None, GREEDY, cache=cache)] == expected


def test_groups_hold_as_many_neighbours_as_fit():
    groups = decode._neighbours([600, 3, 3, 600, 600, 500, 500], max_tokens=1024)
    assert [(group.start, group.stop) for group in groups] == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 7)]


def test_rows_that_end_early_leave_the_batch_and_change_nothing_for_the_rest(llava15):
    encoded = prompts(llava15)
    full = [answer.ids for answer in generate(llava15.vlm, encoded, None, GREEDY)]
    stop = full[1][3]  # ends one row for certain, perhaps others
    widths = []
    hook = llava15.vlm.decoder.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[0]))
    try:
        stopped = generate(llava15.vlm, encoded, None, replace(GREEDY, stop_ids=(stop,)))
    finally:
        hook.remove()
    for before, after in zip(full, stopped, strict=True):
        expected = before[: before.index(stop) + 1] if stop in before else before
        assert after.ids == expected
    assert sum(widths) == len(encoded) + sum(len(answer.ids) - 1 for answer in stopped)


def test_several_answers_share_one_run_of_the_prompt(llava15):
    prompt = prompts(llava15)[0]
    shapes = []
    hook = llava15.vlm.decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    try:
        answers = generate(llava15.vlm, [prompt], None, replace(DRAWN, num_sequences=4))
    finally:
        hook.remove()
    assert shapes[0] == (1, prompt.num_tokens)
    assert shapes[1] == (4, 1)
    assert len({answer.ids for answer in answers}) > 1
    assert answers[0].ids == generate(llava15.vlm, [prompt], None, DRAWN)[0].ids


def test_same_seed_same_answer_other_seed_other_answer(llava15):
    def answer(seed):
        return generate(llava15.vlm, prompts(llava15)[:1], None, replace(DRAWN, seed=seed, max_new_tokens=20))[0].ids

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_the_stream_joins_to_the_answers(toy):
    encoded = prompts(toy)
    expected = generate(toy.vlm, encoded, toy.tokenizer, GREEDY)
    texts, ids, answers = {}, {}, {}
    for chunk in stream(toy.vlm, encoded, toy.tokenizer, GREEDY):
        assert chunk.row not in answers, "nothing comes after the end of an answer"
        texts[chunk.row] = texts.get(chunk.row, "") + chunk.text
        ids[chunk.row] = (*ids.get(chunk.row, ()), chunk.id)
        if chunk.answer:
            answers[chunk.row] = chunk.answer
    for row, answer in enumerate(expected):
        assert (texts[row], ids[row]) == (answer.text, answer.ids)
        assert answers[row].ids == answer.ids


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(llava15):
    prompt = prompts(llava15)[1]
    free = generate(llava15.vlm, [prompt], llava15.tokenizer, GREEDY)[0]
    place = next(i for i in range(2, 12) if free.ids[i] not in free.ids[:i])
    answer = generate(llava15.vlm, [prompt], llava15.tokenizer, replace(GREEDY, stop_ids=(free.ids[place],)))[0]
    assert answer.finish == "stop_token"
    assert answer.ids == free.ids[: place + 1]
    assert answer.text == llava15.tokenizer.decode(free.ids[:place]).strip()
    assert answer.usage.new_tokens == place + 1


def test_a_stop_string_ends_the_answer_and_is_cut_from_it(llava15):
    prompt = prompts(llava15)[3]
    free = generate(llava15.vlm, [prompt], llava15.tokenizer, replace(GREEDY, max_new_tokens=40))[0]
    stop = free.text[3:5]
    answer = generate(
        llava15.vlm, [prompt], llava15.tokenizer, replace(GREEDY, max_new_tokens=40, stop_strings=(stop,))
    )[0]
    assert answer.finish == "stop_string"
    assert answer.text == free.text[: free.text.index(stop)].rstrip()
    assert answer.ids == free.ids[: len(answer.ids)]


def test_usage_counts_text_and_picture_tokens_apart(toy):
    for prompt, answer in zip(prompts(toy), generate(toy.vlm, prompts(toy), toy.tokenizer, GREEDY), strict=True):
        slots = sum(image.plan.num_slots for image in prompt.images)
        assert answer.usage.image_tokens == slots
        assert answer.usage.text_tokens == len(prompt.ids) - slots
        assert answer.usage.new_tokens == len(answer.ids)


def test_answers_end_where_the_models_context_ends(llava15):
    prompt = prompts(llava15)[1]
    vlm = sharpened_copy(llava15, max_positions=prompt.num_tokens + 3)
    answer = generate(vlm, [prompt], None, GREEDY)[0]
    assert (len(answer.ids), answer.finish) == (3, "length")
    assert answer.ids == generate(llava15.vlm, [prompt], None, GREEDY)[0].ids[:3]
    vlm = sharpened_copy(llava15, max_positions=prompt.num_tokens)
    with pytest.raises(GenerationError, match=f"takes {prompt.num_tokens} tokens, which leaves no room"):
        generate(vlm, [prompt], None, GREEDY)


def test_a_repetition_penalty_counts_text_but_not_picture_slots(llava15):
    prompt = prompts(llava15)[0]
    slot_id = int(prompt.ids[prompt.slots[0]])
    text_id = int(prompt.ids[-1])
    assert slot_id not in np.delete(prompt.ids, prompt.slots)
    always = torch.zeros(1, llava15.config.decoder.vocab_size)
    always[0, [text_id, slot_id, 300, 301]] = torch.tensor([9.0, 8.0, 6.0, 5.0])
    hook = llava15.vlm.decoder.head.register_forward_hook(lambda *_: always)
    try:
        plain = generate(llava15.vlm, [prompt], None, Sampling(max_new_tokens=4))[0].ids
        penalised = generate(llava15.vlm, [prompt], None, Sampling(max_new_tokens=4, repetition_penalty=2.0))[0].ids
    finally:
        hook.remove()
    assert plain == (text_id,) * 4
    # 9 / 2 for what stands in the text; 8 stays 8 once, because what stands at slots was never said; then 8 / 2, 6, 5.
    assert penalised == (slot_id, 300, 301, text_id)


def test_logits_that_are_no_numbers_are_an_error_that_names_the_prompt(llava15):
    vlm = sharpened_copy(llava15)
    with torch.no_grad():
        vlm.decoder.norm.weight[0] = float("nan")
    prompt = replace(prompts(llava15)[1], name="poisoned")
    with pytest.raises(GenerationError, match=r"gave nan instead of numbers after 0 new tokens for prompt 'poisoned'"):
        generate(vlm, [prompt], None, GREEDY)


def test_a_stop_token_that_the_tokenizer_lacks_is_an_error(llava15):
    vlm = sharpened_copy(llava15, stop_tokens=("<|end|>",))
    with pytest.raises(TokenizerError, match="end"):
        generate(vlm, prompts(llava15)[:1], llava15.tokenizer, GREEDY)


def test_no_prompts_no_answers(llava15):
    assert generate(llava15.vlm, [], llava15.tokenizer, GREEDY) == []


def test_half_precision_models_answer_alike_alone_and_together(llava15):
    """In bfloat16 rounding may tip the balance of near-equal tokens, so first tokens with clear leads are compared."""
    vlm = sharpened_copy(llava15).to(torch.bfloat16)
    encoded = prompts(llava15)
    together = generate(vlm, encoded, None, Sampling(max_new_tokens=2))
    exact = generate(llava15.vlm, encoded, None, Sampling(max_new_tokens=2))
    assert [answer.ids[0] for answer in together] == [answer.ids[0] for answer in exact]


def test_a_cache_of_the_callers_is_continued(llava15):
    prompt = prompts(llava15)[2]
    expected = generate(llava15.vlm, [prompt], None, GREEDY)[0].ids
    first_slot, last_slot = int(prompt.slots[0]), int(prompt.slots[-1])
    for start in (1, first_slot, last_slot + 1, prompt.num_tokens - 1):
        cache = KVCache(llava15.config.decoder, batch_size=1, capacity=4, dtype=torch.float32)
        with torch.inference_mode():
            llava15.vlm.hidden(pad([prompt]), cache)
        cache.truncate([start])
        answer = generate(llava15.vlm, [prompt], None, GREEDY, cache=cache)[0]
        assert answer.ids == expected
        assert cache.lengths == [prompt.num_tokens + len(expected) - 1]
    with pytest.raises(AssertionError, match="inside a picture"):
        rest(prompt, first_slot + 1)
