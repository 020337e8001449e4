"""A model, conversations and stages small enough that a run of several stages takes a second."""

import json
from pathlib import Path
from typing import Any

import torch

import toys
from opsin import families, weights
from opsin.data.source import Source
from opsin.spec.recipe import RunConfig, Stage
from opsin.text.messages import Conversation, assistant, user
from opsin.weights import Model


class DrawnSource:
    """Conversations made from their number: mostly about a picture, of different lengths, some of text alone."""

    def __init__(self, length: int, *, with_text: bool = True, fingerprint: str = "drawn") -> None:
        self.length = length
        self.with_text = with_text
        self.fingerprint = fingerprint
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, epoch: int) -> Conversation:
        self.asked.append((index, epoch))
        answer = "abcdefgh"[index % 8] * (1 + 5 * (index % 4))
        if self.with_text and index % 5 == 4:
            return Conversation((user(f"spell {index}"), assistant(answer)), id=f"text {index}")
        picture = toys.picture((40 + 7 * (index % 3), 40), seed=index)
        return Conversation((user("what?", images=[0]), assistant(answer)), (picture,), id=f"picture {index}")

    def modality_lengths(self, epoch: int) -> list[int]:
        return [-(i % 7 + 1) if self.with_text and i % 5 == 4 else i % 7 + 1 for i in range(self.length)]


def write_conversations(folder: Path, count: int) -> None:
    """`data.json`, in LLaVA's shape, about pictures in `images`, and a tokenizer beside them."""
    toys.tokenizer_folder(folder / "tokenizer")
    (folder / "images").mkdir()
    records = []
    for number in range(count):
        toys.picture((40, 30), seed=number).save(folder / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "abc" * (number + 1)}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def tiny_model(folder: Path, family: str = "llava15", *, seed: int = 0) -> Model:
    """A family's tiny preset with random weights and a tokenizer of bytes."""
    config = families.family(family).tiny.config
    vlm = weights.build(config, seed=seed)
    return Model(vlm=vlm, config=config, name="tiny", tokenizer_folder=toys.tokenizer_folder(folder / "tokenizer"))


def stage(**changes: Any) -> Stage:
    """A stage that trains connector and decoder; `changes` as in a run file."""
    data: dict[str, Any] = {
        "name": "only",
        "trainable": ["connector", "decoder"],
        "batch": {"samples": 4},
        "optim": {"kind": "adamw", "lr": 1e-3},
        "steps": 3,
    }
    return Stage.parse({**data, **changes}, where="test")


def two_stages(output: Path, **changes: Any) -> RunConfig:
    """Connector alone, then connector and decoder, with packing, accumulation and short epochs: 4 + 7 steps."""
    data = {
        "model": "llava-1.5-tiny",
        "output": str(output),
        "seed": 3,
        "device": "cpu",
        "workers": 1,
        "checkpoint": {"every": 3, "keep": 2},
        "stages": [
            {
                "name": "first",
                "trainable": ["connector"],
                "chat": "plain",
                "batch": {"samples": 4, "micro_tokens": 60},
                "optim": {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1},
                "epochs": 2,
            },
            {
                "name": "second",
                "trainable": ["connector", "decoder"],
                "sampler": "modality_length",
                "batch": {"samples": 4, "micro_samples": 3},
                "optim": {"kind": "muon", "lr": 1e-2, "rest": {"lr": 1e-3}},
                "steps": 7,
            },
        ],
    }
    return RunConfig.parse({**data, **changes}, where="test")


def two_sources() -> dict[str, Source]:
    """Data for `two_stages`: the first epoch of the second stage ends in mid-stage, with a short step."""
    return {"first": DrawnSource(8, with_text=False), "second": DrawnSource(18)}


def tensors_of(model: Model) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in model.vlm.state_dict().items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same to the bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
