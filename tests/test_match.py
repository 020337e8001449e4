"""Pictures and texts compared: scores, rankings either way, a tokenizer of BERT's, captions of stage 1."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import matchers
import toys
from matchers import CONFIG, WORDS
from opsin import match, weights
from opsin.errors import MessageError, OpsinError, TokenizerError
from opsin.generate import Beams
from opsin.match import Matcher, PairEncoder
from opsin.text.tokenizer import load_tokenizer

TEXTS = ["a dog", "A red car!", "two cats on a very long sofa that does not end"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matchers.save(tmp_path_factory.mktemp("matcher") / "model")


@pytest.fixture(scope="module")
def matcher(folder: Path) -> Matcher:
    return match.load(folder)


def pictures() -> list[object]:
    return [toys.picture((40 + 7 * index, 60 - 5 * index), index) for index in range(5)]


def test_texts_stand_between_their_control_tokens_and_are_cut(matcher: Matcher) -> None:
    encoder = matcher.encoder
    first, last = WORDS.index("[CLS]"), WORDS.index("[SEP]")
    assert encoder.text("Dog!") == [
        first,
        WORDS.index("d"),
        WORDS.index("##o"),
        WORDS.index("##g"),
        last,
    ]
    long = encoder.text(TEXTS[2])
    assert len(long) == CONFIG.max_tokens
    assert (long[0], long[-1]) == (first, last)
    assert encoder.caption_id == len(WORDS)


def test_a_score_does_not_depend_on_what_else_is_scored(matcher: Matcher) -> None:
    shown = pictures()
    scores = matcher.score(shown, TEXTS)
    assert scores.contrast.shape == scores.matching.shape == (5, 3)
    assert ((scores.matching > 0) & (scores.matching < 1)).all()
    assert (np.abs(scores.contrast) <= 1 + 1e-6).all()
    small = Matcher(matcher.model, batch_size=1)
    for row, column in ((0, 0), (4, 2), (2, 1)):
        alone = small.score([shown[row]], [TEXTS[column]])
        assert alone.matching[0, 0] == pytest.approx(scores.matching[row, column], abs=1e-5)
        assert alone.contrast[0, 0] == pytest.approx(scores.contrast[row, column], abs=1e-5)


def test_rankings_follow_matching_and_contrast_together(matcher: Matcher) -> None:
    shown = pictures()
    scores = matcher.score(shown, TEXTS)
    for column, text in enumerate(TEXTS):
        ranked = matcher.rank_pictures(text, shown)
        assert sorted(each.index for each in ranked) == list(range(5))
        assert [each.score for each in ranked] == sorted((each.score for each in ranked), reverse=True)
        for each in ranked:
            assert each.matching == pytest.approx(scores.matching[each.index, column], abs=1e-5)
            assert each.contrast == pytest.approx(scores.contrast[each.index, column], abs=1e-5)
    for row, picture in enumerate(shown):
        for each in matcher.rank_texts(picture, TEXTS):
            assert each.matching == pytest.approx(scores.matching[row, each.index], abs=1e-5)


def test_only_the_best_by_contrast_are_read_together(matcher: Matcher) -> None:
    """The rest stands behind them, whatever their scores."""
    shown = pictures()
    contrast = matcher.score(shown, TEXTS[:1]).contrast[:, 0]
    ranked = matcher.rank_pictures(TEXTS[0], shown, num_rescored=2)
    assert {each.index for each in ranked[:2]} == set(np.argsort(-contrast)[:2].tolist())
    assert [each.matching is None for each in ranked] == [False, False, True, True, True]
    assert [each.index for each in ranked[2:]] == np.argsort(-contrast)[2:].tolist()
    texts = matcher.rank_texts(shown[0], TEXTS, num_rescored=1)
    assert [each.matching is None for each in texts] == [False, True, True]


def test_texts_are_cleaned_as_the_authors_do_unless_told_otherwise(matcher: Matcher) -> None:
    given = Matcher(matcher.model, text_form="as_given")
    shown = pictures()[:1]
    assert matcher.score(shown, ["A  red: car."]).matching == matcher.score(shown, ["a red car"]).matching
    assert given.encoder.text("a:car") != matcher.encoder.text("a:car")


def test_stage_1_describes_pictures_itself(matcher: Matcher, tmp_path: Path) -> None:
    captions = matcher.describe(pictures()[:2], beams=Beams(num_beams=2, min_new_tokens=2, max_new_tokens=6))
    assert len(captions) == 2
    assert all(isinstance(caption, str) for caption in captions)
    bare = weights.build_retriever(CONFIG.replace(heads="matching"))
    model = weights.RetrievalModel(bare, bare.config, "converted")
    model.tokenizer = matcher.model.tokenizer
    with pytest.raises(MessageError, match="converted only compares"):
        Matcher(model).describe(pictures()[:1])


def test_beams_of_captions_do_not_depend_on_company(matcher: Matcher) -> None:
    from opsin.generate.captions import caption
    from opsin.nn.qformer import Features

    parts = [features.values for _, features in matcher._features(pictures()[:3])]
    options = {
        "caption_id": len(WORDS),
        "stop_id": WORDS.index("[SEP]"),
        "beams": Beams(num_beams=3, max_new_tokens=8),
    }
    together = caption(matcher.model.retriever, Features(torch.cat(parts)), **options)  # type: ignore[arg-type]
    for row, values in enumerate(parts):
        alone = caption(matcher.model.retriever, Features(values), **options)[0]  # type: ignore[arg-type]
        assert [each.ids for each in alone] == [each.ids for each in together[row]]


def test_nothing_to_compare_is_said(matcher: Matcher) -> None:
    with pytest.raises(OpsinError, match="no text to compare with"):
        matcher.score(pictures()[:1], [])
    with pytest.raises(OpsinError, match="no picture to compare with"):
        matcher.rank_pictures("a dog", [])


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, *(f"word{n}" for n in range(50))]) + "\n")
    with pytest.raises(TokenizerError, match="they belong to different models"):
        match.load(folder, tokenizer=tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer= names the folder of BERT's vocab\.txt"):
        match.load(folder, tokenizer=tmp_path / "nowhere")


def test_a_vocabulary_that_has_the_caption_token_uses_it(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "[DEC]"]) + "\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[DEC]": len(WORDS)}))
    assert PairEncoder(CONFIG, load_tokenizer(tmp_path)).caption_id == len(WORDS)
