"""The model of BLIP-2's stage 1, and of retrieval: tower, Q-Former with both its sides, and small heads.

contrastive    each query's output and the text's first state, as unit vectors     `picture_vectors` `text_vectors`
matching       queries and text read each other; two logits                        `match`
captions       text reads the queries and itself from left to right                `read_caption` `caption_logits`
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.nn.mask import Mask, without_padding
from opsin.nn.qformer import Features, KeysValues, QFormer, behind, text_mask, tile_features
from opsin.nn.vision import VisionTower
from opsin.spec.qformer import RetrieverConfig


class Seen(NamedTuple):
    """Pictures as the queries saw them, without any text."""

    states: Tensor
    """(B, Q, D) outputs of the queries."""
    past: list[KeysValues]
    """Keys and values of the queries in every layer, (B, Q, H, E): all that a caption sees of the picture."""


class CaptionHead(nn.Module):
    """BERT's head: dense, GELU, norm; then the word embeddings themselves and a bias."""

    def __init__(self, dim: int, vocab_size: int, *, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """states: (..., D), words: (V, D) -> logits (..., V)."""
        return F.linear(self.norm(F.gelu(self.dense(states))), words, self.bias)


class Retriever(nn.Module):
    """Pictures and texts, compared. Texts are ids (B, T) with a mask `valid` (B, T), false in padding on the right."""

    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        self.config = config
        stack, dim = config.qformer, config.qformer.dim
        self.vision = VisionTower(config.vision)
        self.norm_features = nn.LayerNorm(config.vision.out_dim, eps=stack.feature_norm_eps)
        self.queries = nn.Parameter(torch.empty(stack.num_queries, dim))
        self.words = nn.Embedding(config.vocab_size, dim)
        self.positions = nn.Embedding(config.max_positions, dim)
        self.qformer = QFormer(stack, feature_dim=config.vision.out_dim, with_text=True)
        self.vision_proj = nn.Linear(dim, config.embed_dim)
        self.text_proj = nn.Linear(dim, config.embed_dim)
        self.itm_head = nn.Linear(dim, 2)
        whole = config.heads == "all"
        self.captions = CaptionHead(dim, config.vocab_size, norm_eps=stack.norm_eps) if whole else None
        self.temperature = nn.Parameter(torch.empty(())) if whole else None

    def features(self, patches: Tensor, grids: Tensor) -> Features:
        """Patches (P, C * p * p) of one tile per picture, grids (B, 3) -> normed features, a picture per row."""
        return tile_features(self.norm_features(self.vision(patches, grids)), grids)

    def see(self, features: Features) -> Seen:
        """Let the queries look at pictures, without a text."""
        queries = self.queries.expand(len(features.values), -1, -1)
        states, past = self.qformer(queries, num_queries=len(self.queries), features=features)
        return Seen(states, past)

    def picture_vectors(self, states: Tensor) -> Tensor:
        """Outputs of the queries (B, Q, D) -> unit vectors (B, Q, embed_dim)."""
        return F.normalize(self.vision_proj(states), dim=-1)

    def read(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Texts alone, every token seeing all of its text -> states (B, T, D)."""
        return self.qformer(self._embed(ids), num_queries=0, mask=without_padding(valid, valid))[0]

    def text_vectors(self, states: Tensor) -> Tensor:
        """States of texts (B, T, D) -> unit vectors (B, embed_dim) of their first tokens."""
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def match_states(self, features: Features, ids: Tensor, valid: Tensor) -> Tensor:
        """Picture b and text b together -> states of [queries ; text] (B, Q + T, D)."""
        count = len(self.queries)
        x = torch.cat([self.queries.expand(len(ids), -1, -1), self._embed(ids)], dim=1)
        mask = text_mask(valid, num_queries=count, form="both")
        return self.qformer(x, num_queries=count, features=features, mask=mask)[0]

    def match(self, features: Features, ids: Tensor, valid: Tensor) -> Tensor:
        """Logits (B, 2) of whether text b is about picture b; index 1 says that it is."""
        return self.match_logits(self.match_states(features, ids, valid)).mean(dim=1)

    def match_logits(self, states: Tensor) -> Tensor:
        """What each query says: states of `match_states` -> (B, Q, 2)."""
        return self.itm_head(states[:, : len(self.queries)])

    def read_caption(
        self, seen: Seen, ids: Tensor, valid: Tensor, *, past: list[KeysValues] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Captions from left to right -> states (B, T, D), and keys and values of queries and text so far.

        ids: begins with the control token of captions in place of the first. past: of the call before, whose text these
        ids go on; then `valid` is not looked at, since nothing is padded.
        """
        if past is not None:
            start = past[0][0].shape[1] - len(self.queries)
            assert ids.shape[1] == 1, "a caption goes on token by token"
            return self.qformer(self._embed(ids, start), num_queries=0, past=past)
        mask: Mask = behind(text_mask(valid, num_queries=len(self.queries), form="causal"), len(self.queries))
        return self.qformer(self._embed(ids), num_queries=0, mask=mask, past=seen.past)

    def caption_logits(self, states: Tensor) -> Tensor:
        """states: (..., D) -> logits of the next token (..., V)."""
        assert self.captions is not None, "config.heads 'matching' has no head for captions"
        return self.captions(states, self.words.weight)

    def _embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """Words and positions (B, T, D), counted from the first token of the text whether or not queries precede it."""
        places = torch.arange(start, start + ids.shape[1], device=ids.device)
        return self.words(ids) + self.positions(places)
