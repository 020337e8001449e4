"""The vision tower while it trains, and towers that turn and have a table."""

import pytest
import torch

from opsin import families, weights
from opsin.families._parts import QWEN2_VL_TOWER
from opsin.nn.positions import patch_places, spread_table
from opsin.nn.vision import VisionTower, drop_rows


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


def test_a_table_beside_rotation_is_spread_as_qwen3_vl_does() -> None:
    pytest.importorskip("transformers")
    try:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
    except ImportError:
        pytest.skip("this transformers has no Qwen3-VL")
    theirs = Qwen3VLVisionModel(
        Qwen3VLVisionConfig(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=8, out_hidden_size=32,
            num_position_embeddings=144, deepstack_visual_indexes=[0],
        )
    )  # fmt: skip
    if not hasattr(theirs, "interpolation_align_corners"):
        pytest.skip("this transformers spreads its table by another function")
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    torch.nn.init.normal_(theirs.pos_embed.weight, generator=torch.Generator().manual_seed(0))
    for grid in ((8, 14), (12, 12), (16, 6)):
        taps, shares = get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, *grid]]),
            num_grid_per_side=theirs.num_grid_per_side,
            mode=theirs.interpolation_mode,
            align_corners=theirs.interpolation_align_corners,
            spatial_merge_size=2,
        )
        expected = (theirs.pos_embed(taps) * shares[:, :, None]).sum(1)
        places = patch_places(grid, block=2, device=torch.device("cpu"))
        torch.testing.assert_close(spread_table(theirs.pos_embed.weight, grid, places), expected, atol=1e-5, rtol=1e-5)


def test_a_table_of_zeros_leaves_a_turning_tower_as_it_is() -> None:
    config = QWEN2_VL_TOWER.replace(image_size=28, patch_size=7, dim=32, num_layers=2, num_heads=4, mlp_dim=64)
    torch.manual_seed(0)
    plain, table = VisionTower(config), VisionTower(config.replace(positions="rotary_and_table"))
    assert table.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["positions"]
    assert table.positions is not None
    torch.nn.init.zeros_(table.positions)
    patches, grids = torch.randn(4 * 6 + 2 * 4, config.patch_dim), torch.tensor([[1, 4, 6], [1, 2, 4]])
    torch.testing.assert_close(table(patches, grids), plain(patches, grids))
    torch.nn.init.normal_(table.positions)
    moved = table(patches, grids)
    assert not torch.allclose(moved, plain(patches, grids), atol=1e-2)
    # Pictures side by side give what each gives alone.
    torch.testing.assert_close(table(patches[:24], grids[:1]), moved[:24], atol=1e-5, rtol=1e-5)
