"""transformers at its best on this machine: sdpa attention, a dynamic cache, logits of the last token only.

Decoding is timed both ways once, with `generate` and with a bare loop of forward calls; the faster one is used.
"""

import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LogitsProcessor,
)
from transformers.utils import logging
from workload import Reply, digest, picture

_CLASSES = {
    "llava": (LlavaForConditionalGeneration, LlavaImageProcessorPil),
    "llava_next": (LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil),
}


class _Clock(LogitsProcessor):
    """Notes when `generate` has the logits of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


class TransformersSide:
    """Answers the requests of `workload.Side`."""

    def __init__(self) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model: Any = None
        self.processor: Any = None
        self.ids = torch.zeros(1, 0, dtype=torch.long)
        self.pixels: dict[str, torch.Tensor] = {}
        self.cache: DynamicCache | None = None
        self.ways: dict[int, str] = {}
        """By number of rows, the faster way to decode."""
        self.picture = picture()

    def load(self, folder: str, dtype: str) -> Reply:
        self.model = self.cache = None
        gc.collect()
        model_class, processor_class = _classes(folder)
        self.processor = processor_class.from_pretrained(folder)
        started = time.perf_counter()
        self.model = model_class.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
        return {"seconds": time.perf_counter() - started}

    def prompt(self, ids: list[int]) -> Reply:
        self.pixels = dict(self.processor(self.picture, return_tensors="pt"))
        self.ids = torch.tensor([ids])
        self.ways = {}
        return {}

    @torch.inference_mode()
    def prefill(self, room: int) -> Reply:
        self.cache = None
        started = time.perf_counter()
        self.cache = DynamicCache(config=self.model.config)  # it grows by itself, and needs no room
        output = self._forward(self.ids, past_key_values=self.cache, use_cache=True, **self._pixels())
        first = output.logits[:, -1].argmax(dim=-1).tolist()
        return {"seconds": time.perf_counter() - started, "ids": first}

    @torch.inference_mode()
    def decode(self, rows: int, steps: int) -> Reply:
        assert self.cache is not None
        if self.cache.layers[0].keys.shape[0] != rows:
            self.cache.batch_repeat_interleave(rows)
        prompts = torch.cat([self._row(row) for row in range(rows)])
        trials = {}
        for way in [self.ways[rows]] if rows in self.ways else ["generate", "loop"]:
            self.cache.crop(prompts.shape[1] - 1 - self.cache.get_seq_length())
            trials[way] = (self._generate if way == "generate" else self._loop)(prompts, steps)
        self.ways[rows] = min(trials, key=lambda way: trials[way][0])
        seconds, ids = trials[self.ways[rows]]
        return {"seconds": seconds, "ids": ids.tolist(), "way": self.ways[rows]}

    def _loop(self, prompts: torch.Tensor, steps: int) -> tuple[float, torch.Tensor]:
        times, ids = [], [prompts[:, -1:]]
        for _ in range(steps):
            output = self._forward(ids[-1], past_key_values=self.cache, use_cache=True)
            ids.append(output.logits[:, -1].argmax(dim=-1, keepdim=True))
            ids[-1].tolist()  # as any caller must, to see whether the answer ends
            times.append(time.perf_counter())
        return statistics.median(np.diff(times).tolist()), torch.cat(ids[1:], dim=1)

    def _generate(self, prompts: torch.Tensor, steps: int) -> tuple[float, torch.Tensor]:
        clock = _Clock()
        output = self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            past_key_values=self.cache,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[clock],
        )
        return statistics.median(np.diff(clock.times).tolist()), output[:, prompts.shape[1] :]

    @torch.inference_mode()
    def logits(self, row: int, answer: list[int], of: list[int]) -> Reply:
        ids = torch.cat([self._row(row), torch.tensor([answer], dtype=torch.long)], dim=1)
        logits = self._forward(ids, use_cache=False, **self._pixels()).logits[0, -1].float()
        return {"values": logits[of].tolist(), "spread": logits.std().item()}

    def prepare(self, folder: str, repeats: int) -> Reply:
        processor = _classes(folder)[1].from_pretrained(folder)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            pixels = processor(self.picture, return_tensors="pt")["pixel_values"]
            seconds.append(time.perf_counter() - started)
        return {"seconds": statistics.median(seconds), "digest": digest(pixels.flatten(0, -4).numpy())}

    def _forward(self, ids: torch.Tensor, **inputs: Any) -> Any:
        return self.model(input_ids=ids, logits_to_keep=1, **inputs)

    def _pixels(self) -> dict[str, torch.Tensor]:
        """The processor's output in the model's dtype, as the library's documentation hands it over."""
        inputs = {name: tensor for name, tensor in self.pixels.items() if name in ("pixel_values", "image_sizes")}
        return inputs | {"pixel_values": inputs["pixel_values"].to(self.model.dtype)}

    def _row(self, row: int) -> torch.Tensor:
        return torch.cat([self.ids[:, :-1], torch.tensor([[row]])], dim=1)


def _classes(folder: str) -> tuple[Any, Any]:
    return _CLASSES[json.loads((Path(folder) / "config.json").read_text())["model_type"]]
