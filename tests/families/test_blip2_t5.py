"""FlanT5 behind the model's four methods: what every family must pass, on BLIP-2's second tiny model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import toys
from opsin import weights
from opsin.collate import pack, pad
from opsin.encode import Encoded, Encoder
from opsin.families.blip2 import TINY_T5
from opsin.generate import Chat, Sampling, generate
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.vlm import VLM
from opsin.text.messages import Conversation, assistant, user
from opsin.text.tokenizer import Tokenizer
from opsin.train.trainable import choose, idle_tensors, set_trainable

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, with the control tokens of T5."""
    return toys.byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return weights.build(TINY_T5, seed=1).eval()


def conversations() -> list[Conversation]:
    return [
        Conversation(
            (
                user("What is this?", images=[0]),
                assistant("a red ball"),
                user("And this?", images=[1]),
                assistant("two cubes, one left, one right"),
            ),
            (toys.picture((60, 35), 1), toys.picture((31, 77), 2)),
        ),
        Conversation((user("Colour?", images=[0]), assistant("blue")), (toys.picture((42, 42), 3),)),
        Conversation((user("Say 'no'."), assistant("no"))),
    ]


def encoded(tokenizer: Tokenizer) -> list[Encoded]:
    encoder = Encoder(TINY_T5, tokenizer)
    return [encoder.encode(conversation, mode="train") for conversation in conversations()]


def test_the_last_answer_is_the_decoders_and_all_else_the_encoders(tokenizer: Tokenizer) -> None:
    sample = encoded(tokenizer)[0]
    ids, controls = sample.ids.tolist(), tokenizer.controls
    text = tokenizer.decode([i for place, i in enumerate(ids[: sample.encoder_length]) if place not in sample.slots])
    assert text == "Question: What is this? Short answer: a red ball. Question: And this? Short answer:"
    assert ids[sample.encoder_length - 1] == controls["</s>"]
    assert ids[sample.encoder_length] == controls["<pad>"]
    assert tokenizer.decode(ids[sample.encoder_length :]) == "two cubes, one left, one right"
    assert ids[-1] == controls["</s>"]
    assert sample.supervised.nonzero()[0].tolist() == list(range(sample.encoder_length + 1, len(ids)))
    assert sample.slots[:6].tolist() == list(range(6))


def test_prompt_ids_are_a_prefix_of_training_ids(tokenizer: Tokenizer) -> None:
    encoder = Encoder(TINY_T5, tokenizer)
    for conversation in conversations():
        asked = Conversation(conversation.messages[:-1], conversation.images)
        prompt, training = encoder.encode(asked), encoder.encode(conversation, mode="train")
        assert training.ids[: prompt.num_tokens].tolist() == prompt.ids.tolist()
        assert training.encoder_length == prompt.encoder_length == prompt.num_tokens - 1
        assert training.supervised[prompt.num_tokens]


@torch.no_grad()
def test_batched_packed_and_single_are_one(vlm: VLM, tokenizer: Tokenizer) -> None:
    samples = encoded(tokenizer)
    padded, packed_ = vlm.hidden(pad(samples)), vlm.hidden(pack(samples))[0]
    start = 0
    for row, sample in enumerate(samples):
        alone = vlm.hidden(pad([sample]))[0]
        torch.testing.assert_close(padded[row, : sample.num_tokens], alone, **TOLERANCE)
        torch.testing.assert_close(packed_[start : start + sample.num_tokens], alone, **TOLERANCE)
        start += sample.num_tokens


