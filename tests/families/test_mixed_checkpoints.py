"""A folder whose config is of one family and whose weights are of another."""

from itertools import permutations
from pathlib import Path

import pytest

from opsin import families, weights
from opsin.errors import OpsinError, WeightError
from opsin.weights import Model

NAMES = tuple(family.name for family in families.FAMILIES)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny preset of every family, in the first published layout that can be written."""
    folders = {}
    for family in families.FAMILIES:
        config, folder = family.tiny.config, tmp_path_factory.mktemp("published") / family.name
        model = Model(vlm=weights.build(config, seed=0), config=config, name=family.name, tokenizer_folder=None)
        for layout in ("hf", "original"):
            try:
                weights.export(folder, model, layout=layout)
            except OpsinError:  # the preset has settings that this layout cannot say
                continue
            folders[family.name] = folder
            break
    return folders


@pytest.mark.parametrize(("described", "holds"), tuple(permutations(NAMES, 2)))
def test_weights_of_another_family_are_one_clear_error(
    published: dict[str, Path], tmp_path: Path, described: str, holds: str
) -> None:
    (tmp_path / "config.json").write_bytes((published[described] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").hardlink_to(published[holds] / "model.safetensors")
    with pytest.raises(WeightError) as error:
        weights.load(tmp_path)
    assert str(tmp_path) in str(error.value)
