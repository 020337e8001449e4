"""Order, passes and the threads that read ahead."""

import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from opsin.data.feed import Feed, ahead
from opsin.data.order import derive_seed, length_grouped, modality_grouped, permutation
from opsin.data.overlong import fit
from opsin.data.passes import check_taught, passes
from opsin.encode import Encoded, Encoder
from opsin.errors import DataError
from opsin.spec.recipe import BatchSize
from opsin.text.messages import Conversation, assistant, user
from train.toy import DrawnSource, stage, tiny_model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Encoder:
    model = tiny_model(tmp_path_factory.mktemp("model"))
    return Encoder(model.config, model.tokenizer)


def feed_of(encoder: Encoder, source: DrawnSource, *, seed: int = 0, **changes) -> Feed:
    def encode(conversation: Conversation) -> Encoded:
        return encoder.encode(conversation, mode="train")

    return Feed(source, stage(**changes), encode=encode, max_tokens=1000, seed=seed)


def test_every_epoch_is_another_order_of_all_samples(encoder):
    feed = feed_of(encoder, DrawnSource(50))
    orders = [feed.order(epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert feed_of(encoder, DrawnSource(50)).order(1) == orders[1]
    assert feed_of(encoder, DrawnSource(50), seed=1).order(1) != orders[1]
    assert feed_of(encoder, DrawnSource(50), name="other").order(1) != orders[1]


def test_the_last_step_of_an_epoch_takes_what_is_left(encoder):
    feed = feed_of(encoder, DrawnSource(10), batch={"samples": 4}, steps=None, epochs=2.5)
    assert feed.steps_per_epoch == 3
    assert feed.num_steps == 8
    steps = [feed.step_samples(step) for step in range(feed.num_steps)]
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2, 4, 4]
    assert Counter(epoch for step in steps for _, epoch in step) == {0: 10, 1: 10, 2: 8}


def test_steps_count_instead_of_epochs_where_both_are_given(encoder):
    assert feed_of(encoder, DrawnSource(10), steps=2, epochs=5).num_steps == 2


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_a_stream_begins_at_any_step_and_is_the_same_for_any_number_of_threads(encoder, workers):
    feed = feed_of(encoder, DrawnSource(10), batch={"samples": 4}, steps=7)
    names = [sample.name for sample in feed.stream(0, workers=0)]
    assert [sample.name for sample in feed.stream(4, workers=workers)] == names[14:]


def test_grouped_steps_are_of_one_kind_and_of_similar_lengths(encoder):
    source = DrawnSource(200)
    feed = feed_of(encoder, source, sampler="modality_length", batch={"samples": 8}, steps=None, epochs=1)
    lengths = source.modality_lengths(0)
    steps = [[lengths[index] for index, _ in feed.step_samples(step)] for step in range(feed.num_steps)]
    assert sorted(length for step in steps for length in step) == sorted(lengths)
    mixed = [number for number, step in enumerate(steps) if len({length > 0 for length in step}) == 2]
    # 160 samples with pictures and 40 without make whole steps, of which each kind's last one is kept for the end.
    assert set(mixed) <= {23, 24}
    assert all(step == sorted(step, key=abs, reverse=True) for step in steps[:23])


def test_a_source_without_lengths_cannot_be_grouped(encoder):
    class Plain:
        def __len__(self):
            return 3

        def sample(self, index, epoch):
            raise AssertionError

    with pytest.raises(DataError, match="Plain has no modality_lengths"):
        feed_of(encoder, Plain(), sampler="modality_length")


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_grouped_orders_are_permutations_and_balance_their_batches(world_size):
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (233,), generator=random).tolist()
    order = length_grouped(lengths, batch_size=6, world_size=world_size, random=random)
    assert sorted(order) == list(range(233))
    batches = [order[start : start + 6] for start in range(0, 6 * world_size, 6)]
    totals = [sum(lengths[index] for index in batch) for batch in batches]
    assert max(totals) - min(totals) < max(lengths)
    signed = [length if index % 3 else -length for index, length in enumerate(lengths)]
    order = modality_grouped(signed, batch_size=6, world_size=world_size, random=random)
    assert sorted(order) == list(range(233))


def test_one_kind_alone_is_only_grouped_by_length():
    def random() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    sizes = {"batch_size": 2, "world_size": 2}
    for lengths in ([5, 3, 9, 1, 7], [-5, -3, -9, -1, -7]):
        assert modality_grouped(lengths, random=random(), **sizes) == length_grouped(lengths, random=random(), **sizes)


def test_seeds_of_different_purposes_are_unrelated():
    seeds = {derive_seed(seed, name, number) for seed in range(5) for name in ("a", "b") for number in range(5)}
    assert len(seeds) == 50
    assert derive_seed(1, "a", 23) != derive_seed(1, "a2", 3)
    assert permutation(5, 0, "x") == permutation(5, 0, "x")


