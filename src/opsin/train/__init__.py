"""Floor 5: training runs.

Names are looked up on first use, so that importing this package does not import torch.
"""

from typing import TYPE_CHECKING

from opsin.lazy import lookup

if TYPE_CHECKING:
    from opsin.train.config import read_run as read_run
    from opsin.train.loop import Row as Row
    from opsin.train.objectives import Loss as Loss
    from opsin.train.objectives import Objective as Objective
    from opsin.train.objectives import next_token as next_token
    from opsin.train.objectives import next_token_from as next_token_from
    from opsin.train.runner import RunResult as RunResult
    from opsin.train.runner import run as run
    from opsin.train.runner import train_stage as train_stage
    from opsin.train.stop import StopRequest as StopRequest

_HOMES = {
    "read_run": "config",
    "Row": "loop",
    "Loss": "objectives",
    "Objective": "objectives",
    "next_token": "objectives",
    "next_token_from": "objectives",
    "RunResult": "runner",
    "run": "runner",
    "train_stage": "runner",
    "StopRequest": "stop",
}

__getattr__ = lookup(__name__, _HOMES)
