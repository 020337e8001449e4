"""Scores of given answers are what stepping through them by hand gives."""

import pytest
import torch

from opsin import families, weights
from opsin.collate import pad
from opsin.encode import Encoder
from opsin.errors import MessageError
from opsin.generate.score import encode_answer, score
from opsin.text.messages import Conversation, ask, assistant
from toys import byte_tokenizer, picture


@pytest.fixture(params=[each.tiny.id for each in families.FAMILIES if each.name not in ("qwen_vl", "blip2")])
def encoder(request, tmp_path) -> Encoder:
    return Encoder(families.preset(request.param).config, byte_tokenizer(tmp_path))


def sharp(config):
    vlm = weights.build(config, seed=1)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.mul_(3)
    return vlm


def with_answer(question, answer, *pictures):
    asked = ask(question, *pictures)
    return Conversation((*asked.messages, assistant(answer)), asked.images)


def test_the_sum_is_that_of_the_answers_own_tokens(encoder):
    vlm = sharp(encoder.config)
    conversation = with_answer("What?", "a cat", picture((60, 40)))
    encoded = encode_answer(encoder, conversation)
    (found,) = score(vlm, [encoded])
    said = "".join(encoder.tokenizer.decode([int(each)]) for each in encoded.ids[encoded.supervised])
    assert said.strip() == "a cat", "nothing of the format's after it"
    with torch.no_grad():
        logits = vlm.logits(vlm.hidden(pad([encoded])))[0].double().log_softmax(-1)
    taught = encoded.supervised.nonzero()[0]
    assert found.num_tokens == len(taught)
    wanted = sum(float(logits[at - 1, encoded.ids[at]]) for at in taught)
    assert found.log_probability == pytest.approx(wanted, rel=1e-5)
    assert not found.is_greedy


def test_every_answer_of_a_batch_gets_what_it_gets_alone(encoder):
    vlm = sharp(encoder.config)
    asked = [
        encode_answer(encoder, with_answer("What?", "a cat", picture((60, 40)))),
        encode_answer(encoder, with_answer("And now, what is it that you see?", "two")),
        encode_answer(encoder, with_answer("Which?", "a very long answer", picture((30, 80), 1))),
    ]
    together = score(vlm, asked)
    for one, encoded in zip(together, asked, strict=True):
        (alone,) = score(vlm, [encoded])
        assert one.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
        assert (one.is_greedy, one.num_tokens) == (alone.is_greedy, alone.num_tokens)


def test_what_the_model_would_say_itself_is_greedy(tmp_path, monkeypatch):
    encoder = Encoder(families.preset("qwen2-vl-tiny").config, byte_tokenizer(tmp_path))
    vlm = sharp(encoder.config)
    (favoured,) = encoder.tokenizer.encode("a", "after_control").ids
    real = vlm.logits

    def favour(hidden):
        logits = real(hidden)
        logits[..., favoured] += 1000
        return logits

    monkeypatch.setattr(vlm, "logits", favour)
    flags = [score(vlm, [encode_answer(encoder, with_answer("What?", text))])[0].is_greedy for text in ("aaa", "aab")]
    assert flags == [True, False]


def test_an_empty_answer_is_certain_and_no_answer_is_an_error(tmp_path):
    encoder = Encoder(families.preset("qwen2-vl-tiny").config, byte_tokenizer(tmp_path))
    (found,) = score(sharp(encoder.config), [encode_answer(encoder, with_answer("What?", ""))])
    assert (found.log_probability, found.is_greedy, found.num_tokens) == (0.0, True, 0)
    with pytest.raises(MessageError, match="no answer to score"):
        encode_answer(encoder, ask("What?"))
