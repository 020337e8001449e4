"""One library in one process: reads requests as JSON lines, answers each with one line.

python worker.py opsin|transformers THREADS
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workload import Side


def peak_bytes() -> int:
    """The most memory this process ever had resident, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage, this begins anew with the program, and does not know what its parent took.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_rate() -> float:
    """Bytes a second at which memory is read, the better of two passes over 256 MiB."""
    import torch

    block = torch.ones(2**26)
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        block.sum()
        rates.append(block.nbytes / (time.perf_counter() - started))
    return max(rates[1:])


def main() -> None:
    library, threads = sys.argv[1], sys.argv[2]
    os.environ |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints does not end up among the answers

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    started = time.perf_counter()
    module = importlib.import_module(f"{library}_side")
    imported = time.perf_counter() - started
    side = {"opsin": "OpsinSide", "transformers": "TransformersSide"}[library]
    requests: Side = getattr(module, side)()
    answer({"import": imported})
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("request")
        try:
            if name == "peak":
                answer({"bytes": peak_bytes()})
            elif name == "probe":
                answer({"rate": read_rate()})
            else:
                answer(getattr(requests, name)(**request))
        except Exception:
            answer({"error": traceback.format_exc()})


if __name__ == "__main__":
    main()
