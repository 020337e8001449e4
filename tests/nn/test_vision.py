"""The vision tower while it trains."""

import torch

from opsin import families, weights
from opsin.nn.vision import drop_rows


def test_rows_are_dropped_as_a_whole_and_the_others_make_up_for_it() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 2)
    dropped = drop_rows(x, 0.25)
    values = dropped[:, 0, 0]
    assert set(values.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(dropped, values[:, None, None].expand_as(x))
    assert abs(float(values.mean()) - 1) < 0.03
    assert drop_rows(x, 0.0) is x


def test_drop_path_rises_to_the_last_block_and_only_while_training() -> None:
    """With two blocks the first is always there; at a rate near 1 the last is left out for nearly every tile."""
    config = families.family("internvl15").tiny.config.vision
    vlm = weights.build(families.family("internvl15").tiny.config, seed=1)
    tower, one = vlm.vision, weights.build(families.family("internvl15").tiny.config, seed=1).vision
    patches, grids = torch.randn(8 * 16, config.patch_dim), torch.tensor([[1, 4, 4]] * 8)
    plain = tower.eval()(patches, grids)
    tower.drop_path = 0.999999
    assert torch.equal(tower(patches, grids), plain)
    with torch.no_grad():
        for parameter in one.layers[1].parameters():
            parameter.zero_()  # a block that adds nothing
    assert torch.equal(tower.train()(patches, grids), one.eval()(patches, grids))
