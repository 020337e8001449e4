"""What becomes of conversations that are too long: nothing ever cuts through a picture."""

import numpy as np
import pytest

import toys
from opsin import families
from opsin.data.overlong import TooLong, fit, shorter
from opsin.encode import Encoded, Encoder
from opsin.errors import ConfigError, DataError
from opsin.spec.recipe import Overlong
from opsin.text.messages import Conversation, assistant, system, user
from opsin.text.render import ImageSpan
from opsin.text.tokenizer import Tokenizer
from opsin.train.prepare import prepare_stage
from opsin.weights.init import on_meta
from train.toy import stage

TINY = {"llava15": "pad", "llava_next": "anyres", "internvl15": "dynamic_tiles", "qwen2_vl": "native"}
RULES: tuple[Overlong, ...] = ("error", "drop", "truncate", "trim_turns", "trim_oldest_turns", "shrink_picture")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return toys.byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class One:
    """A source of one conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation

    def __len__(self) -> int:
        return 1

    def sample(self, index: int, epoch: int) -> Conversation:
        return self.conversation


def load(family: str, tokenizer: Tokenizer, conversation: Conversation, **changes) -> Encoded:
    config = families.family(family).tiny.config
    prepared = prepare_stage(
        stage(**changes),
        module=on_meta(config),
        model=config,
        tokenizer=tokenizer,
        seed=0,
        source=One(conversation),
    )
    return prepared.feed.load(0, 0)


def talk(num_exchanges: int = 4, *, size: tuple[int, int] = (120, 90)) -> Conversation:
    """A picture in the first question and one in the last."""
    questions = [user(f"question {number} here") for number in range(num_exchanges)]
    questions[0], questions[-1] = user("what is it?", images=[0]), user("and this?", images=[1])
    answers = [assistant(f"answer {number}") for number in range(num_exchanges)]
    messages = (system("Be kind."), *(m for pair in zip(questions, answers, strict=True) for m in pair))
    return Conversation(messages, (toys.picture(size, seed=1), toys.picture(size, seed=2)), id="a talk")


def test_trimming_takes_whole_exchanges_and_keeps_pictures_and_their_order():
    last = shorter(talk(), "trim_turns")
    assert [[m.text for m in each.messages] for each in last] == [
        ["Be kind.", "what is it?", "answer 0", "question 1 here", "answer 1", "question 2 here", "answer 2"],
        ["Be kind.", "what is it?", "answer 0", "question 1 here", "answer 1"],
        ["Be kind.", "what is it?", "answer 0"],
    ]
    assert [len(each.images) for each in last] == [1, 1, 1]
    oldest = shorter(talk(), "trim_oldest_turns")
    assert [each.messages[1].text for each in oldest] == ["question 1 here", "question 2 here", "and this?"]
    assert [each.messages[1].images for each in oldest] == [(0,), (0,), (0, 1)]
    assert all(len(each.images) == 2 and each.messages[0].text == "Be kind." for each in oldest)


@pytest.mark.parametrize("rule", ["trim_turns", "trim_oldest_turns"])
@pytest.mark.parametrize("family", TINY)
def test_as_few_exchanges_go_as_needed(family, rule, tokenizer):
    conversation = talk(8)
    encoder = Encoder(families.family(family).tiny.config, tokenizer)
    lengths = [encoder.encode(each, mode="train").num_tokens for each in shorter(conversation, rule)]
    assert lengths == sorted(lengths, reverse=True)
    for limit in (lengths[2], lengths[2] - 1):
        sample = load(family, tokenizer, conversation, max_tokens=limit, overlong=rule)
        assert sample.num_tokens == max(length for length in lengths if length <= limit)
        assert sample.notes[-1].startswith("shortened from ")
    with pytest.raises(TooLong, match=r"'a talk' takes .* even with one exchange alone it takes \d+\."):
        load(family, tokenizer, conversation, max_tokens=lengths[-1] - 1, overlong=rule)


@pytest.mark.parametrize("family", ["llava_next", "internvl15", "qwen2_vl"])
def test_pictures_shrink_as_little_as_needed_and_the_text_stays(family, tokenizer):
    conversation = talk(2, size=(230, 90))
    config = families.family(family).tiny.config
    whole = Encoder(config, tokenizer).encode(conversation, mode="train")
    rules = config.resolution.smaller()
    encoders = [Encoder(config.replace(resolution=rule), tokenizer) for rule in rules]
    lengths = [each.encode(conversation, mode="train").num_tokens for each in encoders]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < whole.num_tokens
    for limit in (whole.num_tokens - 1, lengths[-1]):
        sample = load(family, tokenizer, conversation, max_tokens=limit, overlong="shrink_picture")
        assert sample.num_tokens == max(length for length in lengths if length <= limit)
        assert sample.num_tokens - sample.num_image_tokens == whole.num_tokens - whole.num_image_tokens
        assert sample.num_supervised == whole.num_supervised
    with pytest.raises(TooLong, match="even with the smallest pictures it takes"):
        load(family, tokenizer, conversation, max_tokens=lengths[-1] - 1, overlong="shrink_picture")


def test_pictures_of_a_fixed_number_of_tokens_cannot_shrink(tokenizer):
    with pytest.raises(ConfigError, match=r"'only': overlong: shrink_picture does not help: with resolution pad"):
        load("llava15", tokenizer, talk(), overlong="shrink_picture")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", TINY)
def test_no_rule_cuts_through_a_picture_at_any_limit(family, rule, tokenizer):
    """At every limit: the sample fits with whole pictures and something to learn, or it is an error."""
    if family == "llava15" and rule == "shrink_picture":
        return
    conversation = talk(3)
    config = families.family(family).tiny.config
    whole = Encoder(config, tokenizer).encode(conversation, mode="train")
    outcomes = set()
    for limit in (*range(2, whole.num_tokens, 7), whole.num_tokens):
        try:
            sample = load(family, tokenizer, conversation, max_tokens=limit, overlong=rule)
        except DataError as error:
            outcomes.add("error" if "'a talk'" in str(error) else str(error))
            continue
        outcomes.add("fits")
        assert sample.num_tokens <= limit
        assert sum(image.plan.num_slots for image in sample.images) == sample.num_image_tokens
        assert sample.num_image_tokens == 0 or sample.slots[-1] < sample.num_tokens
        assert sample.supervised[1:].any()
        shown = {s.index for n in np.unique(sample.token_spans) if isinstance(s := sample.spans[n], ImageSpan)}
        assert shown == set(range(len(sample.images)))
    assert outcomes == {"fits", "error"}


@pytest.mark.parametrize("family", [*TINY, "llava", "blip2", "qwen_vl"])
def test_lengths_are_known_without_decoding(family, tokenizer):
    encoder = Encoder(families.family(family).tiny.config, tokenizer)
    if family == "blip2":
        conversation = Conversation((user("what?", images=[0]), assistant("a cat")), (toys.picture((90, 70)),))
    else:
        conversation = talk(3, size=(230, 90))
    sizes = [image.size for image in conversation.images]
    assert encoder.measure(conversation, sizes) == encoder.encode(conversation, mode="train").measure


def test_tokens_without_a_conversation_have_no_turns(tokenizer):
    encoded = Encoder(families.family("llava15").tiny.config, tokenizer).encode(talk(), mode="train")
    with pytest.raises(TooLong, match="gives tokens, not a conversation"):
        fit(encoded, None, max_tokens=20, overlong="trim_turns")
