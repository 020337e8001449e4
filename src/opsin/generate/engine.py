"""Continuous batching: prompts join while others are being answered, and each leaves when its answer ends.

    submit --waiting--> prefill, alone --join--> [ rows of one cache ] --sample a token each--> events
                                                     |      ^
                                                   leave    one forward for all

A prompt is run by itself, so nothing of its company is in its first token. From then on its row is ragged beside the
others (`nn.cache`), draws from its own random numbers and has its own settings: every answer is the one that
`generate` gives for the prompt alone. Nothing here is safe for several threads; one of them owns the engine.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opsin.encode import Encoded
from opsin.errors import GenerationError
from opsin.generate.decode import (
    Answer,
    OpenAnswer,
    next_positions,
    not_finite,
    open_answers,
    prefill,
    run_one_token,
    seen_ids,
)
from opsin.generate.sampling import Randomness, Sampling, sample
from opsin.nn.cache import KVCache
from opsin.nn.vlm import VLM
from opsin.text.tokenizer import Tokenizer

FIRST_ROOM = 256
"""Tokens of an answer that a new row has room for at once; the cache doubles for those that grow longer."""


class Token(NamedTuple):
    """One sampled token."""

    ticket: int
    sequence: int
    """Which of the answers to its prompt."""
    text: str
    """Text that became certain with it; may be empty."""
    answer: Answer | None
    """The whole answer, with its last token."""


class Failure(NamedTuple):
    """A prompt whose answers end here, all of them, because something went wrong."""

    ticket: int
    error: Exception


@dataclass(frozen=True, eq=False)
class _Waiting:
    ticket: int
    prompt: Encoded
    sampling: Sampling
    answers: list[OpenAnswer]


@dataclass(frozen=True, eq=False)
class _Row:
    ticket: int
    name: str
    """Of the prompt."""
    sampling: Sampling
    answer: OpenAnswer
    randomness: Randomness
    started: float
    prefilled: float


class Engine:
    """Answers many prompts at once, in steps."""

    def __init__(self, vlm: VLM, tokenizer: Tokenizer | None, *, max_rows: int = 8) -> None:
        """max_rows: answers that are drawn side by side; further prompts wait."""
        self.vlm = vlm
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self._next_ticket = 0
        self._waiting: deque[_Waiting] = deque()
        self._rows: list[_Row] = []
        self._state: _State | None = None

    @property
    def num_waiting(self) -> int:
        """Prompts that have not been run yet."""
        return len(self._waiting)

    @property
    def num_rows(self) -> int:
        """Answers in the making."""
        return len(self._rows)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._rows and not self._waiting

    def submit(self, prompt: Encoded, sampling: Sampling) -> int:
        """Line a prompt up. Returns its ticket. Raises GenerationError for what could never be answered."""
        if sampling.num_sequences > self.max_rows:
            raise GenerationError(
                f"{sampling.num_sequences} answers to one prompt are asked for; at most {self.max_rows} are drawn side "
                "by side. Ask for fewer, several times"
            )
        answers = open_answers(self.vlm.config, prompt, self.tokenizer, sampling)
        ticket = self._next_ticket
        self._next_ticket += 1
        self._waiting.append(_Waiting(ticket, prompt, sampling, answers))
        return ticket

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Forget a prompt and free what it takes. One that has ended, or is unknown, is no error."""
        self._waiting = deque(each for each in self._waiting if each.ticket != ticket)
        self._leave([place for place, row in enumerate(self._rows) if row.ticket != ticket])

    @torch.inference_mode()
    def step(self) -> list[Token | Failure]:
        """Let one waiting prompt join, if there is room, and draw one token for every open answer.

        Prompts join in the order in which they came, one at a step, so that long ones hold up the others' tokens once.
        Never raises: what goes wrong with one prompt is its own failure, what goes wrong with a step is everyone's.
        """
        events: list[Token | Failure] = []
        if self._waiting and len(self._rows) + len(self._waiting[0].answers) <= self.max_rows:
            entry = self._waiting.popleft()
            try:
                self._join(entry)
            except Exception as error:
                events.append(Failure(entry.ticket, error))
        try:
            self._draw(events)
        except Exception as error:
            events += [Failure(ticket, error) for ticket in dict.fromkeys(row.ticket for row in self._rows)]
            self._leave([])
        return events

    def _join(self, entry: _Waiting) -> None:
        """Run a prompt and put its answers beside the others."""
        started = time.perf_counter()
        room = min(max(answer.limit for answer in entry.answers), FIRST_ROOM)
        logits, cache = prefill(self.vlm, [entry.prompt], None, room=room)
        positions, seen = next_positions([entry.prompt], logits.device), seen_ids([entry.prompt], logits)
        new = _State(cache, logits, positions, seen)
        if len(entry.answers) > 1:
            new.select([0] * len(entry.answers))
        if self._state is None:
            self._state = new
        else:
            self._state.join(new)
        prefilled = time.perf_counter()
        self._rows += [
            _Row(
                entry.ticket,
                entry.prompt.name,
                entry.sampling,
                answer,
                Randomness(entry.sampling.seed, [answer.number]),
                started,
                prefilled,
            )
            for answer in entry.answers
        ]

    def _draw(self, events: list[Token | Failure]) -> None:
        """One token for every row, told by `events`; rows that go on are run with it."""
        self._drop_what_is_no_number(events)
        if self._state is None:
            return
        ids = self._sample(self._state)
        values, now = ids.tolist(), time.perf_counter()
        keep = []
        for place, (row, value) in enumerate(zip(self._rows, values, strict=True)):
            finish = row.answer.push(value)
            answer = finish and row.answer.answer(finish, row.prefilled - row.started, now - row.prefilled)
            events.append(Token(row.ticket, row.answer.number, row.answer.pieces[-1], answer))
            if answer is None:
                keep.append(place)
        self._state.see(ids)
        self._leave(keep)
        if self._state is not None:
            self._state.run(self.vlm, ids[keep])

    def _drop_what_is_no_number(self, events: list[Token | Failure]) -> None:
        """A prompt whose logits are not finite fails, all of its answers; nothing could be drawn from them."""
        if self._state is None:
            return
        failed: set[int] = set()
        for row, top in zip(self._rows, self._state.logits.amax(dim=-1).tolist(), strict=True):
            if not math.isfinite(top) and row.ticket not in failed:
                failed.add(row.ticket)
                events.append(Failure(row.ticket, not_finite(top, row.answer, row.name)))
        self._leave([place for place, row in enumerate(self._rows) if row.ticket not in failed])

    def _sample(self, state: "_State") -> Tensor:
        """The next id of every row: (rows,). Rows with the same settings are drawn together."""
        groups: dict[tuple[float | int | None, ...], list[int]] = {}
        for place, row in enumerate(self._rows):
            how = row.sampling
            groups.setdefault((how.temperature, how.top_k, how.top_p, how.repetition_penalty), []).append(place)
        ids = torch.empty(len(self._rows), dtype=torch.int64, device=state.logits.device)
        for places in groups.values():
            uniform = None
            if self._rows[places[0]].sampling.temperature > 0:
                numbers = [self._rows[place].randomness.uniform([0]) for place in places]
                uniform = torch.cat(numbers).to(ids.device)
            how = self._rows[places[0]].sampling
            ids[places] = sample(state.logits[places], how, seen=state.seen[places], uniform=uniform)
        return ids

    def _leave(self, keep: list[int]) -> None:
        """Keep the rows of these places; the others are freed."""
        if len(keep) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in keep]
        if not keep:
            self._state = None
        elif self._state is not None:
            self._state.select(keep)


@dataclass(eq=False)
class _State:
    """The tensors of the rows."""

    cache: KVCache
    logits: Tensor
    """(rows, V) that the next ids are drawn from."""
    positions: Tensor
    """(rows, 1, A) where they will stand."""
    seen: Tensor
    """(rows, V) bool: ids in the text of the prompt and in the answer so far."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep `rows`, in that order; naming one twice forks it."""
        index = list(rows)
        self.cache.select(index)
        self.logits, self.positions, self.seen = self.logits[index], self.positions[index], self.seen[index]

    def join(self, other: "_State") -> None:
        """Add the rows of another state behind these."""
        self.cache.join(other.cache)
        self.logits = torch.cat([self.logits, other.logits])
        self.positions = torch.cat([self.positions, other.positions])
        self.seen = torch.cat([self.seen, other.seen])

    def see(self, ids: Tensor) -> None:
        """Remember the drawn ids (rows,)."""
        self.seen.scatter_(1, ids[:, None], True)

    def run(self, vlm: VLM, ids: Tensor) -> None:
        """Run the drawn ids of the rows that are left."""
        self.logits = run_one_token(vlm, ids, self.positions, self.cache)
        self.positions = self.positions + 1
