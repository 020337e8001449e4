"""Beam search: several answers are kept at once, and each step keeps the likeliest of all their continuations.

    prompts --> logits --log softmax--> score of each beam + its next token --the best--> beams --> logits ...
                                                                                 |
                                                         with a stop token: finished, score / length^penalty

What is kept, finished and given up follows transformers 5, so that the same settings mean the same: of the best twice
`num_beams` continuations those with a stop token finish if they are among the first `num_beams`, and the first others
go on; a prompt is done when none of its beams could beat its worst finished answer at the present length.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opsin.encode import Encoded
from opsin.errors import GenerationError
from opsin.generate.decode import Answer, Chunk, Usage, prefill
from opsin.generate.stops import AnswerText, Stops
from opsin.nn.batch import Batch
from opsin.nn.vlm import VLM
from opsin.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Beams:
    """How answers are searched for. Raises GenerationError for settings that mean nothing."""

    num_beams: int = 5
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    """Tokens that stand before a stop token at least."""
    length_penalty: float = 1.0
    """An answer's score is the sum of its log probabilities divided by its length to this power: above 0 long answers
    gain, below 0 short ones do."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer, besides the stop tokens of the model's chat format."""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise GenerationError(f"num_beams is {self.num_beams}; it must be at least 1")
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise GenerationError(
                f"min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens {self.max_new_tokens}"
            )
        if not math.isfinite(self.length_penalty):
            raise GenerationError(f"length_penalty is {self.length_penalty}; it must be a number")


@dataclass(frozen=True)
class Hypothesis:
    """One answer, finished or in the making."""

    score: float
    """Sum of log probabilities; of a finished one divided by its length to the power of the penalty."""
    ids: tuple[int, ...] = ()


Step = Callable[[list[int], list[int]], Tensor]
"""(rows, ids) -> logits (len(rows), V): go on with these rows of the step before, each with one more token."""


def beam_search(
    vlm: VLM, encoded: Sequence[Encoded], tokenizer: Tokenizer | None, beams: Beams = Beams()
) -> list[Answer]:
    """The best answer to each prompt, which is the one that the prompt alone would get.

    encoded: from `Encoder.encode(mode="prompt")`. tokenizer: None for answers that are ids alone; the format's stop
    tokens are then unknown, so name them in `beams.stop_ids`. Raises GenerationError.
    """
    started = time.perf_counter()
    chat, most = vlm.config.chat, vlm.config.decoder.max_positions
    stops = Stops.of(chat, tokenizer, ids=(*beams.stop_ids, *_stop_string_ids(chat.stop_strings, tokenizer)))
    room = [most - prompt.num_tokens for prompt in encoded]
    if min(room, default=1) < 1:
        raise GenerationError(f"a prompt leaves no room for an answer: the model was trained for {most} tokens")
    with torch.inference_mode():
        logits, cache = prefill(vlm, encoded, None, room=beams.max_new_tokens)
        prefilled = time.perf_counter()
        starts = torch.tensor([[prompt.positions.max() + 1] for prompt in encoded], device=logits.device)
        num_axes = encoded[0].positions.shape[1]
        positions = starts[:, :, None].expand(-1, -1, num_axes).contiguous()

        def step(rows: list[int], ids: list[int]) -> Tensor:
            nonlocal positions
            cache.select(rows)
            positions = positions[rows]
            tokens = torch.tensor(ids, device=logits.device)[:, None]
            documents = tuple((row, 0, 1) for row in range(len(rows)))
            hidden = vlm.hidden(Batch(tokens, positions, documents=documents), cache)
            positions = positions + 1
            return vlm.logits(hidden[:, 0])

        limits = [min(beams.max_new_tokens, left) for left in room]
        found = search(logits, step, beams, stop_ids=stops.ids, limits=limits)
    done = time.perf_counter()
    answers = []
    for number, (prompt, hypotheses) in enumerate(zip(encoded, found, strict=True)):
        best = hypotheses[0]
        answers.append(
            Answer(
                text=_text(best.ids, tokenizer, stops),
                ids=best.ids,
                finish="stop_token" if best.ids[-1] in stops.ids else "length",
                usage=Usage(prompt.num_tokens - prompt.num_image_tokens, prompt.num_image_tokens, len(best.ids)),
                prompt=number,
                sequence=0,
                prefill_seconds=prefilled - started,
                decode_seconds=done - prefilled,
            )
        )
    return answers


