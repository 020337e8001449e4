"""Twenty steps of opsin's trainer, packed and accumulated, against a plain loop around transformers' own model.

Both begin from the same weights and see the same samples in the same steps. The plain loop is what one would write by
hand: rows padded on the right, labels of -100 where nothing is taught, the model's own loss, `clip_grad_norm_`,
`torch.optim.AdamW` and transformers' schedule.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import toys
from opsin import families, weights
from opsin.encode import Encoded
from opsin.spec.connector import LinearConnector
from opsin.spec.recipe import AdamW, Stage
from opsin.spec.vision import VisionConfig
from opsin.text.messages import Conversation
from opsin.train.loop import StageLoop
from opsin.train.objectives import next_token
from opsin.train.prepare import prepare_stage
from opsin.verify.run import write_for_transformers
from opsin.verify.theirs import class_name, to_tiles
from opsin.weights import Model
from train.toy import DrawnSource, stage

STEPS = 20
WARMUP = 0.1
IGNORED = -100
# float32 on both sides. Measured: losses within 2e-7, norms within 8e-7.
CLOSE = 1e-5
Inputs = dict[str, Tensor]


class Shapes(DrawnSource):
    """Pictures of several shapes, which anyres and native resolution lay out differently."""

    def sample(self, index: int, epoch: int) -> Conversation:
        one = super().sample(index, epoch)
        size = [(40, 40), (90, 30), (28, 84), (61, 47)][index % 4]
        return replace(one, images=tuple(toys.picture(size, seed=index) for _ in one.images))


def tiles(vision: VisionConfig, samples: Sequence[Encoded]) -> Inputs:
    return {"pixel_values": torch.cat([to_tiles(image, vision) for one in samples for image in one.images])}


def mosaic(vision: VisionConfig, samples: Sequence[Encoded]) -> Inputs:
    """LLaVA-NeXT: (pictures, most tiles, 3, H, W), filled up with tiles that `image_sizes` leave out."""
    images = [image for one in samples for image in one.images]
    pictures = [to_tiles(image, vision) for image in images]
    sizes = torch.tensor([image.plan.size[::-1] for image in images])
    return {"pixel_values": pad_sequence(pictures, batch_first=True), "image_sizes": sizes}


def patches(vision: VisionConfig, samples: Sequence[Encoded]) -> Inputs:
    images = [image for one in samples for image in one.images]
    kinds = [F.one_hot(torch.from_numpy(one.slots), len(one.ids)).sum(0) for one in samples]
    return {
        "pixel_values": torch.cat([torch.from_numpy(image.patches) for image in images]),
        "image_grid_thw": torch.cat([torch.from_numpy(image.grids) for image in images]),
        "mm_token_type_ids": pad_sequence(kinds, batch_first=True),
    }


def padded_batch(samples: Sequence[Encoded]) -> Inputs:
    ids = [torch.from_numpy(one.ids) for one in samples]
    labels = [i.masked_fill(~torch.from_numpy(one.supervised), IGNORED) for i, one in zip(ids, samples, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


@dataclass(frozen=True)
class Case:
    """One family's tiny preset, and what trains."""

    preset: str
    pictures: Callable[[VisionConfig, Sequence[Encoded]], Inputs]
    trainable: tuple[str, ...]
    frozen_there: tuple[str, ...] = ()
    """Beginnings of the frozen tensors' names in transformers."""
    with_text: bool = True
    """Every step has a picture too: without one, theirs would not age the optimizer's averages of the connector."""


CASES = {
    # transformers' connector has two layers; its second is the identity and stays so.
    "llava": Case(
        "llava-tiny", tiles, ("connector", "decoder"), ("model.vision_tower", "model.multi_modal_projector.linear_2")
    ),
    "llava-1.5": Case("llava-1.5-tiny", tiles, ("connector", "decoder"), ("model.vision_tower",)),
    "llava-next": Case("llava-next-tiny", mosaic, ("vision", "connector", "newline", "decoder")),
    # The norm between tower and Q-Former trains; transformers counts it to the tower.
    "blip2 stage 2": Case("blip2-tiny", tiles, ("connector",), ("vision_model.e", "language_model."), with_text=False),
    "internvl-1.5": Case("internvl-1.5-tiny", tiles, ("vision", "connector", "decoder")),
    "qwen2-vl": Case("qwen2-vl-tiny", patches, ("vision", "connector", "decoder")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twenty_steps_follow_the_curve_of_a_plain_loop_in_transformers(case, tmp_path):
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    transformers = pytest.importorskip("transformers", minversion="5")
    config, folder = families.preset(case.preset).config, tmp_path / "hf"
    model = write_for_transformers(Model(weights.build(config, seed=1), config, case.preset), folder)
    if not isinstance(config.connector, LinearConnector):
        model = weights.load(folder)  # what the layout changes (transformers' count of unpadded rows) holds for both
    tokenizer = toys.byte_tokenizer(tmp_path / "tokenizer")
    one = stage(
        trainable=list(case.trainable),
        steps=STEPS,
        batch={"samples": 5, "micro_tokens": 150},
        optim={"kind": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        schedule={"kind": "cosine", "warmup_ratio": WARMUP},
    )
    source = Shapes(23, with_text=case.with_text)
    prepared = prepare_stage(one, module=model.vlm, model=model.config, tokenizer=tokenizer, seed=0, source=source)
    feed = prepared.feed
    steps = [[feed.load(*place) for place in feed.step_samples(step)] for step in range(STEPS)]
    batches = [padded_batch(samples) | case.pictures(model.config.vision, samples) for samples in steps]
    theirs = getattr(transformers, class_name(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(not name.startswith(case.frozen_there))
    expected = plain_loop(transformers, theirs, one, batches)

    rows = list(StageLoop(model.vlm, feed, trainable=prepared.trainable, objective=next_token).rows())
    assert max(row["passes"] for row in rows) > 1
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in expected], rel=CLOSE)
    assert [row["grad_norm"] for row in rows] == pytest.approx([norm for _, norm in expected], rel=CLOSE)
    assert rows[-1]["loss"] < rows[0]["loss"]


def plain_loop(transformers: Any, model: Any, one: Stage, batches: Sequence[Inputs]) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each step."""
    assert isinstance(one.optim, AdamW)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": one.optim.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=one.optim.lr)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, round(WARMUP * len(batches)), len(batches))
    done = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, one.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        done.append((float(loss.detach()), float(norm)))
    return done
