"""A model folder as a process loads it that never saw the model: `python -m opsin.verify.reload FOLDER RESULT`.

The parent computes the logits of one prompt with the model at hand; the child loads the folder, encodes the same prompt
with the folder's own files, and hands its ids and logits back.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from opsin import weights
from opsin.collate import pad
from opsin.errors import WeightError
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.text.tokenizer import Tokenizer
from opsin.verify import ours
from opsin.weights import Model

RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Largest difference, as a share of the largest logit; in half precision 0.01. The same bits are expected: a difference
comes from kernels that sum in no fixed order."""


@torch.inference_mode()
def answer(vlm: VLM, config: VLMConfig, tokenizer: Tokenizer | None) -> dict[str, torch.Tensor]:
    """Ids and logits of one prompt with a drawn picture; given ids where there is no tokenizer."""
    sample = ours.encode(config, tokenizer, None, None)
    hidden = vlm.hidden(pad([sample]).to(vlm.decoder.embed.weight.device))[0]
    logits = vlm.logits(hidden[-ours.NUM_LOGITS :])
    return {"ids": torch.from_numpy(sample.ids), "logits": logits.float().cpu()}


def reread(folder: Path, model: Model) -> float:
    """Load a folder in a fresh process and return the largest difference of its logits from the model's.

    The prompt is encoded with the folder's config on both sides: settings that a layout cannot express are another
    matter, which an export reports. Raises WeightError where the process fails or computes something else.
    """
    here = answer(model.vlm, weights.describe(str(folder)), model.tokenizer if model.has_tokenizer else None)
    with TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.safetensors"
        command = [sys.executable, "-m", "opsin.verify.reload", str(folder), str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise WeightError(f"{folder} does not load in a fresh process: {last}")
        there = load_file(result)
    if not torch.equal(here["ids"], there["ids"]):
        raise WeightError(f"{folder}: the same prompt gives other ids with the files that were written")
    error = compare(here["logits"], there["logits"])
    allowed = RELATIVE.get(model.vlm.decoder.embed.weight.dtype, 1e-2) * float(here["logits"].abs().max())
    if not error <= allowed:
        raise WeightError(f"{folder} computes other logits in a fresh process: {error:.3g} off, {allowed:.3g} allowed")
    return error


def compare(here: torch.Tensor, there: torch.Tensor) -> float:
    """Largest difference."""
    return float((here - there).abs().max())


def main(folder: str, result: str) -> None:
    """The child."""
    model = weights.load(folder)
    save_file(answer(model.vlm, model.config, model.tokenizer if model.has_tokenizer else None), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