def beam_stream(
    vlm: VLM, encoded: Sequence[Encoded], tokenizer: Tokenizer | None, beams: Beams = Beams()
) -> Iterator[Chunk]:
    """`beam_search` in the form of `decode.stream`: one chunk for each answer, since none is sure before its end."""
    for row, answer in enumerate(beam_search(vlm, encoded, tokenizer, beams)):
        yield Chunk(row, answer.ids[-1], answer.text, answer)


def search(
    logits: Tensor, step: Step, beams: Beams, *, stop_ids: frozenset[int], limits: Sequence[int]
) -> list[list[Hypothesis]]:
    """The finished answers of each prompt, best first.

    logits: (prompts, V) after each prompt, whose row numbers the first call of `step` goes on from. limits: longest
    answer to each prompt.
    """
    searches = [_Search(beams, stop_ids, limit) for limit in limits]
    active = list(range(len(searches)))
    rows_of = {index: [index] for index in active}
    while True:
        scores = logits.float().log_softmax(dim=-1)
        if scores.isnan().any():
            raise GenerationError(
                "the model gave NaN or infinity instead of numbers. float16 overflows with some models: use bfloat16 "
                "or float32; otherwise the weights are damaged"
            )
        parents: list[int] = []
        ids: list[int] = []
        for index in active:
            chosen = searches[index].advance(scores[rows_of[index]])
            parents += [rows_of[index][beam] for beam, _ in chosen]
            ids += [token for _, token in chosen]
            rows_of[index] = list(range(len(ids) - len(chosen), len(ids)))
        active = [index for index in active if rows_of[index]]
        if not active:
            return [each.finished for each in searches]
        logits = step(parents, ids)


@dataclass
class _Search:
    """The beams of one prompt."""

    beams: Beams
    stop_ids: frozenset[int]
    limit: int
    running: list[Hypothesis] = field(default_factory=lambda: [Hypothesis(0.0)])
    finished: list[Hypothesis] = field(default_factory=list)
    """At most `num_beams`, best first."""

    def advance(self, scores: Tensor) -> list[tuple[int, int]]:
        """One step. scores: (beams, V) log probabilities of the next token of each running answer.

        Returns (beam, token) of the answers that run on; nothing where the prompt is done.
        """
        width = self.beams.num_beams
        length = len(self.running[0].ids) + 1
        if length <= self.beams.min_new_tokens and self.stop_ids:
            scores = scores.index_fill(1, torch.tensor(sorted(self.stop_ids), device=scores.device), -torch.inf)
        sums = scores + scores.new_tensor([each.score for each in self.running])[:, None]
        count = min(max(2, 1 + len(self.stop_ids)) * width, sums.numel())
        best, places = sums.flatten().topk(count)
        candidates = [
            (score, *divmod(place, scores.shape[1]))
            for score, place in zip(best.tolist(), places.tolist(), strict=True)
        ]
        going_on: list[tuple[int, int]] = []
        running: list[Hypothesis] = []
        for rank, (score, beam, token) in enumerate(candidates):
            ids = (*self.running[beam].ids, token)
            if token in self.stop_ids or length == self.limit:
                if rank < width:
                    self._finish(Hypothesis(score / length**self.beams.length_penalty, ids))
            elif len(running) < width:
                running.append(Hypothesis(score, ids))
                going_on.append((beam, token))
        self.running = running
        return going_on if running and self._may_improve(length) else []

    def _finish(self, answer: Hypothesis) -> None:
        self.finished = sorted([*self.finished, answer], key=lambda each: -each.score)[: self.beams.num_beams]

    def _may_improve(self, length: int) -> bool:
        """Whether a running answer, if it ended now, would be better than the worst that is finished.

        A single beam is greedy: it ends with its first stop token.
        """
        if len(self.finished) < self.beams.num_beams:
            return True
        if self.beams.num_beams == 1:
            return False
        return self.running[0].score / length**self.beams.length_penalty > self.finished[-1].score


def _stop_string_ids(strings: Sequence[str], tokenizer: Tokenizer | None) -> list[int]:
    """Ids of stop strings that are one token, such as OPT's newline: a beam ends with them as with a stop token."""
    if tokenizer is None:
        return []
    spelt = [tokenizer.encode(text, "after_control").ids for text in strings]
    return [ids[0] for ids in spelt if len(ids) == 1]


def _text(ids: Sequence[int], tokenizer: Tokenizer | None, stops: Stops) -> str:
    text = AnswerText(tokenizer, stops.strings)
    pieces = []
    for token in ids:
        if token in stops.ids:
            break
        piece, stopped = text.push(token)
        pieces.append(piece)
        if stopped:
            return "".join(pieces)
    return "".join(pieces) + text.finish()
