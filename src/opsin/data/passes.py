"""From encoded samples to passes through the model: what a sample must be, and which samples go together."""

from collections.abc import Iterable, Iterator

from opsin.encode import Encoded
from opsin.errors import DataError
from opsin.spec.recipe import BatchSize


def check_taught(encoded: Encoded, *, max_tokens: int) -> Encoded:
    """The sample. Raises DataError, naming it, when it teaches nothing."""
    # The first token has nothing before it to be predicted from.
    if not encoded.supervised[1:].any():
        raise DataError(
            f"sample {encoded.name!r} has no token to learn among its {encoded.num_tokens}: its answers are empty, "
            f"or were cut off at {max_tokens} tokens. Leave it out of the data.",
            kind="nothing_taught",
        )
    return encoded


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
