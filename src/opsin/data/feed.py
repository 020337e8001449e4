"""The stream of samples of one stage: which sample comes when, and threads that prepare them ahead of the model."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import TypeVar

from opsin.data.order import generator, modality_grouped, permutation
from opsin.data.passes import check_sample
from opsin.data.source import Grouped, Source
from opsin.encode import Encoded
from opsin.errors import DataError
from opsin.spec.recipe import Stage
from opsin.text.messages import Conversation

Item = TypeVar("Item")
Result = TypeVar("Result")


class Feed:
    """The samples of a stage in training order, a pure function of (seed, epoch, place in the epoch).

    An epoch is cut into steps of `batch.samples`; its last step takes what is left.
    """

    def __init__(
        self,
        source: Source,
        stage: Stage,
        *,
        encode: Callable[[Conversation], Encoded],
        max_tokens: int,
        seed: int,
    ) -> None:
        """encode: makes a conversation ready for training. max_tokens: longest sample. seed: of the run."""
        self.source, self.stage, self.encode, self.max_tokens, self.seed = source, stage, encode, max_tokens, seed
        if not len(source):
            raise DataError("the data is empty")
        if stage.sampler == "modality_length" and not isinstance(source, Grouped):
            raise DataError(
                f"the modality_length sampler needs the lengths of samples; {type(source).__name__} has no "
                "modality_lengths()"
            )
        self._order = lru_cache(maxsize=2)(self.order)

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
        assert isinstance(self.source, Grouped)
        return modality_grouped(
            self.source.modality_lengths(epoch),
            batch_size=self.stage.batch.samples,
            world_size=1,  # the step's samples as a whole are what counts, however they are cut into passes
            random=generator(self.seed, *purpose),
        )

    def step_samples(self, step: int) -> list[tuple[int, int]]:
        """(index, epoch) of the samples of one step, from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.stage.batch.samples
        return [(index, epoch) for index in self._order(epoch)[start : start + self.stage.batch.samples]]

    def load(self, index: int, epoch: int) -> Encoded:
        """Read, encode and check one sample."""
        sample = self.source.sample(index, epoch)
        name = f"{self.stage.name} sample {index} of epoch {epoch}"
        if isinstance(sample, Conversation):
            sample = self.encode(sample if sample.id else replace(sample, id=name))
        elif not sample.name:
            sample = replace(sample, name=name)
        return check_sample(sample, max_tokens=self.max_tokens, overlong=self.stage.overlong)

    def stream(self, first_step: int, *, workers: int) -> Generator[Encoded, None, None]:
        """All samples from `first_step` to the end, one by one. Nothing before `first_step` is read."""
        places = (place for step in range(first_step, self.num_steps) for place in self.step_samples(step))
        return ahead(places, lambda place: self.load(*place), workers=workers, depth=self.stage.batch.samples + workers)


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
