"""From encoded samples to passes through the model: what a sample must be, and which samples go together."""

from collections.abc import Iterable, Iterator

from opsin.encode import Encoded, Measure
from opsin.errors import DataError
from opsin.spec.recipe import BatchSize


def check_taught(name: str, measure: Measure, max_tokens: int) -> None:
    """Raise DataError for a sample, by its name, that teaches nothing."""
    if not measure.num_supervised:
        named = f"sample {name!r}" if name else "it"
        raise DataError(
            f"{named} has no token to learn among its {measure.num_tokens}: its answers "
            f"are empty, or were cut off at {max_tokens} tokens. Leave it out of the data.",
            kind="nothing_taught",
        )


def passes(samples: Iterable[Encoded], batch: BatchSize) -> Iterator[list[Encoded]]:
    """The samples of one step, in order, in groups that fit one pass. Nothing is held back longer than a group."""
    group: list[Encoded] = []
    for sample in samples:
        if group and not _fits([*group, sample], batch):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _fits(group: list[Encoded], batch: BatchSize) -> bool:
    if batch.micro_samples is not None and len(group) > batch.micro_samples:
        return False
    lengths = [sample.num_tokens for sample in group]
    tokens = sum(lengths) if batch.form == "pack" else len(group) * max(lengths)
    return batch.micro_tokens is None or tokens <= batch.micro_tokens
