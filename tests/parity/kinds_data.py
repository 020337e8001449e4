"""Runners of recorded cases about the order of data."""

from collections.abc import Callable

import torch

from opsin.data.order import length_grouped, modality_grouped
from parity.case import Case


def run_sampler(case: Case) -> None:
    """Orders of whole epochs, exact. Lengths carry the modality in their sign."""
    for number, row in enumerate(case.json("rows.json")):
        with torch.random.fork_rng():
            # The reference shuffles inside each modality with torch's own stream, even where it is given a generator.
            torch.manual_seed(row["torch_manual_seed"])
            seed = row["generator_seed"]
            given = None if seed is None else torch.Generator().manual_seed(seed)
            sizes = {"batch_size": row["batch_size"], "world_size": row["world_size"]}
            if row["kind"] == "modality":
                order = modality_grouped(row["lengths"], random=None, outer_random=given, **sizes)
            elif row["kind"] == "length":
                order = length_grouped(row["lengths"], random=given, **sizes)
            else:
                raise AssertionError(f"row {number}: unknown kind of order {row['kind']!r}")
        assert order == row["indices"], f"row {number}: the order differs from the recorded one"


RUNNERS: dict[str, Callable[[Case], None]] = {"sampler": run_sampler}
