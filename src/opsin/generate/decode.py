"""Decoding, the plain readable loop: prefill once, then one token per sequence and step.

    prompts --pad right--> hidden (B, T, D) --last token of each row--> logits --sample--> ids
                              |                                           ^                  |
                            cache  <------------ hidden (B, 1, D) --------+------------------+

Keys and values of every token are kept in the cache, because all later tokens look at them; queries are not, because
only their own token needs them. Rows are ragged, so nobody pads a prompt, and a finished sequence leaves the batch.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opsin.collate import pad
from opsin.encode import Encoded
from opsin.errors import GenerationError
from opsin.generate.sampling import Randomness, Sampling, sample
from opsin.generate.stops import AnswerText, Stops
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache, decode_dtype
from opsin.nn.seq2seq import Seq2Seq
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.text.tokenizer import Tokenizer

Finish = Literal["stop_token", "stop_string", "length"]
"""Why an answer ended: a stop token, a stop string, or no room for more (`max_new_tokens`, or the model's context)."""

PREFILL_TOKENS = 1024
"""Most tokens of several prompts that a CPU runs at once; a longer prompt runs alone.

A processor gains nothing from more. Each layer's results (27 MB for an MLP of 2,816 in bfloat16, eight prompts of 608
tokens) then no longer fit its caches, and are fresh memory, which the system clears page by page: 472,000 page faults
and 0.8 s of 15.6 s of one core, where groups of this size had none and took 15.1 s.
"""


@dataclass(frozen=True)
class Usage:
    """Tokens of one prompt and its answer."""

    text_tokens: int
    """Of the prompt, pictures not counted."""
    image_tokens: int
    """Slots that the prompt's pictures take."""
    new_tokens: int
    """Sampled, a stop token included."""


@dataclass(frozen=True)
class Answer:
    """One finished answer."""

    text: str
    """Without stop tokens and stop strings, and without white space around it. Empty without a tokenizer."""
    ids: tuple[int, ...]
    """Everything that was sampled, a stop token included."""
    finish: Finish
    usage: Usage
    prompt: int
    """Which of the prompts it answers."""
    sequence: int
    """Which of the answers to that prompt it is."""
    prefill_seconds: float
    """Until the first token of the batch."""
    decode_seconds: float
    """From then to this answer's last token."""


class Chunk(NamedTuple):
    """One sampled token."""

    row: int
    """Which answer, in the order of `generate`'s list."""
    id: int
    text: str
    """Text that became certain with it; may be empty."""
    answer: Answer | None
    """The whole answer, with its last token."""


def generate(
    vlm: VLM,
    encoded: Sequence[Encoded],
    tokenizer: Tokenizer | None,
    sampling: Sampling = Sampling(),
    *,
    cache: KVCache | None = None,
) -> list[Answer]:
    """Answer some prompts, side by side; every answer is what the prompt alone would get.

    encoded: from `Encoder.encode(mode="prompt")`, of any lengths and numbers of pictures. tokenizer: None for answers
    that are ids alone; the format's stop tokens are then unknown, so name them in `sampling.stop_ids`.
    cache: row i holds the first `cache.lengths[i]` tokens of prompt i, and only the rest is run. Rows of finished
    answers leave it; with a single one it holds in the end the prompt and every sampled id but the last.
    Returns the answers prompt by prompt, `sampling.num_sequences` of each. Raises GenerationError.
    """
    chunks = stream(vlm, encoded, tokenizer, sampling, cache=cache)
    answers = {chunk.row: chunk.answer for chunk in chunks if chunk.answer is not None}
    return [answers[index] for index in sorted(answers)]


def stream(
    vlm: VLM,
    encoded: Sequence[Encoded],
    tokenizer: Tokenizer | None,
    sampling: Sampling = Sampling(),
    *,
    cache: KVCache | None = None,
) -> Iterator[Chunk]:
    """Like `generate`, token by token as they come. Closing the iterator ends the work."""
    sequences = [
        sequence
        for number, prompt in enumerate(encoded)
        for sequence in open_answers(vlm.config, prompt, tokenizer, sampling, number=number)
    ]
    return _decode(vlm, encoded, sampling, sequences, cache)


@dataclass
class OpenAnswer:
    """An answer in the making."""

    text_tokens: int
    image_tokens: int
    prompt: int
    number: int
    limit: int
    stops: Stops
    text: AnswerText
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def push(self, token_id: int) -> Finish | None:
        """Add a sampled id; its text is the last of `pieces`. Returns why the answer ends here, if it does."""
        self.ids.append(token_id)
        if token_id in self.stops.ids:
            self.pieces.append(self.text.finish())
            return "stop_token"
        piece, stopped = self.text.push(token_id)
        if stopped:
            self.pieces.append(piece)
            return "stop_string"
        ends = len(self.ids) == self.limit
        self.pieces.append(piece + self.text.finish() if ends else piece)
        return "length" if ends else None

    def answer(self, finish: Finish, prefill_seconds: float, decode_seconds: float) -> Answer:
        return Answer(
            text="".join(self.pieces),
            ids=tuple(self.ids),
            finish=finish,
            usage=Usage(self.text_tokens, self.image_tokens, len(self.ids)),
            prompt=self.prompt,
            sequence=self.number,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
        )


def open_answers(
    config: VLMConfig, prompt: Encoded, tokenizer: Tokenizer | None, sampling: Sampling, *, number: int = 0
) -> list[OpenAnswer]:
    """The answers to a prompt, before their first token. number: which of the prompts it is.

    Raises GenerationError for a prompt that leaves no room for an answer.
    """
    stops = Stops.of(config.chat, tokenizer, ids=sampling.stop_ids, strings=sampling.stop_strings)
    room = config.decoder.max_positions - prompt.num_tokens
    if room < 1:
        raise GenerationError(
            f"the prompt {prompt.name!r} takes {prompt.num_tokens} tokens, which leaves no room for an answer: the "
            f"model was trained for {config.decoder.max_positions}. Shorten it or leave out pictures."
        )
    return [
        OpenAnswer(
            len(prompt.ids) - prompt.num_image_tokens,
            prompt.num_image_tokens,
            prompt=number,
            number=sequence,
            limit=min(sampling.max_new_tokens, room),
            stops=stops,
            text=AnswerText(tokenizer, stops.strings),
        )
        for sequence in range(sampling.num_sequences)
    ]


@torch.inference_mode()
def _decode(
    vlm: VLM, encoded: Sequence[Encoded], sampling: Sampling, sequences: list[OpenAnswer], cache: KVCache | None
) -> Iterator[Chunk]:
    if not encoded:
        return
    started = time.perf_counter()
    randomness = Randomness(sampling.seed, [sequence.number for sequence in sequences])
    logits, cache = prefill(vlm, encoded, cache, room=max(sequence.limit for sequence in sequences))
    rows = [sequence.prompt for sequence in sequences]
    if sampling.num_sequences > 1:
        cache.select(rows)
        logits = logits[rows]
    positions = next_positions(encoded, logits.device)[rows]
    seen = seen_ids(encoded, logits)[rows] if sampling.repetition_penalty != 1 else None
    active = list(range(len(sequences)))
    prefilled: float | None = None
    while True:
        uniform = randomness.uniform(active).to(logits.device) if sampling.temperature > 0 else None
        ids = sample(logits, sampling, seen=seen, uniform=uniform)
        values = ids.tolist()
        now = time.perf_counter()
        prefilled = prefilled or now
        _check_finite(logits, [sequences[index] for index in active], encoded)
        keep = []
        for place, (index, value) in enumerate(zip(active, values, strict=True)):
            sequence = sequences[index]
            finish = sequence.push(value)
            answer = finish and sequence.answer(finish, prefilled - started, now - prefilled)
            if answer is None:
                keep.append(place)
            yield Chunk(index, value, sequence.pieces[-1], answer)
        if not keep:
            return
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        if len(keep) < len(active):
            active = [active[place] for place in keep]
            cache.select(keep)
            ids, positions = ids[keep], positions[keep]
            seen = None if seen is None else seen[keep]
        logits = run_one_token(vlm, ids, positions, cache)
        positions += 1


def run_one_token(vlm: VLM, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    """Run the sampled ids (B,) at positions (B, 1, A) behind the cache's rows. Returns logits (B, V) after them."""
    documents = tuple((row, 0, 1) for row in range(len(ids)))
    return vlm.logits(vlm.hidden(Batch(ids[:, None], positions, documents=documents), cache)[:, 0])


def next_positions(encoded: Sequence[Encoded], device: torch.device) -> Tensor:
    """(prompts, 1, A): where the first token of each prompt's answer stands."""
    after = torch.tensor([[prompt.positions.max() + 1] for prompt in encoded], device=device)
    return after[:, :, None].expand(-1, -1, encoded[0].positions.shape[1]).contiguous()


def prefill(vlm: VLM, encoded: Sequence[Encoded], cache: KVCache | None, *, room: int) -> tuple[Tensor, KVCache]:
    """Run what of the prompts is not in the cache. Returns logits (prompts, V) after each prompt's last token.

    On a CPU that is done in groups of neighbouring prompts, see `PREFILL_TOKENS`.
    """
    weight = vlm.decoder.embed.weight
    if cache is None:
        cache = KVCache(
            vlm.config.decoder,
            batch_size=len(encoded),
            capacity=max(prompt.num_tokens for prompt in encoded) + room,
            dtype=decode_dtype(weight.dtype, weight.device),
            device=weight.device,
        )
    lengths = [prompt.num_tokens - length for prompt, length in zip(encoded, cache.lengths, strict=True)]
    # What an encoder reads of all rows is one block of memory, so its prompts stay together.
    is_split = weight.device.type == "cpu" and not isinstance(vlm.decoder, Seq2Seq)
    groups = _neighbours(lengths, max_tokens=PREFILL_TOKENS) if is_split else [slice(0, len(encoded))]
    if len(groups) == 1:
        return _prefill(vlm, encoded, cache), cache
    cache.reserve(max(cache.lengths) + max(lengths))
    logits = torch.cat([_prefill(vlm, encoded[rows], cache.rows(rows)) for rows in groups])
    cache.advance(lengths)
    return logits, cache


def _prefill(vlm: VLM, encoded: Sequence[Encoded], cache: KVCache) -> Tensor:
    device = vlm.decoder.embed.weight.device
    batch = pad([rest(prompt, length) for prompt, length in zip(encoded, cache.lengths, strict=True)]).to(device)
    last = [row * batch.ids.shape[1] + length - 1 for row, length in enumerate(batch.lengths)]
    return vlm.logits(vlm.hidden(batch, cache, wanted=torch.tensor(last, device=device)))


def _neighbours(lengths: Sequence[int], *, max_tokens: int) -> list[slice]:
    """Neighbouring rows in groups, each of one row or of at most `max_tokens` tokens, padding included."""
    groups, start, longest = [], 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > start and longest * (row + 1 - start) > max_tokens:
            groups.append(slice(start, row))
            start, longest = row, length
    return [*groups, slice(start, len(lengths))]


def rest(encoded: Encoded, start: int) -> Encoded:
    """A prompt without its first `start` tokens, which must not end inside a picture; positions stay as they are."""
    if start == 0:
        return encoded
    assert start < encoded.num_tokens, "at least one token must be run: logits come after it"
    first_slot = int(np.searchsorted(encoded.slots, start))
    ends = np.cumsum([image.plan.num_slots for image in encoded.images])
    assert first_slot in (0, *ends), f"token {start} lies inside a picture"
    return replace(
        encoded,
        ids=encoded.ids[start:],
        supervised=encoded.supervised[start:],
        positions=encoded.positions[start:],
        slots=encoded.slots[first_slot:] - start,
        slot_rows=encoded.slot_rows[first_slot:],
        images=encoded.images[int(np.searchsorted(ends, first_slot, side="right")) :],
        token_spans=encoded.token_spans[start:],
        encoder_length=max(0, encoded.encoder_length - start),
    )


def seen_ids(encoded: Sequence[Encoded], logits: Tensor) -> Tensor:
    """(prompts, V) bool: ids in the text of each prompt. What stands at picture slots is no text."""
    seen = torch.zeros(len(encoded), logits.shape[-1], dtype=torch.bool)
    for row, prompt in enumerate(encoded):
        seen[row, np.delete(prompt.ids, prompt.slots)] = True
    return seen.to(logits.device)


def _check_finite(logits: Tensor, sequences: Sequence[OpenAnswer], encoded: Sequence[Encoded]) -> None:
    for sequence, top in zip(sequences, logits.amax(dim=-1).tolist(), strict=True):
        if not math.isfinite(top):
            raise not_finite(top, sequence, encoded[sequence.prompt].name or f"{sequence.prompt + 1}")


def not_finite(top: float, sequence: OpenAnswer, name: str) -> GenerationError:
    """The error for logits whose largest, `top`, is no number. name: of the prompt."""
    return GenerationError(
        f"the model gave {top} instead of numbers after {len(sequence.ids)} new tokens for prompt {name!r}. float16 "
        "overflows with some models: use bfloat16 or float32; otherwise the weights are damaged.",
        kind="not_finite",
    )
