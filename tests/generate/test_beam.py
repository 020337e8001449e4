"""Beam search against transformers', settings by settings, and against enumerating everything."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from opsin import weights
from opsin.encode import Encoded, Encoder
from opsin.errors import GenerationError
from opsin.families.blip2 import TINY, TINY_T5
from opsin.generate import Beams, Chat, Sampling, beam_search, generate
from opsin.generate.beam import search
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.text.messages import Conversation, ask, assistant, user
from opsin.text.tokenizer import Tokenizer

NEWLINE = 5
"""Stands for the id that ends answers of the random models."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return toys.byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def lively(config: VLMConfig, seed: int) -> VLM:
    """Random weights large enough that the likeliest token changes with what stands before it."""
    vlm = weights.build(config, seed=seed).eval()
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if "norm" not in name and name != "decoder.relative.table.weight":
                parameter.mul_(2.5 if isinstance(config.decoder, type(TINY.config.decoder)) else 4.0)
    return vlm


def prompts(config: VLMConfig, tokenizer: Tokenizer) -> list[Encoded]:
    encoder = Encoder(config, tokenizer)
    questions = [("What is this?", (50, 40)), ("Colour?", (42, 42)), ("How many cubes are there?", (30, 60))]
    return [encoder.encode(ask(text, toys.picture(size, index))) for index, (text, size) in enumerate(questions)]


# transformers' cache is as long as the encoder is deep, which crashes where the decoder is deeper.
EVEN_T5 = TINY_T5.replace(decoder=TINY_T5.decoder.replace(num_layers=2))


