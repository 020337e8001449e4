"""Tables that are longer or shorter in a file than in the model that starts from it: vocabularies and positions.

A model that is made of published parts has tokens of its own (InternVL adds nine to InternLM2, BLIP-2 one to BERT), and
a tower may read larger pictures than before.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from opsin.nn.positions import resize_table
from opsin.spec.rules import Layout, Rename, Reshape
from opsin.weights.files import Checkpoint
from opsin.weights.rules import Renamer, Shape

WORDS = ("decoder.embed.weight", "decoder.head.weight", "words.weight", "captions.bias")
POSITIONS = "vision.positions"


def as_stored(layout: Layout, checkpoint: Checkpoint, shapes: Mapping[str, Shape]) -> tuple[Layout, dict[str, Shape]]:
    """The layout and our shapes as they would be if the model's tables were as long as the checkpoint's."""
    stored, renamer = dict(shapes), Renamer(layout)
    for name in (*WORDS, POSITIONS):
        match = renamer.from_target(name) if name in shapes else None
        entry = checkpoint.entries.get(match.source) if match is not None else None
        if match is None or entry is None:
            continue
        own = shapes[name]
        if isinstance(match.rule, Reshape):
            rule = match.rule
            rows = math.prod(entry.shape) // own[-1]
            if entry.shape == (1, rows, *own[1:]):
                stored[name] = (rows, *own[1:])
                changed = rule.replace(source_shape=entry.shape, target_shape=stored[name])
                layout = layout.replace(rules=tuple(changed if each == rule else each for each in layout.rules))
        elif isinstance(match.rule, Rename) and entry.shape[1:] == own[1:] and len(entry.shape) == len(own):
            stored[name] = entry.shape
    return layout, stored


def put(own: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    """Copy what a file holds to `own[name]`, which may have more or fewer rows.

    Words: surplus rows are left behind; rows that are new keep their random numbers where they are read and become the
    mean of the others where they are written (InternVL's internvl_chat_finetune.py). Positions are resized, as LAVIS
    does it: bicubic, the class token's kept where the tower has one.
    """
    target = own[name]
    if target.shape == tensor.shape:
        target.copy_(tensor)
        return
    if name == POSITIONS:
        # A table of a square has one row more where a class token stands in front.
        first, kept = (len(table) - math.isqrt(len(table)) ** 2 for table in (tensor, target))
        side = math.isqrt(len(target))
        target[:kept].copy_(tensor[:kept])
        target[kept:].copy_(resize_table(tensor[first:].float(), (side, side)))
        return
    count = min(len(target), len(tensor))
    target[:count].copy_(tensor[:count])
    written = name == "decoder.head.weight" or (name == "decoder.embed.weight" and "decoder.head.weight" not in own)
    if written and len(target) > count:
        target[count:].copy_(tensor.to(torch.float32).mean(dim=0))
