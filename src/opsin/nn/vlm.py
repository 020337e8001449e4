"""The vision-language model: four short methods, and no branch on a family."""

import torch
from torch import Tensor, nn

from opsin.nn.attention import pick
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.connectors import make_connector
from opsin.nn.decoder import Decoder
from opsin.nn.layout import row_table
from opsin.nn.seq2seq import Seq2Seq
from opsin.nn.vision import VisionTower
from opsin.spec.model import VLMConfig
from opsin.spec.seq2seq import Seq2SeqConfig


class VLM(nn.Module):
    """Tower, connector and language model.

    Pictures become rows, rows fill the slots that the plan reserved among the token embeddings, the decoder turns the
    sequence into hidden states, and logits are computed for just those states whose next token somebody wants.
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.connector = make_connector(config.connector, in_dim=config.vision.out_dim, out_dim=config.decoder.dim)
        self.newline = nn.Parameter(torch.empty(config.decoder.dim)) if config.uses_newline else None
        language = config.decoder
        self.decoder = Seq2Seq(language) if isinstance(language, Seq2SeqConfig) else Decoder(language)

    def rows(self, patches: Tensor, grids: Tensor) -> Tensor:
        """patches: (P, C * p * p), grids: (N, 3) -> rows (R, D), one per place of each tile's row grid."""
        return self.connector(self.vision(patches, grids), grids)

    def embed(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Token embeddings (B, T, D) with picture rows in their slots.

        rows: what `rows` gave for this batch's pictures, where the caller already has it.
        """
        x = self.decoder.embed(batch.ids)
        if batch.slots is not None:
            assert batch.slot_rows is not None
            if rows is None:
                assert batch.patches is not None
                assert batch.grids is not None
                rows = self.rows(batch.patches, batch.grids)
            table = row_table(rows, batch.resamples, self.newline)
            x.view(-1, x.shape[-1]).index_copy_(0, batch.slots, table[batch.slot_rows].to(x.dtype))
        return x

    def hidden(
        self,
        batch: Batch,
        cache: KVCache | None = None,
        *,
        rows: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm.

        With a cache the batch's rows continue the cached ones, and their keys and values are added to it.
        wanted: (M,) places in (B * T) whose states are needed, such as those before taught tokens: the result is then
        (M, D), and the last layer does no more than these take.
        """
        x = self.embed(batch, rows)
        if isinstance(self.decoder, Seq2Seq):
            return pick(self.decoder(x, batch=batch, cache=cache), wanted)
        if cache is None:
            lengths = self._lengths(batch, None)
            return self.decoder(x, positions=batch.positions, mask=batch.mask, lengths=lengths, wanted=wanted)
        needed = max(cache.lengths) + x.shape[1]
        if needed > cache.capacity:
            cache.reserve(max(needed, 2 * cache.capacity))  # doubling, so that a caller who guessed low pays once
        hidden = self.decoder(
            x,
            positions=batch.positions,
            mask=cache.mask(x.shape[1]),
            cache=cache,
            lengths=self._lengths(batch, cache),
            wanted=wanted,
        )
        cache.advance(batch.lengths)
        return hidden

    def _lengths(self, batch: Batch, cache: KVCache | None) -> Tensor | None:
        """What a rotation that depends on the sequence's length goes by; None where the decoder has none."""
        rope = self.config.decoder.rope
        if rope is None or (rope.scaling is None and rope.log_n is None):
            return None
        at_inference_only = rope.log_n is not None or (rope.scaling is not None and rope.scaling.kind == "powers")
        if at_inference_only and self.training:
            return None
        if cache is None or not any(cache.prompt_lengths):
            return batch.token_lengths()
        return torch.tensor(cache.prompt_lengths, device=batch.ids.device)[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., D) -> (..., V). Call it on the states that are needed, not on all."""
        return self.decoder.logits(hidden)
