"""The model before run.yaml: a pretrained tower, and a connector and a language model that know nothing."""

from pathlib import Path

from experiments.nlvr.model import config
from safetensors.torch import load_file
from torch import nn

from opsin import weights
from opsin.demo.fit import spread_normal_
from opsin.text.tokenizer import load_tokenizer


def write_start(folder: Path, *, tower: Path, tokenizer: Path, seed: int) -> int:
    """Write the model; returns its number of parameters. The language model starts as the demo's did."""
    words = load_tokenizer(tokenizer)
    description = config(words)
    vlm = weights.build(description, seed=seed)
    vlm.vision.load_state_dict(load_file(tower))
    nn.init.normal_(vlm.decoder.embed.weight, std=0.5)
    for name, tensor in vlm.decoder.layers.named_parameters():
        if tensor.ndim == 2:
            spread_normal_(tensor, 0.3 if name.endswith(("out.weight", "down.weight")) else 1.0)
    weights.save_native(folder, vlm, description, words)
    return sum(tensor.numel() for tensor in vlm.parameters())