@pytest.mark.parametrize("config", [TINY.config, EVEN_T5], ids=["opt", "t5"])
def test_beams_are_those_of_transformers(config: VLMConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The exported model, the same ids and pixels, several widths, penalties and least lengths."""
    transformers = pytest.importorskip("transformers")
    vlm = lively(config, seed=5)
    model = weights.Model(vlm, config, "tiny")
    weights.export(tmp_path / "hf", model, layout="hf")
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    samples = prompts(config, tokenizer)
    is_t5 = config is EVEN_T5
    # What is likely somewhere in the middle of an answer ends it, so that both ways to end are met.
    stop = generate(vlm, samples[:1], None, Sampling(max_new_tokens=12))[0].ids[5]
    finished = 0
    for width, penalty, least in itertools.product((1, 3, 5), (1.0, -1.0, 0.0), (0, 4)):
        beams = Beams(
            num_beams=width, max_new_tokens=12, min_new_tokens=least, length_penalty=penalty, stop_ids=(stop,)
        )
        found = beam_search(vlm, samples, None, beams)
        for sample, answer in zip(samples, found, strict=True):
            ids = sample.ids[: sample.encoder_length] if is_t5 else sample.ids
            with torch.no_grad():
                recorded = theirs.generate(
                    pixel_values=unpatched(sample, config),
                    input_ids=torch.from_numpy(ids)[None],
                    attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                    num_beams=width,
                    do_sample=False,
                    max_new_tokens=12,
                    min_new_tokens=least,
                    length_penalty=penalty,
                    eos_token_id=stop,
                    pad_token_id=0,
                    bos_token_id=2,
                    **({"decoder_start_token_id": int(sample.ids[-1])} if is_t5 else {}),
                )[0, 1 if is_t5 else len(ids) :].tolist()
            wanted = recorded[: recorded.index(stop) + 1] if stop in recorded else recorded
            assert list(answer.ids) == wanted, (width, penalty, least)
            finished += answer.finish == "stop_token"
    assert 3 < finished < 52, f"both ways to end must have been met, {finished} of 54 stopped"


def unpatched(sample: Encoded, config: VLMConfig) -> torch.Tensor:
    """The pixels (1, 3, H, W) of a sample's picture."""
    side, p = config.vision.side, config.vision.patch_size
    patches = torch.from_numpy(sample.images[0].patches).view(side, side, 3, p, p)
    return patches.permute(2, 0, 3, 1, 4).reshape(1, 3, side * p, side * p)


@pytest.mark.parametrize("config", [TINY.config, TINY_T5], ids=["opt", "t5"])
def test_an_answer_does_not_depend_on_its_company(config: VLMConfig, tokenizer: Tokenizer) -> None:
    vlm, samples = lively(config, seed=7), prompts(config, tokenizer)
    beams = Beams(num_beams=4, max_new_tokens=10, stop_ids=(NEWLINE,))
    together = [answer.ids for answer in beam_search(vlm, samples, None, beams)]
    assert together == [beam_search(vlm, [sample], None, beams)[0].ids for sample in samples]


def test_one_beam_is_greedy(tokenizer: Tokenizer) -> None:
    vlm, samples = lively(TINY.config, seed=9), prompts(TINY.config, tokenizer)
    greedy = generate(vlm, samples, None, Sampling(max_new_tokens=12, stop_ids=(NEWLINE,)))
    one = beam_search(vlm, samples, None, Beams(num_beams=1, max_new_tokens=12, stop_ids=(NEWLINE,)))
    assert [answer.ids for answer in one] == [answer.ids for answer in greedy]


def scripted(table: dict[tuple[int, ...], list[float]]) -> tuple[torch.Tensor, Any]:
    """A model that knows the probabilities of the next token after every sequence."""
    rows: list[tuple[int, ...]] = [()]

    def step(parents: list[int], ids: list[int]) -> torch.Tensor:
        nonlocal rows
        rows = [(*rows[parent], token) for parent, token in zip(parents, ids, strict=True)]
        return torch.tensor([table[row] for row in rows]).log()

    return torch.tensor([table[()]]).log(), step


def test_beams_find_what_greedy_misses() -> None:
    """Token 0 ends. After 1 nothing is likely, after 2 everything is decided."""
    table = {(): [0.0, 0.6, 0.4], (1,): [0.4, 0.3, 0.3], (2,): [0.9, 0.05, 0.05]}
    table |= {row: [1.0, 0.0, 0.0] for row in itertools.product((1, 2), repeat=2)}
    first, step = scripted(table)
    assert search(first, step, Beams(num_beams=1), stop_ids=frozenset([0]), limits=[2])[0][0].ids == (1, 0)
    first, step = scripted(table)
    best = search(first, step, Beams(num_beams=2, length_penalty=0.0), stop_ids=frozenset([0]), limits=[2])[0]
    assert best[0].ids == (2, 0)
    assert best[0].score == pytest.approx(torch.tensor(0.36).log().item())


def test_answers_end_with_a_newline_where_the_format_says_so(tokenizer: Tokenizer) -> None:
    """OPT's newline is text, and one token."""
    vlm, sample = lively(TINY.config, seed=5), prompts(TINY.config, tokenizer)[0]
    newline = tokenizer.encode("\n", "after_control").ids[0]
    with torch.no_grad():
        row = vlm.decoder.embed.weight[newline]
        vlm.decoder.norm.bias += 3 * row / row.square().mean().sqrt()  # every state points a little to the newline
    answer = beam_search(vlm, [sample], tokenizer, Beams(num_beams=3, max_new_tokens=30))[0]
    assert answer.finish == "stop_token"
    assert answer.ids[-1] == newline
    assert "\n" not in answer.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "from 0 to max_new_tokens 3"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Beams(**settings)  # type: ignore[arg-type]


def test_nan_is_an_error_and_not_an_answer(tokenizer: Tokenizer) -> None:
    vlm = weights.build(TINY.config, seed=1).eval()
    with torch.no_grad():
        vlm.decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(GenerationError, match="NaN"):
        beam_search(vlm, prompts(TINY.config, tokenizer)[:1], None, Beams(stop_ids=(NEWLINE,)))


@pytest.mark.parametrize("config", [TINY.config, TINY_T5], ids=["opt", "t5"])
def test_a_chat_may_search_for_its_answers(config: VLMConfig, tokenizer: Tokenizer) -> None:
    vlm, picture = lively(config, seed=7), toys.picture((50, 40), 3)
    model = weights.Model(vlm, config, "tiny")
    model.tokenizer = tokenizer
    beams = Beams(num_beams=3, max_new_tokens=6)
    chat = Chat(model, sampling=beams)
    first = chat.ask("What?", picture)
    second = chat.ask("And?")
    said = (user("What?", images=[0]), assistant(first.text), user("And?"))
    whole = Encoder(config, tokenizer).encode(Conversation(said, (picture,)))
    assert second.ids == beam_search(vlm, [whole], tokenizer, beams)[0].ids
    assert chat.messages[-1].text == second.text


def test_published_settings_are_those_of_the_presets() -> None:
    from opsin import families

    for preset in families.family("blip2").presets:
        beams = Beams(**json.loads(json.dumps(preset.generation)))
        assert (beams.num_beams, beams.max_new_tokens) == (5, 30)
        assert beams.min_new_tokens == (8 if preset.id.endswith("coco") else 1)
