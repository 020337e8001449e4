"""The stream of samples of one stage: which sample comes when, and threads that prepare them ahead of the model."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TypeVar

from opsin.data.ledger import Ledger, LeftOut
from opsin.data.order import derive_seed, generator, modality_grouped, permutation
from opsin.data.overlong import Encode, TooLong, fit
from opsin.data.passes import check_taught
from opsin.data.problems import Placed
from opsin.data.source import Grouped, Source
from opsin.encode import Encoded
from opsin.errors import DataError, MediaError, MessageError, PlanError
from opsin.spec.recipe import Stage
from opsin.text.messages import Conversation

Item = TypeVar("Item")
Result = TypeVar("Result")
Share = Callable[[Sequence[tuple[int, int]]], Sequence[tuple[int, int]]]

BAD_SAMPLE = (DataError, MessageError, MediaError, PlanError)
"""What is wrong with a single sample. Other errors are of the run and stop it whatever `bad_samples` says."""
MAX_TRIES = 1000
"""How many samples are drawn to replace one."""


@dataclass(frozen=True, eq=False, slots=True)
class Loaded:
    """A sample, and the one that it replaces."""

    sample: Encoded
    shortened: bool = False
    left_out: LeftOut | None = None


class Feed:
    """The samples of a stage in training order, a pure function of (seed, epoch, place in the epoch).

    An epoch is cut into steps of `batch.samples`; its last step takes what is left.
    """

    def __init__(
        self,
        source: Source,
        stage: Stage,
        *,
        encode: Encode,
        max_tokens: int,
        seed: int,
        smaller: Sequence[Encode] = (),
    ) -> None:
        """encode: makes a conversation ready for training. max_tokens: longest sample. seed: of the run.

        smaller: like `encode`, with ever smaller pictures, for `overlong: shrink_picture`.
        """
        self.source, self.stage, self.encode, self.max_tokens, self.seed = source, stage, encode, max_tokens, seed
        self.smaller = smaller
        self.found: list[LeftOut] = []
        """What the stream left out since the last step was settled."""
        self.num_shortened = 0
        """Samples that the stream gave so far and that were too long before."""
        self.ledger = Ledger(stage.bad_samples, num_samples=len(source))
        if not len(source):
            raise DataError("the data is empty")
        if stage.sampler == "modality_length" and not isinstance(source, Grouped):
            raise DataError(
                f"the modality_length sampler needs the lengths of samples; {type(source).__name__} has no "
                "modality_lengths()"
            )
        self._order = lru_cache(maxsize=2)(self.order)
        self._lengths = lru_cache(maxsize=2)(self._signed_lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return -(-len(self.source) // self.stage.batch.samples)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        if self.stage.steps is not None:
            return self.stage.steps
        assert self.stage.epochs is not None
        return max(1, round(self.stage.epochs * self.steps_per_epoch))

    def order(self, epoch: int) -> list[int]:
        """The order of one epoch's samples."""
        purpose = (self.stage.name, "order", epoch)
        if self.stage.sampler == "shuffle":
            return permutation(len(self.source), self.seed, *purpose)
        lengths = self._lengths(epoch)
        assert lengths is not None
        return modality_grouped(
            lengths,
            batch_size=self.stage.batch.samples,
            world_size=1,  # the step's samples as a whole are what counts, however they are cut into passes
            random=generator(self.seed, *purpose),
        )

    def _signed_lengths(self, epoch: int) -> Sequence[int] | None:
        """What the sampler knows of lengths and kinds, if it asks."""
        if self.stage.sampler == "modality_length" and isinstance(self.source, Grouped):
            return self.source.modality_lengths(epoch)
        return None

    def step_samples(self, step: int) -> list[tuple[int, int]]:
        """(index, epoch) of the samples of one step, from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.stage.batch.samples
        return [(index, epoch) for index in self._order(epoch)[start : start + self.stage.batch.samples]]

    def load(self, index: int, epoch: int) -> Encoded:
        """Read and encode one sample, shorten it as the stage says, and check it. Raises for a bad one."""
        return self._load(index, epoch).sample

    def _load(self, index: int, epoch: int) -> Loaded:
        given = self.source.sample(index, epoch)
        name = f"{self.stage.name} sample {index} of epoch {epoch}"
        conversation = None
        if isinstance(given, Conversation):
            conversation = given if given.id else replace(given, id=name)
            whole = self.encode(conversation)
        else:
            whole = given if given.name else replace(given, name=name)
        sample = fit(
            whole,
            conversation,
            max_tokens=self.max_tokens,
            overlong=self.stage.overlong,
            encode=self.encode,
            smaller=self.smaller,
        )
        check_taught(sample.name, sample.measure, self.max_tokens)
        return Loaded(sample, shortened=sample is not whole)

    def reserve(self, index: int, epoch: int) -> Iterator[int]:
        """Samples that may stand in for one, in the order in which they are tried.

        They follow from the sample's own number, not from how many were bad before it: so neither threads nor
        processes nor a resumed run need to know of one another. With `modality_length` they are of the same kind.
        """
        lengths = self._lengths(epoch)
        for number in range(MAX_TRIES):
            found = derive_seed(self.seed, self.stage.name, "reserve", epoch, index, number) % len(self.source)
            if found != index and (lengths is None or lengths[found] * lengths[index] > 0):
                yield found

    def load_or_replace(self, step: int, index: int, epoch: int) -> Loaded:
        """`load`, or where the sample is bad and the stage goes on without it, the next good one of its reserve."""
        try:
            return self._load(index, epoch)
        except BAD_SAMPLE as error:
            dropped = isinstance(error, TooLong) and self.stage.overlong == "drop"
            if not dropped and self.stage.bad_samples.policy == "fail":
                raise
            reason = error
        for found in self.reserve(index, epoch):
            try:
                loaded = self._load(found, epoch)
            except BAD_SAMPLE:
                continue  # it is told of where its own turn comes
            left_out = LeftOut(
                stage=self.stage.name,
                step=step + 1,
                epoch=epoch,
                sample=index,
                why="dropped" if dropped else "skipped",
                where=self._where(index, epoch),
                kind=reason.kind or "record",
                reason=str(reason),
                replacement=found,
                replacement_where=loaded.sample.name,
            )
            return replace(loaded, left_out=left_out)
        raise DataError(f"{reason} No other sample could take its place: none of {MAX_TRIES} that were drawn is good.")

    def stream(self, first_step: int, *, workers: int, share: Share = tuple) -> Generator[Encoded, None, None]:
        """All samples from `first_step` to the end, one by one. Nothing before `first_step` is read.

        share: which of the samples of a step to read; all, where one process trains.
        What is left out waits in `found` until the step is settled.
        """
        steps = range(first_step, self.num_steps)
        places = ((step, *place) for step in steps for place in share(self.step_samples(step)))
        depth = self.stage.batch.samples + workers
        with closing(ahead(places, lambda p: self.load_or_replace(*p), workers=workers, depth=depth)) as loaded:
            for each in loaded:
                if each.left_out is not None:
                    self.found.append(each.left_out)
                self.num_shortened += each.shortened
                yield each.sample

    def settle(self, step: int, found: Iterable[LeftOut] | None = None) -> list[LeftOut]:
        """Enter what was left out of a step in the ledger, in the order of the step's samples.

        found: of all processes, where each reads a part of the step; this one's own when not given.
        Raises DataError when it is more than may be.
        """
        place = {index: number for number, (index, _) in enumerate(self.step_samples(step))}
        entries = sorted(self.found if found is None else found, key=lambda entry: place[entry["sample"]])
        self.found = []
        for entry in entries:
            self.ledger.add(entry)
        return entries

    def _where(self, index: int, epoch: int) -> str:
        if isinstance(self.source, Placed):
            return self.source.where(index, epoch)
        return f"{self.stage.name} sample {index} of epoch {epoch}"


def ahead(
    items: Iterator[Item], function: Callable[[Item], Result], *, workers: int, depth: int
) -> Generator[Result, None, None]:
    """map(function, items), in order, with `workers` threads working on the next `depth` items.

    Threads are enough: decoding and resizing of pictures release Python's lock. With 0 workers nothing is done ahead.
    """
    if not workers:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="opsin-data") as pool:
        pending: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(items, depth))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(items, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
