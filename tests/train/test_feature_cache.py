"""Features of a frozen tower on the disk: the same bits as without, and nothing stale."""

import pytest
import torch

from opsin.errors import ConfigError
from opsin.nn.vision import VisionTower
from opsin.spec.recipe import RunConfig
from opsin.train import next_token, run, train_stage
from opsin.train.feature_cache import FeatureCache
from train.test_lora import LORA, one_stage
from train.test_runs import Crash, crash_after, log_of
from train.toy import DrawnSource, differing, stage, tensors_of, tiny_model

FAMILIES = ("llava15", "llava_next", "qwen2_vl", "internvl15", "blip2")


def cached(folder, **changes):
    return stage(cache_features={"folder": str(folder / "features"), **changes}, steps=4)


def files(folder):
    return sorted((folder / "features").rglob("*.safetensors"))


@pytest.fixture
def calls(monkeypatch):
    """How many tiles went through the tower in each call."""
    seen: list[int] = []
    real = VisionTower.forward

    def forward(self, patches, grids):
        seen.append(len(grids))
        return real(self, patches, grids)

    monkeypatch.setattr(VisionTower, "forward", forward)
    return seen


@pytest.fixture
def one_thread():
    """On several, the last bit of a tile's features may depend on what it is batched with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_training_from_the_cache_has_the_same_bits(tmp_path, calls, family):
    outcomes = []
    for way in ("none", "cold", "warm"):
        calls.clear()
        model = tiny_model(tmp_path, family)
        tuned = stage(steps=4) if way == "none" else cached(tmp_path)
        rows = train_stage(model.vlm, tuned, DrawnSource(8), tokenizer=model.tokenizer)
        outcomes.append(([(row["loss"], row["grad_norm"]) for row in rows], tensors_of(model)))
        # 4 steps of 4 see 8 samples twice, of which 7 have a picture.
        assert (sum(calls) == 0) == (way == "warm")
    assert outcomes[0][0] == outcomes[1][0] == outcomes[2][0]
    assert differing(outcomes[0][1], outcomes[1][1]) == differing(outcomes[0][1], outcomes[2][1]) == []


def test_each_tile_goes_through_the_tower_once(tmp_path, calls):
    model = tiny_model(tmp_path)
    train_stage(model.vlm, cached(tmp_path), DrawnSource(8), tokenizer=model.tokenizer)
    assert calls == [1] * 7
    assert len(files(tmp_path)) == 7


def test_a_run_that_goes_on_from_a_half_filled_cache_has_the_same_bits(tmp_path):
    def config(name):
        data = one_stage(tmp_path / name).model_dump(mode="json")
        data["stages"][0]["cache_features"] = {"folder": str(tmp_path / f"{name}-features")}
        return RunConfig.parse(data, where="test")

    for name, crash in (("straight", None), ("crashed", 4)):
        sources = {"adapters": DrawnSource(10)}
        if crash:
            with pytest.raises(Crash):
                run(config(name), model=tiny_model(tmp_path), sources=sources, on_row=crash_after(crash))
            for file in sorted((tmp_path / f"{name}-features").rglob("*.safetensors"))[::2]:
                file.unlink()
        run(config(name), model=tiny_model(tmp_path), sources=sources)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "crashed")
    file = "adapters/adapter_model.safetensors"
    assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "crashed" / file).read_bytes()


def test_another_tower_precision_or_picture_is_another_tile(tmp_path):
    model = tiny_model(tmp_path)
    for seed, precision in ((0, "float32"), (1, "float32"), (0, "bfloat16")):
        model = tiny_model(tmp_path, seed=seed)
        before = len(files(tmp_path))
        train_stage(model.vlm, cached(tmp_path), DrawnSource(8), tokenizer=model.tokenizer, precision=precision)
        assert len(files(tmp_path)) == before + 7
    train_stage(model.vlm, cached(tmp_path), DrawnSource(11), tokenizer=model.tokenizer, precision="bfloat16")
    assert len(files(tmp_path)) == 21 + 2


def test_damaged_files_are_made_anew(tmp_path, calls):
    model = tiny_model(tmp_path)
    cache = FeatureCache(tmp_path / "features", model.vlm.vision, max_bytes=1e9, precision="float32")
    side = model.config.vision.side
    patches, grids = torch.randn(side**2, model.config.vision.patch_dim), torch.tensor([[1, side, side]])
    wanted = cache.features(patches, grids)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for broken in (b"", whole[:100], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(broken)
        assert torch.equal(cache.features(patches, grids), wanted)
        assert file.read_bytes() == whole
    assert (cache.hits, cache.misses) == (0, 5)
    assert torch.equal(cache.features(patches, grids), wanted)
    assert cache.hits == 1


def test_the_folder_stays_within_its_bound(tmp_path):
    model = tiny_model(tmp_path)
    train_stage(model.vlm, cached(tmp_path), DrawnSource(8), tokenizer=model.tokenizer)
    size = files(tmp_path)[0].stat().st_size
    for file in files(tmp_path)[3:]:
        file.unlink()
    model = tiny_model(tmp_path)
    train_stage(model.vlm, cached(tmp_path, max_gib=5.5 * size / 2**30), DrawnSource(8), tokenizer=model.tokenizer)
    assert len(files(tmp_path)) == 5


def test_a_tower_that_trains_and_objectives_of_ones_own_are_refused(tmp_path):
    model = tiny_model(tmp_path)
    for changes in ({"trainable": ["vision"]}, {"trainable": [], "lora": {**LORA, "targets": ["vision"]}}):
        tuned = stage(cache_features={"folder": str(tmp_path / "features")}, **changes)
        with pytest.raises(ConfigError, match="but the tower trains"):
            train_stage(tiny_model(tmp_path).vlm, tuned, DrawnSource(8), tokenizer=model.tokenizer)
    with pytest.raises(ConfigError, match="is for next-token training"):
        train_stage(
            model.vlm,
            cached(tmp_path),
            DrawnSource(8),
            tokenizer=model.tokenizer,
            objective=lambda vlm, batch: next_token(vlm, batch),
        )
