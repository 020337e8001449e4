"""The shipped parts: whole, small, of the described model, and as good as docs/demo_parts.md says."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from opsin.demo import pretrain_language
from opsin.demo.labels import patch_labels
from opsin.demo.scene import draw_scene
from opsin.demo.shipped import DECODER_FILE, PARTS, TOWER, TOWER_FILE, config, tokenizer
from opsin.nn.decoder import Decoder
from opsin.nn.vision import VisionTower


def test_the_parts_take_less_than_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in PARTS.iterdir()) <= 7_000_000  # the limit is 8 MB; some room is kept


@pytest.mark.parametrize(
    ("file", "module"), [(TOWER_FILE, VisionTower(TOWER)), (DECODER_FILE, Decoder(config().decoder))]
)
def test_every_tensor_of_a_part_is_there_and_finite(file: str, module: torch.nn.Module) -> None:
    tensors = load_file(PARTS / file)
    module.load_state_dict(tensors)
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float16 for tensor in tensors.values())


def test_the_vocabulary_of_the_decoder_is_the_tokenizers() -> None:
    assert config().decoder.vocab_size == tokenizer().vocab_size
    assert len(json.loads((PARTS / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]) == 393


@torch.no_grad()
def test_the_features_of_the_tower_tell_things_apart_by_patch() -> None:
    """The thrown-away classifiers are made again, by least squares on few pictures: what they read must be linear."""
    from opsin.demo.pretrain_tower import batch

    tower = VisionTower(TOWER)
    tower.load_state_dict(load_file(PARTS / TOWER_FILE))

    def features(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        patches, labels, _ = batch(5, start, count, "heldout")
        grids = torch.tensor([[1, TOWER.side, TOWER.side]]).expand(count, 3)
        covered = labels["ink"] > 0
        rows = tower(patches, grids)[covered]
        return torch.cat([rows, torch.ones(len(rows), 1)], dim=1), labels["ink"][covered]

    known, known_ink = features(0, 200)
    fresh, fresh_ink = features(1000, 60)
    one_hot = torch.nn.functional.one_hot(known_ink, 11).float()
    ridge = known.T @ known + 1e-3 * len(known) * torch.eye(known.shape[1])
    guess = (fresh @ torch.linalg.solve(ridge, known.T @ one_hot)).argmax(1)
    # 99.6 % with the trained classifier; least squares on 200 pictures gives less, chance a tenth.
    assert (guess == fresh_ink).float().mean() > 0.9


def test_the_language_model_answers_about_typed_pictures() -> None:
    model = pretrain_language.LanguageModel(tokenizer().vocab_size)
    model.decoder.load_state_dict(load_file(PARTS / DECODER_FILE))
    figures = pretrain_language.measure(model.eval(), tokenizer(), count=30)
    assert figures["accuracy"] > 0.7  # 82 % on 300 pictures; thirty scatter by a few points


def test_a_label_grid_has_one_entry_per_patch_of_the_tower() -> None:
    assert patch_labels(draw_scene(random.Random(0), "train")).anchor.shape == (TOWER.side, TOWER.side)