@torch.no_grad()
def test_cached_equals_uncached_at_every_step(vlm: VLM, tokenizer: Tokenizer) -> None:
    """Answers of different lengths behind prompts of different lengths, two tokens of each with the prompt."""
    samples, steps = encoded(tokenizer), 3
    full = [vlm.hidden(pad([sample]))[0] for sample in samples]
    starts = [sample.num_tokens - steps for sample in samples]
    cache = KVCache(TINY_T5.decoder, batch_size=len(samples), capacity=2, dtype=torch.float32)
    prompts = pad(samples)
    documents = tuple((row, 0, stop) for row, stop in enumerate(starts))
    width = max(starts)
    batch = Batch(
        prompts.ids[:, :width],
        prompts.positions[:, :width],
        documents,
        encoder_lengths=prompts.encoder_lengths,
        patches=prompts.patches,
        grids=prompts.grids,
        slots=torch.cat([torch.from_numpy(s.slots) + row * width for row, s in enumerate(samples)]),
        slot_rows=prompts.slot_rows,
    )
    vlm.hidden(batch, cache)
    for step in range(steps):
        places = [start + step for start in starts]
        ids = torch.tensor([[int(s.ids[place])] for s, place in zip(samples, places, strict=True)])
        one = Batch(ids, torch.zeros(len(ids), 1, 1, dtype=torch.int64), tuple((row, 0, 1) for row in range(len(ids))))
        hidden = vlm.hidden(one, cache)
        for row, place in enumerate(places):
            torch.testing.assert_close(hidden[row, 0], full[row][place], **TOLERANCE)


def test_nothing_crosses_packed_documents(vlm: VLM, tokenizer: Tokenizer) -> None:
    batch = pack(encoded(tokenizer))
    embedded = vlm.embed(batch).detach().requires_grad_()
    _, start, stop = batch.documents[1]
    vlm.decoder(embedded, batch=batch)[0, start:stop].square().sum().backward()
    assert embedded.grad is not None
    assert (embedded.grad[0, :start] == 0).all()
    assert (embedded.grad[0, stop:] == 0).all()
    assert (embedded.grad[0, start:stop] != 0).any()


def test_both_layouts_and_our_own_give_every_tensor_back(vlm: VLM, tmp_path: Path) -> None:
    weights.save_native(tmp_path / "native", vlm, TINY_T5)
    model = weights.load(tmp_path / "native")
    assert model.config == TINY_T5
    for layout in ("original", "hf"):
        report = weights.export(tmp_path / layout, model, layout=layout)
        assert report.changed == ()
        loaded = weights.load(tmp_path / layout)
        assert loaded.config == TINY_T5
        for name, tensor in vlm.state_dict().items():
            assert torch.equal(loaded.vlm.state_dict()[name], tensor), name


def test_a_tiny_t5_overfits_and_then_says_what_it_learnt(tokenizer: Tokenizer) -> None:
    vlm = weights.build(TINY_T5, seed=3)
    samples = encoded(tokenizer)
    batch = pack(samples)
    trained = set_trainable(vlm, choose(vlm, ("connector", "decoder"), idle=idle_tensors(vlm, TINY_T5)))
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3, weight_decay=0.0)
    places, targets = batch.targets()
    for _ in range(150):
        loss = F.cross_entropy(vlm.logits(vlm.hidden(batch).flatten(0, 1)[places]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    assert {name for name, p in vlm.named_parameters() if p.grad is not None} == set(trained)
    encoder = Encoder(TINY_T5, tokenizer)
    prompts = [encoder.encode(Conversation(c.messages[:-1], c.images)) for c in conversations()]
    answers = generate(vlm.eval(), prompts, tokenizer, Sampling(max_new_tokens=40))
    assert [answer.text for answer in answers] == [c.messages[-1].text for c in conversations()]
    assert {answer.finish for answer in answers} == {"stop_token"}


def test_a_second_question_reads_everything_again(vlm: VLM, tokenizer: Tokenizer) -> None:
    """An encoder's states depend on all it reads, so that only a whole prompt can be kept."""
    model = weights.Model(vlm, TINY_T5, "tiny")
    model.tokenizer = tokenizer
    sampling = Sampling(max_new_tokens=5)
    chat = Chat(model, sampling=sampling)
    picture = toys.picture((50, 40), 4)
    first = chat.ask("What?", picture)
    second = chat.ask("And?")
    whole = Encoder(TINY_T5, tokenizer).encode(
        Conversation((user("What?", images=[0]), assistant(first.text), user("And?")), (picture,))
    )
    assert second.ids == generate(vlm, [whole], tokenizer, sampling)[0].ids