def fake(length: int, *, supervised: int = 1, slots: tuple[int, ...] = (), name: str = "s") -> Encoded:
    taught = np.zeros(length, np.bool_)
    taught[length - supervised :] = True
    return Encoded(
        ids=np.arange(length),
        supervised=taught,
        positions=np.arange(length)[:, None],
        slots=np.array(slots, np.int64),
        slot_rows=np.zeros(len(slots), np.int64),
        images=(),
        token_spans=np.zeros(length, np.int64),
        spans=(),
        name=name,
    )


def cut(lengths: list[int], **settings) -> list[list[int]]:
    batch = BatchSize(samples=len(lengths), **settings)
    return [[sample.num_tokens for sample in group] for group in passes(map(fake, lengths), batch)]


def test_passes_keep_the_order_and_the_budget():
    lengths = [5, 9, 2, 30, 4, 4, 4, 4]
    assert cut(lengths) == [lengths]
    assert cut(lengths, micro_samples=3) == [[5, 9, 2], [30, 4, 4], [4, 4]]
    assert cut(lengths, micro_tokens=16) == [[5, 9, 2], [30], [4, 4, 4, 4]]
    # Padded: rows times the longest.
    assert cut(lengths, micro_tokens=16, form="pad") == [[5], [9], [2], [30], [4, 4, 4, 4]]
    assert cut(lengths, micro_tokens=16, micro_samples=2) == [[5, 9], [2], [30], [4, 4], [4, 4]]


def test_a_pass_begins_before_the_step_is_read():
    read = []

    def samples():
        for number in range(6):
            read.append(number)
            yield fake(4)

    assert len(next(passes(samples(), BatchSize(samples=6, micro_samples=2)))) == 2
    assert read == [0, 1, 2]


def test_a_long_sample_is_an_error_or_loses_its_end():
    long = fake(20, supervised=12, slots=(2, 3, 4), name="the long one")
    with pytest.raises(DataError, match=r"'the long one' takes 20 tokens \(3 of them .*limit is 10.*truncate"):
        fit(long, None, max_tokens=10, overlong="error")
    short = fit(long, None, max_tokens=10, overlong="truncate")
    assert short.num_tokens == len(short.supervised) == len(short.positions) == len(short.token_spans) == 10
    assert short.num_supervised == 2
    assert list(short.slots) == [2, 3, 4]
    with pytest.raises(DataError, match="cutting there would cut a picture"):
        fit(long, None, max_tokens=4, overlong="truncate")
    with pytest.raises(DataError, match=r"'the long one' has no token to learn .* cut off at 8 tokens"):
        check_taught(long.name, fit(long, None, max_tokens=8, overlong="truncate").measure, 8)


def test_a_sample_whose_only_taught_token_comes_first_cannot_be_learnt():
    first = replace(fake(3, supervised=0), supervised=np.array([True, False, False]))
    with pytest.raises(DataError, match="no token to learn among its 3"):
        check_taught("s", first.measure, 10)


def test_conversations_beyond_the_models_own_limit_are_left_to_the_stage(tmp_path):
    """The encoder refuses long prompts, but a stage may be told to shorten them."""
    from opsin.train.prepare import prepare_stage

    class Long(DrawnSource):
        def sample(self, index, epoch):
            return Conversation((user("x"), assistant("y" * 6000)), id="long")

    model = tiny_model(tmp_path)
    assert model.config.decoder.max_positions < 6000
    one = prepare_stage(
        stage(overlong="truncate"),
        module=model.vlm,
        model=model.config,
        tokenizer=model.tokenizer,
        seed=0,
        source=Long(1),
    )
    assert one.feed.load(0, 0).num_tokens == model.config.decoder.max_positions


def test_reading_ahead_is_bounded_and_keeps_the_order():
    started: list[int] = []
    lock = threading.Lock()

    def slow(number: int) -> int:
        with lock:
            started.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    results = ahead(iter(range(40)), slow, workers=4, depth=6)
    assert list(islice(results, 5)) == [0, 1, 2, 3, 4]
    time.sleep(0.05)
    assert max(started) <= 5 + 6
    results.close()
    assert threading.active_count() < 20
    time.sleep(0.02)
    count = len(started)
    time.sleep(0.02)
    assert len(started) == count


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_thread_reaches_the_loop(workers):
    def fail(number: int) -> int:
        if number == 3:
            raise DataError("sample 3 is bad")
        return number

    results = ahead(iter(range(10)), fail, workers=workers, depth=4)
    assert list(islice(results, 3)) == [0, 1, 2]
    with pytest.raises(DataError, match="sample 3 is bad"):
        next(results)
