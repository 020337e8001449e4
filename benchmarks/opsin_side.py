"""opsin as its users run it: `load_ready` and `generate`, which `opsin.chat` calls."""

import gc
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from workload import PICTURE_SIZE, Reply, digest, picture

from opsin import weights
from opsin.collate import pad
from opsin.encode import Encoded
from opsin.generate import Sampling, generate, stream
from opsin.generate.ready import load_ready
from opsin.media.image import open_image
from opsin.media.prepare import PreparedImage, prepare
from opsin.nn.cache import KVCache, decode_dtype
from opsin.spec.model import VLMConfig
from opsin.weights import Model


class OpsinSide:
    """Answers the requests of `workload.Side`."""

    def __init__(self) -> None:
        self.model: Model | None = None
        self.encoded: Encoded | None = None
        self.cache: KVCache | None = None
        self.picture = picture()

    def load(self, folder: str, dtype: str) -> Reply:
        self.model = self.encoded = self.cache = None
        gc.collect()
        started = time.perf_counter()
        self.model = load_ready(folder, device="cpu", dtype=dtype)
        return {"seconds": time.perf_counter() - started}

    def prompt(self, ids: list[int]) -> Reply:
        assert self.model is not None
        image = self._prepare(self.model.config)
        tokens = np.array(ids, np.int64)
        self.encoded = Encoded(
            ids=tokens,
            supervised=np.zeros(len(ids), np.bool_),
            positions=np.arange(len(ids), dtype=np.int64)[:, None],
            slots=np.flatnonzero(tokens == self.model.config.image_token_id),
            slot_rows=image.plan.layout.order.astype(np.int64),
            images=(image,),
            token_spans=np.zeros(len(ids), np.int64),
            spans=(),
        )
        return {}

    def prefill(self, room: int) -> Reply:
        assert self.model is not None
        assert self.encoded is not None
        self.cache = None
        started = time.perf_counter()
        weight = self.model.vlm.decoder.embed.weight
        self.cache = KVCache(
            self.model.config.decoder,
            batch_size=1,
            capacity=self.encoded.num_tokens + room,
            dtype=decode_dtype(weight.dtype, weight.device),
        )
        [answer] = generate(self.model.vlm, [self.encoded], None, Sampling(max_new_tokens=1), cache=self.cache)
        return {"seconds": time.perf_counter() - started, "ids": list(answer.ids)}

    def decode(self, rows: int, steps: int) -> Reply:
        assert self.model is not None
        assert self.cache is not None
        prompts = [self._row(row) for row in range(rows)]
        if len(self.cache.lengths) != rows:
            self.cache.select([0] * rows)
        self.cache.truncate([prompt.num_tokens - 1 for prompt in prompts])
        times, ids = [], [[] for _ in range(rows)]
        for chunk in stream(self.model.vlm, prompts, None, Sampling(max_new_tokens=steps), cache=self.cache):
            ids[chunk.row].append(chunk.id)
            if chunk.row == rows - 1:
                times.append(time.perf_counter())
        return {"seconds": statistics.median(np.diff(times).tolist()), "ids": ids}

    @torch.inference_mode()
    def logits(self, row: int, answer: list[int], of: list[int]) -> Reply:
        assert self.model is not None
        prompt = self._row(row)
        total = prompt.num_tokens + len(answer)
        longer = replace(
            prompt,
            ids=np.concatenate([prompt.ids, np.array(answer, np.int64)]),
            supervised=np.zeros(total, np.bool_),
            positions=np.arange(total, dtype=np.int64)[:, None],
            token_spans=np.zeros(total, np.int64),
        )
        vlm = self.model.vlm
        logits = vlm.logits(vlm.hidden(pad([longer]))[0, -1]).float()
        return {"values": logits[of].tolist(), "spread": logits.std().item()}

    def prepare(self, folder: str, repeats: int) -> Reply:
        config = weights.describe(folder)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            image = self._prepare(config)
            seconds.append(time.perf_counter() - started)
        (_, height, width), size = image.grids[0], config.vision.patch_size
        tiles = image.patches.reshape(-1, height, width, 3, size, size).transpose(0, 3, 1, 4, 2, 5)
        pixels = tiles.reshape(-1, 3, height * size, width * size)
        return {"seconds": statistics.median(seconds), "digest": digest(pixels)}

    def _prepare(self, config: VLMConfig) -> PreparedImage:
        return prepare(open_image(self.picture, mode="reference"), config.plan(PICTURE_SIZE), config.vision)

    def _row(self, row: int) -> Encoded:
        assert self.encoded is not None
        return replace(self.encoded, ids=np.append(self.encoded.ids[:-1], row))
