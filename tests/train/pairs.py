"""A tiny stage-1 model, pairs for it, and what one of two processes does with them.

A module of its own, because a spawned process must be able to import what it runs.
"""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from opsin import weights
from opsin.families.blip2 import TINY_RETRIEVER
from opsin.nn.retriever import Retriever
from opsin.spec.qformer import TextControls
from opsin.train.stage1 import Pairs, gather_with_gradient, stage1_losses

CONFIG = TINY_RETRIEVER.replace(controls=TextControls(first="<s>", last="</s>", caption="<unk>"))
"""With the control tokens of the byte tokenizer."""


def model(seed: int = 1) -> Retriever:
    retriever = weights.build_retriever(CONFIG, seed=seed)
    retriever.vision.requires_grad_(False)
    return retriever


def pairs(count: int = 5, *, image_ids: list[int] | None = None, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (count,), generator=generator)
    valid = torch.arange(7) < lengths[:, None]
    ids = torch.randint(20, 380, (count, 7), generator=generator).masked_fill(~valid, 0)
    patches = torch.randn(count * 9, 3 * 14 * 14, generator=generator)
    known = None if image_ids is None else torch.tensor(image_ids)
    return Pairs(patches, torch.tensor([[1, 3, 3]] * count), ids, valid, known)


def gather(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        x = torch.tensor([[1.0 + rank], [10.0 + rank]], requires_grad=True)
        everything = gather_with_gradient(x)
        (everything * torch.tensor([[1.0], [2.0], [3.0], [4.0]]) * (rank + 1)).sum().backward()
        assert x.grad is not None
        # Texts of different widths: 7 tokens here, 5 there.
        given = pairs(3, seed=rank)
        if rank:
            given = given._replace(ids=given.ids[:, :5], valid=given.valid[:, :5])
        result = stage1_losses(model(), given, caption_id=1, generator=torch.Generator().manual_seed(0))
        found = {"all": everything.detach(), "grad": x.grad, "loss": result.total.detach()[None]}
        found |= {"weights": result.steps["neg_weights_i2t"]}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, Path(folder) / f"{rank}.safetensors")
    finally:
        dist.destroy_process_group()
