"""The climb in opsin: one prompt with one picture, and what stands at each rung."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from opsin.collate import pad
from opsin.encode import Encoded, Encoder
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.media.image import ImageSource, open_image
from opsin.media.prepare import PreparedImage, prepare
from opsin.nn.seq2seq import Seq2Seq
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.spec.positions import token_positions
from opsin.text.messages import ask
from opsin.text.tokenizer import Tokenizer
from opsin.verify.rungs import Tap, Trace, as_array, tapped

QUESTION = "What is shown in this picture?"
NUM_LOGITS = 16
"""Tokens at the end of the prompt whose logits are compared: all would take gigabytes."""


def drawn_picture() -> Image.Image:
    """A small picture of slopes, edges and one stripe pattern, the same everywhere: what shows how it is resampled."""
    x, y = np.meshgrid(np.arange(150), np.arange(100))
    levels = np.stack([x * 255 // 149, y * 255 // 99, (x // 3 + y // 5) % 2 * 200], axis=-1)
    levels[20:60, 30:80] = (250, 40, 10)
    return Image.fromarray(levels.astype(np.uint8))


def encode(config: VLMConfig, tokenizer: Tokenizer | None, image: ImageSource | None, question: str | None) -> Encoded:
    """The prompt with the picture (the drawn one by default). Without a tokenizer its ids are given ones."""
    source = drawn_picture() if image is None else image
    if tokenizer is not None:
        return Encoder(config, tokenizer, image_mode="reference").encode(ask(question or QUESTION, source))
    picture = open_image(source, mode="reference", name="the picture")
    return given_ids(config, prepare(picture, config.plan(picture.size), config.vision))


def given_ids(config: VLMConfig, image: PreparedImage) -> Encoded:
    """A few ids, the picture's slots, and some more ids; ids that mean something to the model are left out."""
    plan, taken = image.plan, (config.image_token_id, config.video_token_id)
    usable = [token for token in range(3, config.decoder.vocab_size) if token not in taken]
    before, after = (
        [usable[7 * i % len(usable)] for i in range(1, 5)],
        [usable[11 * i % len(usable)] for i in range(1, 13)],
    )
    ids = [*before, *[config.image_token_id or 0] * plan.num_slots, *after]
    encoder_length = 0
    if config.chat.decoder_start:
        encoder_length = len(ids)
        ids.append(0)  # T5 begins with its padding token
    rasters = [(len(before), plan.raster)] if plan.raster else []
    return Encoded(
        ids=np.array(ids, np.int64),
        supervised=np.zeros(len(ids), np.bool_),
        positions=token_positions(len(ids), rasters, config.decoder),
        slots=np.arange(len(before), len(before) + plan.num_slots),
        slot_rows=plan.layout.order.astype(np.int64),
        images=(image,),
        token_spans=np.zeros(len(ids), np.int64),
        spans=(),
        encoder_length=encoder_length,
        name="given ids",
    )


@torch.inference_mode()
def climb(vlm: VLM, sample: Encoded, *, max_new_tokens: int) -> Trace:
    """Everything from the prepared patches to greedy ids; nobody stops an answer early."""
    batch = pad([sample]).to(vlm.decoder.embed.weight.device)
    read = vlm.decoder.encoder.layers if isinstance(vlm.decoder, Seq2Seq) else vlm.decoder.layers
    # transformers' BLIP-2 counts the norm between tower and Q-Former to the tower.
    normed = getattr(vlm.connector, "norm_features", None)
    taps: dict[str, Tap] = {
        "features": (vlm.vision if normed is None else normed, "output"),
        "first layer": (read[0], "output"),
        "last layer": (vlm.decoder.layers[-1], "output"),
    }
    with tapped(taps) as kept:
        embedded = vlm.embed(batch)
        assert batch.slots is not None
        kept["rows"] = embedded.flatten(0, 1)[batch.slots].clone()
        hidden = vlm.hidden(batch)[0, sample.encoder_length :]
    logits = vlm.logits(hidden[-NUM_LOGITS:])
    answer = generate(vlm, [sample], None, Sampling(max_new_tokens=max_new_tokens, temperature=0.0))[0]
    values: dict[str, NDArray[np.generic]] = {
        "pixels": np.concatenate([image.patches for image in sample.images]),
        "ids": sample.ids,
        "positions": sample.positions,
        **{name: flat(kept[name]) for name in ("features", "rows", "first layer", "last layer")},
        "logits": as_array(logits),
        "greedy": np.array(answer.ids, np.int64),
    }
    return Trace(values)


def flat(tensor: torch.Tensor) -> NDArray[np.generic]:
    """(..., D) -> (tokens, D)."""
    return as_array(tensor.reshape(-1, tensor.shape[-1]))
