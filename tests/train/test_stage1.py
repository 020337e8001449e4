"""BLIP-2's stage 1: properties of the losses, of gathering, and a run of training that ends in stage 2.

Losses and gradients against the authors' are recorded cases (tests/parity/stage1_blip2.py).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file

import toys
from opsin import weights
from opsin.collate import pad
from opsin.errors import DataError, TrainError
from opsin.families.blip2 import TINY
from opsin.match import Matcher, PairEncoder
from opsin.spec.recipe import AdamW, BatchSize, Schedule, Stage
from opsin.text.messages import Conversation, assistant, user
from opsin.text.tokenizer import Tokenizer
from opsin.train.runner import train_stage
from opsin.train.stage1 import (
    CaptionPairs,
    begin_stage2,
    contrastive_loss,
    pictures_by_name,
    same_pair,
    stage1,
    stage1_losses,
    texts_by_words,
)
from opsin.weights import RetrievalModel
from train.pairs import CONFIG, gather, model, pairs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return toys.byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_contrast_sends_its_gradient_to_the_side_that_is_compared() -> None:
    """Gathered vectors carry none, on one process too: the picture's loss moves pictures, the text's moves texts."""
    from opsin.train.stage1 import similarities

    retriever = model()
    images = torch.randn(3, 6, 16, requires_grad=True)
    texts = torch.randn(3, 16, requires_grad=True)
    sim_i2t, _ = similarities(retriever, images, texts)
    sim_i2t.sum().backward()
    assert images.grad is not None
    assert texts.grad is None


def test_soft_targets_of_different_pictures_are_smoothed_hard_ones() -> None:
    sims = torch.randn(4, 4)
    own = torch.eye(4, dtype=torch.bool)
    hard, soft = contrastive_loss(sims, sims.T, own, soft=False), contrastive_loss(sims, sims.T, own, soft=True)
    torch.testing.assert_close(hard, soft)


def test_pairs_of_one_picture_share_their_target_and_are_no_negatives() -> None:
    retriever = model()
    result = stage1_losses(retriever, pairs(image_ids=[7, 7, 3, 7, 4]), caption_id=1)
    shown = result.steps["neg_weights_t2i"] > 0
    same = torch.tensor([[a == b for b in (7, 7, 3, 7, 4)] for a in (7, 7, 3, 7, 4)])
    assert torch.equal(shown, ~same)
    assert not torch.equal(result.contrastive, stage1_losses(retriever, pairs(), caption_id=1).contrastive)


def test_equal_texts_fit_each_others_pictures_where_they_are_told_apart() -> None:
    retriever = model()
    result = stage1_losses(retriever, pairs()._replace(text_ids=torch.tensor([7, 7, 3, 7, 4])), caption_id=1)
    same = torch.tensor([[a == b for b in (7, 7, 3, 7, 4)] for a in (7, 7, 3, 7, 4)])
    assert torch.equal(result.steps["neg_weights_t2i"] > 0, ~same)
    either = pairs(image_ids=[1, 2, 2, 3, 4])._replace(text_ids=torch.tensor([5, 6, 7, 5, 8]))
    same = same_pair(either)
    assert same.long().tolist() == [
        [1, 0, 0, 1, 0],  # pair 3 has its text
        [0, 1, 1, 0, 0],  # pair 2 has its picture
        [0, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_texts_are_equal_word_for_word_whatever_they_are_padded_to(tokenizer: Tokenizer) -> None:
    encoder = PairEncoder(CONFIG, tokenizer)
    picture = Plain().sample(0, 0).images[0]
    texts = ["red paper", "red paper and more", "Red paper.", "red pape"]
    found = texts_by_words(pad([encoder.pair(picture, text) for text in texts])).tolist()
    assert found[0] == found[2]
    assert len(set(found)) == 3
    alone = texts_by_words(pad([encoder.pair(picture, "red paper")])).tolist()
    assert alone == found[:1]


def test_negatives_are_drawn_by_similarity_and_follow_from_the_generator() -> None:
    retriever = model()
    drawn = [
        stage1_losses(retriever, pairs(), caption_id=1, generator=torch.Generator().manual_seed(seed)).negatives
        for seed in (3, 3, 4)
    ]
    assert torch.equal(drawn[0].images, drawn[1].images)
    assert torch.equal(drawn[0].texts, drawn[1].texts)
    assert any(not torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    assert (drawn[0].images != torch.arange(5)).all()


@pytest.mark.parametrize("image_ids", [None, [2]])
def test_a_pair_without_a_negative_is_an_error(image_ids: list[int] | None) -> None:
    with pytest.raises(TrainError, match="no negative among the 1"):
        stage1_losses(model(), pairs(1, image_ids=image_ids), caption_id=1)


def test_the_caption_starts_with_its_own_token_which_is_never_a_target() -> None:
    retriever, given = model(), pairs()
    first = stage1_losses(retriever, given, caption_id=1).captions
    assert not torch.equal(first, stage1_losses(retriever, given, caption_id=2).captions)
    changed = given.ids.clone()
    changed[:, 0] = 300  # what stood there is overwritten
    torch.testing.assert_close(stage1_losses(retriever, given._replace(ids=changed), caption_id=1).captions, first)


def test_padding_takes_no_part_in_any_loss() -> None:
    retriever, given = model(), pairs()
    result = stage1_losses(retriever, given, caption_id=1, generator=torch.Generator().manual_seed(1))
    wide = given._replace(ids=F.pad(given.ids, (0, 4), value=99), valid=F.pad(given.valid, (0, 4), value=False))
    other = stage1_losses(retriever, wide, caption_id=1, negatives=result.negatives)
    for one, two in ((result.contrastive, other.contrastive), (result.matching, other.matching)):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.captions, other.captions, atol=1e-5, rtol=1e-5)


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_see_each_others_pairs(tmp_path: Path) -> None:
    mp.spawn(gather, args=(str(tmp_path),), nprocs=2)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for rank, each in enumerate(found):
        assert each["all"].flatten().tolist() == [1, 10, 2, 11]
        # Both processes want something of each row: once by its own factor 1, once by the other's 2.
        assert each["grad"].flatten().tolist() == ([3, 6], [9, 12])[rank]
        assert each["weights"].shape == (3, 6)
        assert torch.equal(each["weights"].argmin(1), torch.arange(3) + 3 * rank)
        assert torch.isfinite(each["loss"]).all()


# ---- training --------------------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "white": (240, 240, 240)}


class Plain:
    """Pictures of one colour, and captions that name it."""

    def __len__(self) -> int:
        return 16

    def sample(self, index: int, epoch: int) -> Conversation:
        from PIL import Image

        name = list(COLOURS)[index % 4]
        picture = Image.new("RGB", (40 + index, 42), COLOURS[name])
        return Conversation((user("", images=[0]), assistant(f"{name} paper")), (picture,), id=name)


def test_training_teaches_to_compare_and_hands_over_to_stage_2(tokenizer: Tokenizer) -> None:
    retriever = weights.build_retriever(CONFIG, seed=4)
    encoder = PairEncoder(CONFIG, tokenizer)
    stage = Stage(
        name="stage1",
        trainable=(
            *("norm_features", "queries", "qformer", "words", "positions"),
            *("vision_proj", "text_proj", "itm_head", "captions", "temperature"),
        ),
        batch=BatchSize(samples=8, form="pad"),
        optim=AdamW(lr=2e-3, weight_decay=0.05),
        schedule=Schedule(kind="constant", warmup_steps=3),
        steps=60,
    )
    source = CaptionPairs(Plain(), encoder)
    rows = train_stage(
        retriever, stage, source, objective=stage1(encoder.caption_id, image_ids=pictures_by_name), workers=0
    )
    assert rows[-1]["loss"] < 0.65 * rows[0]["loss"]
    trained = RetrievalModel(retriever.eval(), CONFIG, "trained")
    trained.tokenizer = tokenizer
    matcher = Matcher(trained, batch_size=3)
    pictures = [Plain().sample(index, 0).images[0] for index in range(4)]
    texts = [f"{name} paper" for name in COLOURS]
    for index, text in enumerate(texts):
        assert matcher.rank_pictures(text, pictures)[0].index == index
        assert matcher.rank_texts(pictures[index], texts)[0].index == index

    vlm = weights.build(TINY.config.replace(connector=CONFIG.qformer), seed=5)
    before = {name: tensor.clone() for name, tensor in vlm.connector.state_dict().items()}
    begin_stage2(vlm, retriever)
    after = vlm.connector.state_dict()
    assert torch.equal(after["queries"], retriever.queries)
    assert torch.equal(after["qformer.layers.0.query.mlp.up.weight"], retriever.qformer.layers[0].query.mlp.up.weight)
    assert torch.equal(after["proj.weight"], before["proj.weight"]), "the projection is new in stage 2"


def test_stage_2_goes_on_with_the_same_qformer_only() -> None:
    vlm = weights.build(TINY.config.replace(connector=CONFIG.qformer.replace(num_queries=4)))
    with pytest.raises(TrainError, match="the same Q-Former"):
        begin_stage2(vlm, model())


@pytest.mark.parametrize(
    "conversation",
    [
        Conversation((user("no picture"), assistant("a caption"))),
        Conversation((user("", images=[0]),), (b"",)),
    ],
)
def test_what_is_not_a_picture_and_its_caption_is_refused(conversation: Conversation, tokenizer: Tokenizer) -> None:
    class One:
        def __len__(self) -> int:
            return 1

        def sample(self, index: int, epoch: int) -> Any:
            return conversation

    with pytest.raises(DataError, match="a pair is one picture and an answer"):
        CaptionPairs(One(), PairEncoder(CONFIG, tokenizer)).sample(0, 0)
