"""Captions that are cut in two (BLIP-2's stage 2 with an encoder)."""

from collections import Counter

import pytest

from opsin.data.captions import SplitCaptions
from opsin.errors import DataError
from opsin.text.messages import Conversation, assistant, user

WORDS = "a dog runs along the beach"


class Captions:
    """Pictures with one caption."""

    fingerprint = "captions"

    def __len__(self) -> int:
        return 200

    def sample(self, index: int, epoch: int) -> Conversation:
        return Conversation((user("ignored", images=[0]), assistant(f"{WORDS} {index}")), (b"",), id=f"record {index}")


def test_what_is_before_the_cut_is_the_users_and_the_rest_the_answer():
    split = SplitCaptions(Captions(), seed=1)
    cuts = Counter()
    for index in range(len(split)):
        asked, answer = split.sample(index, 0).messages
        assert asked.images == (0,)
        assert f"{asked.text} {answer.text}".strip() == f"{WORDS} {index}"
        cuts[len(answer.text.split())] += 1
    assert set(cuts) == set(range(1, 8)), "each cut occurs, and the answer keeps a word at least"
    assert split.fingerprint == "captions"


def test_cuts_follow_from_seed_epoch_and_sample():
    def cuts(seed: int, epoch: int) -> list[str]:
        return [SplitCaptions(Captions(), seed=seed).sample(index, epoch).messages[1].text for index in range(50)]

    assert cuts(1, 0) == cuts(1, 0)
    assert cuts(1, 0) != cuts(1, 1)
    assert cuts(1, 0) != cuts(2, 0)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((user("?"), assistant("yes"), user("?"), assistant("no")), "a caption is the only answer"),
        ((user("?"),), "a caption is the only answer"),
        ((user("?"), assistant("")), "there is no caption to split"),
    ],
)
def test_what_cannot_be_split_is_named(messages, message):
    class One(Captions):
        def sample(self, index: int, epoch: int) -> Conversation:
            return Conversation(messages, id="record 7")

    with pytest.raises(DataError, match=f"record 7: .*{message}"):
        SplitCaptions(One(), seed=0).sample(0, 0)
