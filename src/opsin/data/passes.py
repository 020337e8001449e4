"""From encoded samples to passes through the model: what a sample must be, and which samples go together."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from opsin.encode import Encoded
from opsin.errors import DataError
from opsin.spec.recipe import BatchSize


def check_sample(encoded: Encoded, *, max_tokens: int, overlong: Literal["error", "truncate"]) -> Encoded:
    """The sample, shortened where the stage allows it. Raises DataError, naming it, when it cannot be trained on."""
    if encoded.num_tokens > max_tokens:
        encoded = _shorten(encoded, max_tokens, overlong)
    # The first token has nothing before it to be predicted from.
    if not encoded.supervised[1:].any():
        raise DataError(
            f"sample {encoded.name!r} has no token to learn among its {encoded.num_tokens}: its answers are empty, "
            f"or were cut off at {max_tokens} tokens. Leave it out of the data."
        )
    return encoded


def _shorten(encoded: Encoded, max_tokens: int, overlong: Literal["error", "truncate"]) -> Encoded:
    counts = (
        f"sample {encoded.name!r} takes {encoded.num_tokens} tokens ({encoded.num_image_tokens} of them of "
        f"{len(encoded.images)} pictures); the stage's limit is {max_tokens}"
    )
    if overlong == "error":
        raise DataError(f"{counts}. Raise max_tokens, or set overlong: truncate to cut the ends of such conversations.")
    if encoded.num_image_tokens and encoded.slots[-1] >= max_tokens:
        raise DataError(f"{counts}, and cutting there would cut a picture. Raise max_tokens, or leave the sample out.")
    kept = slice(max_tokens)
    return replace(
        encoded,
        ids=encoded.ids[kept],
        supervised=encoded.supervised[kept],
        positions=encoded.positions[kept],
        token_spans=encoded.token_spans[kept],
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
