"""Bad samples: a run stops at them, or goes on with others: counted, limited, in an order that never varies."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

import toys
from data import seeded
from data.seeded import SEEDS
from opsin.data.defects import DEFECTS
from opsin.data.feed import Feed
from opsin.data.files import FileSource
from opsin.data.ledger import LeftOut
from opsin.encode import Encoder
from opsin.errors import ConfigError, DataError
from opsin.spec.recipe import BadSamples, Stage
from opsin.text.messages import Conversation, Message, TextPart, assistant, user
from opsin.train import run
from opsin.train.preview import preview
from train.test_runs import Crash, crash_after
from train.toy import DrawnSource, differing, stage, tensors_of, tiny_model, two_stages

NUM_SAMPLES, MAX_TOKENS = 1000, 220


class Spoilt(DrawnSource):
    """`DrawnSource` with samples that are bad, each in one of twelve ways."""

    def __init__(self, length: int, bad: list[int], folder: Path) -> None:
        super().__init__(length, fingerprint=str(bad))
        self.bad = {index: number % 12 for number, index in enumerate(bad)}
        self.folder = folder
        if not folder.exists():
            folder.mkdir()
            whole = folder / "whole.png"
            toys.picture((40, 40)).save(whole)
            (folder / "half.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
            (folder / "empty.png").write_bytes(b"")
            (folder / "page.png").write_text("<!doctype html><p>404 Not Found")
            toys.picture((2100, 10)).save(folder / "strip.png")

    def where(self, index: int, epoch: int) -> str:
        return f"drawn {index}"

    def sample(self, index: int, epoch: int) -> Conversation:
        good = super().sample(index, epoch)
        if index not in self.bad:
            return good
        kind, name = self.bad[index], f"drawn {index}"
        if kind < 5:
            picture = self.folder / ("missing.png", "half.png", "empty.png", "page.png", "strip.png")[kind]
            return Conversation((user("what?", images=[0]), assistant("x")), (picture,), id=name)
        if kind == 5:
            raise DataError(f"{name}: not JSON")
        if kind == 6:
            return Conversation((user("?", images=[0, 1]), assistant("x")), good.images, id=name)  # one is not given
        messages = {
            7: (user("what?"), assistant("")),
            8: (user("what?"), user("well?"), assistant("x")),
            9: (user("what?" * MAX_TOKENS), assistant("x")),
            10: (assistant("x"),),
            11: (user("what?"), assistant("x"), Message("system", (TextPart("late"),)), user("?"), assistant("y")),
        }
        return Conversation(messages[kind], id=name)


BAD = [(number * 401 + 17) % NUM_SAMPLES for number in range(37)]
FEW = 200
FEW_BAD = [(number * 37 + 5) % FEW for number in range(12)]
"""For what need not be seen in a thousand: one of each way."""
SKIP = {"policy": "skip", "max_share": 0.05}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Encoder:
    model = tiny_model(tmp_path_factory.mktemp("model"))
    return Encoder(model.config, model.tokenizer)


def feed_of(encoder: Encoder, source: DrawnSource, **changes) -> Feed:
    settings = {"bad_samples": SKIP, "batch": {"samples": 50}, "steps": None, "epochs": 1, **changes}
    assert encoder.config.chat.turns == "alternate"
    return Feed(
        source,
        stage(**settings),
        encode=lambda conversation: encoder.encode(conversation, mode="train"),
        max_tokens=MAX_TOKENS,
        seed=4,
    )


def read(feed: Feed, first_step: int = 0, *, workers: int = 0) -> list[str]:
    """Names of all samples, step by step."""
    names: list[str] = []
    stream = feed.stream(first_step, workers=workers)
    for step in range(first_step, feed.num_steps):
        names += [sample.name for sample in islice(stream, len(feed.step_samples(step)))]
        feed.settle(step)
    return names


def test_exactly_the_bad_samples_are_in_the_ledger_and_others_take_their_places(encoder, tmp_path):
    assert len(set(BAD)) == 37
    source = Spoilt(NUM_SAMPLES, BAD, tmp_path / "pictures")
    feed = feed_of(encoder, source)
    names = read(feed)
    entries = feed.ledger.entries
    assert sorted(entry["sample"] for entry in entries) == sorted(BAD)
    assert len({source.bad[entry["sample"]] for entry in entries}) == 12
    assert all(entry["where"] == f"drawn {entry['sample']}" and entry["why"] == "skipped" for entry in entries)
    assert len(names) == NUM_SAMPLES
    order = [index for step in range(feed.num_steps) for index, _ in feed.step_samples(step)]
    place = {index: at for at, index in enumerate(order)}
    for entry in entries:
        assert entry["replacement"] not in source.bad
        assert names[place[entry["sample"]]].endswith(f" {entry['replacement']}")
        assert entry["step"] == place[entry["sample"]] // 50 + 1
    # All others stand where they would have stood.
    assert [name.split()[-1] for at, name in enumerate(names) if order[at] not in source.bad] == [
        str(index) for index in order if index not in source.bad
    ]


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_ledger_is_the_same_for_any_number_of_threads_and_from_any_step(encoder, tmp_path, workers):
    few = {"bad_samples": {**SKIP, "max_share": 0.1}}
    source = Spoilt(FEW, FEW_BAD, tmp_path / "pictures")
    alone = feed_of(encoder, source, **few)
    names = read(alone)
    threaded = feed_of(encoder, source, **few)
    assert read(threaded, workers=workers) == names
    assert threaded.ledger.entries == alone.ledger.entries
    later = feed_of(encoder, source, **few)
    assert read(later, 2, workers=workers) == names[2 * 50 :]
    assert later.ledger.entries == [entry for entry in alone.ledger.entries if entry["step"] > 2]


def test_processes_that_read_parts_of_a_step_agree_on_the_ledger(encoder, tmp_path):
    few = {"bad_samples": {**SKIP, "max_share": 0.1}}
    source = Spoilt(FEW, FEW_BAD, tmp_path / "pictures")
    alone = feed_of(encoder, source, **few)
    read(alone)
    feeds = [feed_of(encoder, source, **few) for _ in range(3)]
    for step in range(alone.num_steps):
        for rank, feed in enumerate(feeds):
            for place in feed.step_samples(step)[rank::3]:
                loaded = feed.load_or_replace(step, *place)
                feed.found += [loaded.left_out] if loaded.left_out else []
        found = [entry for feed in feeds for entry in feed.found]
        for feed in feeds:
            feed.settle(step, found)
    assert all(feed.ledger.entries == alone.ledger.entries for feed in feeds)


def test_replacements_of_a_grouped_stage_are_of_the_same_kind(encoder, tmp_path):
    source = Spoilt(200, [4, 9, 14, 3, 8], tmp_path / "pictures")
    feed = feed_of(encoder, source, sampler="modality_length", batch={"samples": 8})
    read(feed)
    lengths = source.modality_lengths(0)
    assert len(feed.ledger.entries) == 5
    assert all(lengths[entry["sample"]] * lengths[entry["replacement"]] > 0 for entry in feed.ledger.entries)


def test_the_run_stops_at_a_bad_sample_unless_told_otherwise(encoder):
    with pytest.raises(DataError, match="drawn 17"):
        read(feed_of(encoder, Failing(100, 17), bad_samples="fail"))
    assert stage().bad_samples == BadSamples(policy="fail", max_share=0.001)
    assert stage(bad_samples="skip").bad_samples == BadSamples(policy="skip")
    with pytest.raises(ConfigError, match=r"bad_samples.*policy.*'fail' or 'skip'"):
        stage(bad_samples="ignore")


class Failing(DrawnSource):
    """One sample cannot be read."""

    def __init__(self, length: int, bad: int) -> None:
        super().__init__(length)
        self.bad = bad

    def sample(self, index: int, epoch: int) -> Conversation:
        if index == self.bad:
            raise DataError(f"drawn {index} is bad")
        return super().sample(index, epoch)


def test_more_than_the_limit_stops_within_the_step(encoder, tmp_path):
    feed = feed_of(encoder, Spoilt(NUM_SAMPLES, BAD, tmp_path / "pictures"), bad_samples={**SKIP, "max_share": 0.02})
    with pytest.raises(DataError, match=r"21 bad samples of 1000 in epoch 0; at most 20 may be skipped \(.*0\.02\)"):
        read(feed, workers=3)
    assert len(feed.ledger.entries) == 21
    # One is allowed however small the data is, and every epoch counts for itself.
    feed = feed_of(encoder, Spoilt(60, [5], tmp_path / "pictures"), bad_samples="skip", epochs=3)
    read(feed)
    assert [entry["epoch"] for entry in feed.ledger.entries] == [0, 1, 2]


def test_where_nothing_is_good_the_run_stops(encoder, tmp_path):
    source = Spoilt(6, list(range(6)), tmp_path / "pictures")
    with pytest.raises(DataError, match="No other sample could take its place: none of 1000"):
        read(feed_of(encoder, source, bad_samples={"policy": "skip", "max_share": 1}))


def test_what_is_too_long_can_be_dropped_without_limit(encoder):
    class Long(DrawnSource):
        def sample(self, index, epoch):
            if index % 4:
                return super().sample(index, epoch)
            return Conversation((user("x"), assistant("y" * 500)), id=f"long {index}")

    feed = feed_of(encoder, Long(100), overlong="drop", bad_samples="fail")
    assert not any("long" in name for name in read(feed))
    assert Counter(entry["why"] for entry in feed.ledger.entries) == {"dropped": 25}
    assert all("takes" in entry["reason"] for entry in feed.ledger.entries)


def ledger_of(output: Path) -> list[LeftOut]:
    return [json.loads(line) for line in (output / "left_out.jsonl").read_text().splitlines()]


def test_a_resumed_run_leaves_the_same_out_and_ends_with_the_same_bits(tmp_path):
    def config(output: Path):
        plain = two_stages(output)
        skip = {"policy": "skip", "max_share": 0.5}
        first, second = (
            Stage.model_validate({**each.model_dump(), "bad_samples": skip, "overlong": "truncate"})
            for each in plain.stages
        )
        return plain.replace(stages=(first, second.replace(max_tokens=200)))

    def sources():
        first, second = (Spoilt(18, bad, tmp_path / "pictures") for bad in ([1, 5], [0, 3, 11, 4]))
        first.with_text = False
        return {"first": first, "second": second}

    straight = run(config(tmp_path / "a"), model=tiny_model(tmp_path), sources=sources())
    expected = ledger_of(tmp_path / "a")
    assert {entry["stage"] for entry in expected} == {"first", "second"}
    assert {entry["sample"] for entry in expected if entry["stage"] == "second"} == {0, 3, 11, 4}
    for steps in (2, 4, 5, 3):
        with pytest.raises(Crash):
            run(config(tmp_path / "b"), model=tiny_model(tmp_path), sources=sources(), on_row=crash_after(steps))
    resumed = run(config(tmp_path / "b"), model=tiny_model(tmp_path), sources=sources())
    assert ledger_of(tmp_path / "b") == expected
    assert differing(tensors_of(resumed.model), tensors_of(straight.model)) == []
    rows = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert sum(row["left_out"] for row in rows) == len(expected)
    assert sum(row["shortened"] for row in rows) > 0


def test_bad_records_of_a_file_are_skipped_where_they_stand(encoder, tmp_path):
    """1,000 lines, 37 of them spoilt in more than twelve ways, from half a record to a JPEG that was cut off."""
    errors = [seed for seed in SEEDS if DEFECTS[seed.kind].severity == "error" and seed.kind != "too_long"]
    seeds = [errors[number % len(errors)] for number in range(37)]
    expected = seeded.write(tmp_path, NUM_SAMPLES, tuple(seeds))
    assert len(expected) == 37
    assert len({seed.kind for seed in expected.values()}) >= 12
    with pytest.raises(DataError, match=f"data.jsonl line {min(expected)}"):
        FileSource(tmp_path / "data.jsonl")
    source = FileSource(tmp_path / "data.jsonl", on_bad="keep")
    ledgers = []
    for workers in (0, 4):
        feed = feed_of(encoder, source)
        feed.max_tokens = 2000
        assert len(read(feed, workers=workers)) == NUM_SAMPLES
        ledgers.append(feed.ledger.entries)
    assert ledgers[0] == ledgers[1]
    assert sorted(entry["sample"] + 1 for entry in ledgers[0]) == sorted(expected)
    for entry in ledgers[0]:
        assert entry["kind"] == expected[entry["sample"] + 1].kind, entry
        assert entry["where"].endswith(f"data.jsonl record {entry['sample'] + 1} (line {entry['sample'] + 1})")


def test_a_run_goes_on_without_bad_records_of_its_files(tmp_path):
    seeded.write(tmp_path, 40, (SEEDS[0], SEEDS[21]))
    plain = two_stages(tmp_path / "out")
    (stage_of,) = [each for each in plain.stages if each.name == "second"]
    data = [{"path": str(tmp_path / "data.jsonl")}]
    skip = Stage.model_validate({**stage_of.model_dump(), "data": data, "bad_samples": SKIP, "steps": 10})
    run(plain.replace(stages=(skip,)), model=tiny_model(tmp_path))
    assert len(ledger_of(tmp_path / "out")) == 2
    dry = plain.replace(stages=(skip,), tokenizer=str(tmp_path / "tokenizer"))
    assert "estimated from 16 samples" in "\n".join(preview(dry))  # one of which is bad
    fail = plain.replace(stages=(skip.replace(bad_samples="fail"),), output=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"data.jsonl line 13, column \d+: not JSON"):
        run(fail, model=tiny_model(tmp_path))
