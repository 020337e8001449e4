"""Pictures and texts compared (BLIP-2's image-text matching): scores of pairs, and rankings either way.

    contrast   cosine of the text's vector and the nearest of the picture's query vectors: each side is read once
    matching   the probability that the text is about the picture: read together, pair by pair, slower and surer

A ranking follows the authors: all candidates by contrast, then the best of them once more by matching logit plus
contrast (LAVIS blip2_qformer.py, compute_sim_matrix).

    from opsin import match
    matcher = match.load("blip2-itm-vit-g")
    matcher.score(["photo.jpg"], ["a dog on a beach", "a red car"]).matching
    matcher.rank_pictures("a dog on a beach", list(Path("photos").glob("*.jpg")))[0].index
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.encode import Encoded
from opsin.errors import MessageError, OpsinError, TokenizerError
from opsin.generate.beam import Beams
from opsin.generate.captions import LAVIS_CAPTIONS, caption
from opsin.media.image import DEFAULT_LIMITS, ImageMode, ImageSource, Limits, check_plan, open_image
from opsin.media.prepare import PreparedImage, prepare
from opsin.nn.qformer import Features
from opsin.spec.qformer import RetrieverConfig
from opsin.text.cleaning import clean_caption
from opsin.text.tokenizer import Tokenizer
from opsin.weights import RetrievalModel, load_retriever

NUM_RESCORED = 128
"""Candidates of a ranking that are read together with the query (k_test of LAVIS' retrieval runs)."""

TextForm = Literal["cleaned", "as_given"]
"""Whether texts are cleaned as the authors clean captions (`text.cleaning`): lower case, without most marks."""

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Scores:
    """Every picture with every text."""

    contrast: NDArray[np.float32]
    """(pictures, texts) cosines, -1 to 1. Comparable between pairs; no probability."""
    matching: NDArray[np.float32]
    """(pictures, texts) probabilities that the text is about the picture."""


@dataclass(frozen=True)
class Ranked:
    """One candidate of a ranking."""

    index: int
    """Which of the candidates that were given."""
    contrast: float
    matching: float | None
    """Probability of a match; None where contrast alone has placed it, behind all that were read together."""
    score: float
    """What it is ranked by among its like: matching logit plus contrast, or contrast alone."""


@dataclass(frozen=True, eq=False)
class Similarity:
    """Every picture with every text, as numbers to rank by; (pictures, texts). They compare in one ranking only."""

    by_picture: NDArray[np.float64]
    """Row by row: the texts for each picture."""
    by_text: NDArray[np.float64]
    """Column by column: the pictures for each text."""


class PairEncoder:
    """Pictures and texts as a `Retriever` reads them, for scoring and for training stage 1."""

    def __init__(
        self,
        config: RetrieverConfig,
        tokenizer: Tokenizer,
        *,
        image_mode: ImageMode = "display",
        limits: Limits = DEFAULT_LIMITS,
        text_form: TextForm = "cleaned",
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.image_mode = image_mode
        self.limits = limits
        self.text_form = text_form
        names = config.controls
        self.first_id, self.last_id = tokenizer.control_id(names.first), tokenizer.control_id(names.last)

    @property
    def caption_id(self) -> int:
        """Id of the control token that begins a caption. Raises TokenizerError where the tokenizer has none.

        LAVIS adds it to BERT's vocabulary when a model is made; BERT's own files are one row short of it.
        """
        name = self.config.controls.caption
        if name not in self.tokenizer.controls and self.tokenizer.vocab_size == self.config.vocab_size - 1:
            return self.tokenizer.vocab_size
        return self.tokenizer.control_id(name)

    def text(self, text: str) -> list[int]:
        """Ids of a text between its control tokens, cut at `config.max_tokens`."""
        text = clean_caption(text) if self.text_form == "cleaned" else text
        inner = self.tokenizer.encode(text, "after_control").ids[: self.config.max_tokens - 2]
        return [self.first_id, *inner, self.last_id]

    def picture(self, source: ImageSource, name: str = "") -> PreparedImage:
        """Open and prepare one picture. Raises MediaError or PlanError."""
        opened = open_image(source, mode=self.image_mode, limits=self.limits, name=name)
        plan = self.config.plan(opened.size)
        check_plan(plan, self.limits, opened.name)
        return prepare(opened, plan, self.config.vision)

    def pair(self, source: ImageSource, text: str, *, name: str = "") -> Encoded:
        """One sample of stage 1. name: the picture's, where pictures repeat in the data."""
        ids = np.array(self.text(text), np.int64)
        image = self.picture(source, name)
        nothing = np.zeros(0, np.int64)
        return Encoded(
            ids=ids,
            supervised=np.arange(len(ids)) > 0,
            positions=np.arange(len(ids), dtype=np.int64)[:, None],
            slots=nothing,
            slot_rows=nothing,
            images=(image,),
            token_spans=np.zeros(len(ids), np.int64),
            spans=(),
            name=name,
        )


class Matcher:
    """A loaded model, ready to compare."""

    def __init__(
        self,
        model: RetrievalModel,
        *,
        image_mode: ImageMode = "display",
        text_form: TextForm = "cleaned",
        batch_size: int = 16,
    ) -> None:
        """batch_size: pictures, texts or pairs that go through the model at once."""
        self.model = model
        self.encoder = PairEncoder(model.config, model.tokenizer, image_mode=image_mode, text_form=text_form)
        self.batch_size = batch_size
        self._retriever = model.retriever
        self._device = model.retriever.queries.device

    @torch.inference_mode()
    def score(self, pictures: Sequence[ImageSource], texts: Sequence[str]) -> Scores:
        """Compare every picture with every text."""
        _refuse_empty(pictures, texts)
        contrast = self._contrast(self._picture_vectors(pictures), self._text_vectors(texts))
        encoded = [self.encoder.text(text) for text in texts]
        matching = np.empty((len(pictures), len(texts)), np.float32)
        for index, features in self._features(pictures):
            pairs = [(features, ids) for ids in encoded]
            matching[index] = self._match(pairs).softmax(dim=1)[:, 1].cpu().numpy()
        return Scores(contrast.cpu().numpy(), matching)

    @torch.inference_mode()
    def rank_pictures(
        self, text: str, pictures: Sequence[ImageSource], *, num_rescored: int = NUM_RESCORED
    ) -> list[Ranked]:
        """Pictures from the best for a text to the worst. num_rescored: how many are read together with it."""
        _refuse_empty(pictures, [text])
        contrast = self._contrast(self._picture_vectors(pictures), self._text_vectors([text]))[:, 0]
        best = contrast.argsort(descending=True, stable=True)[:num_rescored].tolist()
        ids = self.encoder.text(text)
        shown = self._features([pictures[index] for index in best])
        logits = [self._match([(features, ids)])[0] for _, features in shown]
        return _ranked(contrast, best, logits)

    @torch.inference_mode()
    def rank_texts(
        self, picture: ImageSource, texts: Sequence[str], *, num_rescored: int = NUM_RESCORED
    ) -> list[Ranked]:
        """Texts from the best for a picture to the worst. num_rescored: how many are read together with it."""
        _refuse_empty([picture], texts)
        contrast = self._contrast(self._picture_vectors([picture]), self._text_vectors(texts))[0]
        best = contrast.argsort(descending=True, stable=True)[:num_rescored].tolist()
        _, features = next(self._features([picture]))
        logits = self._match([(features, self.encoder.text(texts[index])) for index in best])
        return _ranked(contrast, best, list(logits))

    @torch.inference_mode()
    def similarity(
        self,
        pictures: Sequence[ImageSource],
        texts: Sequence[str],
        *,
        num_rescored: int = NUM_RESCORED,
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> Similarity:
        """What ranks all texts for every picture and all pictures for every text, as the two `rank_` methods do.

        num_rescored: how many of each ranking are read together; 0 for contrast alone. on_progress: called with 1 for
        every picture that is done.
        """
        _refuse_empty(pictures, texts)
        shown, written = self._picture_vectors(pictures), self._text_vectors(texts)
        parts = [self._contrast(part, written).cpu().numpy() for part in shown.split(self.batch_size)]
        contrast = np.concatenate(parts).astype(np.float64)
        if not num_rescored:
            on_progress(len(pictures))
            return Similarity(contrast, contrast)
        best_texts, best_pictures = _best(contrast, num_rescored), _best(contrast.T, num_rescored).T
        by_picture, by_text = contrast - _BEHIND, contrast - _BEHIND
        encoded = [self.encoder.text(text) for text in texts]
        for index, features in self._features(pictures):
            wanted = np.flatnonzero(best_texts[index] | best_pictures[index])
            if len(wanted):
                logits = self._match([(features, encoded[place]) for place in wanted])[:, 1].cpu().numpy()
                scores = logits + contrast[index, wanted]
                for target, best in ((by_picture, best_texts), (by_text, best_pictures)):
                    target[index, wanted] = np.where(best[index, wanted], scores, target[index, wanted])
            on_progress(1)
        return Similarity(by_picture, by_text)

    @torch.inference_mode()
    def describe(self, pictures: Sequence[ImageSource], *, beams: Beams = LAVIS_CAPTIONS) -> list[str]:
        """A caption of each picture by the model itself, where it has kept the head for it (stage 1)."""
        if self.model.config.heads != "all":
            raise MessageError(f"{self.model.name} only compares: converted models have no head that writes captions")
        captions = []
        for _, features in self._features(pictures):
            found = caption(
                self._retriever,
                features,
                caption_id=self.encoder.caption_id,
                stop_id=self.encoder.last_id,
                beams=beams,
            )
            captions.append(self.model.tokenizer.decode(found[0][0].ids))
        return captions

    def _picture_vectors(self, pictures: Sequence[ImageSource]) -> Tensor:
        """(pictures, Q, E) unit vectors."""
        vectors = []
        for _, features in self._features(pictures):
            vectors.append(self._retriever.picture_vectors(self._retriever.see(features).states))
        return torch.cat(vectors)

    def _text_vectors(self, texts: Sequence[str]) -> Tensor:
        """(texts, E) unit vectors."""
        vectors = []
        for part in _parts([self.encoder.text(text) for text in texts], self.batch_size):
            vectors.append(self._retriever.text_vectors(self._retriever.read(*self._padded(part))))
        return torch.cat(vectors)

    def _contrast(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """(pictures, texts): of each pair, the query that is nearest the text."""
        return torch.einsum("iqe,te->itq", pictures.float(), texts.float()).amax(-1)

    def _features(self, pictures: Sequence[ImageSource]) -> Iterator[tuple[int, Features]]:
        """Features of each picture, (1, F, D). Pictures go through the tower together, a batch at a time."""
        start = 0
        for part in _parts(pictures, self.batch_size):
            prepared = [
                self.encoder.picture(source, f"picture {number}") for number, source in enumerate(part, start + 1)
            ]
            patches = torch.from_numpy(np.concatenate([image.patches for image in prepared]))
            grids = torch.from_numpy(np.concatenate([image.grids for image in prepared]))
            features = self._retriever.features(patches.to(self._device), grids)
            for place in range(len(part)):
                yield start + place, Features(features.values[place : place + 1])
            start += len(part)

    def _match(self, pairs: Sequence[tuple[Features, list[int]]]) -> Tensor:
        """Matching logits (pairs, 2) in float32."""
        logits = [torch.empty(0, 2)] if not pairs else []
        for part in _parts(pairs, self.batch_size):
            features = Features(torch.cat([features.values for features, _ in part]))
            logits.append(self._retriever.match(features, *self._padded([ids for _, ids in part])).float())
        return torch.cat(logits)

    def _padded(self, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(ids) for ids in texts])
        ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        valid = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids.to(self._device), valid.to(self._device)


def load(name: str | Path, *, image_mode: ImageMode = "display", **options: Any) -> Matcher:
    """Load a model to compare with: a folder, an id such as `blip2-itm-vit-g`, or a repository.

    options: those of `weights.load_retriever`.
    """
    model = load_retriever(name, **options)
    try:
        return Matcher(model, image_mode=image_mode)
    except TokenizerError as error:
        raise TokenizerError(f"{error} (tokenizer= names the folder of BERT's vocab.txt or tokenizer.json)") from None


def _ranked(contrast: Tensor, best: list[int], logits: Sequence[Tensor]) -> list[Ranked]:
    """Rescored candidates by matching logit plus contrast, then all others by contrast."""
    cosines = contrast.tolist()
    rescored = [
        Ranked(index, cosines[index], float(pair.softmax(0)[1]), float(pair[1]) + cosines[index])
        for index, pair in zip(best, logits, strict=True)
    ]
    rescored.sort(key=lambda each: -each.score)
    others = [index for index in contrast.argsort(descending=True, stable=True).tolist() if index not in set(best)]
    return rescored + [Ranked(index, cosines[index], None, cosines[index]) for index in others]


_BEHIND = 1e4
"""What keeps candidates that were not read together behind those that were, in float64 to 12 digits."""


def _best(contrast: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """(queries, candidates): the `count` best of each row, of equals the first."""
    best = np.zeros(contrast.shape, np.bool_)
    order = np.argsort(-contrast, axis=1, kind="stable")[:, :count]
    np.put_along_axis(best, order, True, axis=1)
    return best


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _refuse_empty(pictures: Sequence[ImageSource], texts: Sequence[str]) -> None:
    for what, given in (("picture", pictures), ("text", texts)):
        if not given:
            raise OpsinError(f"there is no {what} to compare with")
