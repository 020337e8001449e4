"""What trains: gradient reaches exactly the tensors that a stage names, and nothing is computed for the others."""

import pytest
import torch

from opsin import families
from opsin.encode import Encoder
from opsin.errors import ConfigError, TrainError
from opsin.families import FAMILIES
from opsin.nn.batch import Batch
from opsin.nn.vlm import VLM
from opsin.spec.resolution import CenterCrop
from opsin.train import train_stage
from opsin.train.loop import StageLoop
from opsin.train.objectives import Loss, next_token
from opsin.train.prepare import describe_trainable, prepare_stage
from opsin.train.trainable import GradientCheck, choose, idle_tensors, set_trainable
from opsin.weights.init import on_meta
from train.toy import DrawnSource, stage, tiny_model


@pytest.fixture(scope="module", params=[family.name for family in FAMILIES])
def tiny(request, tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def tiny15(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def prepared(model, source=None, **changes):
    return prepare_stage(
        stage(**changes),
        module=model.vlm,
        model=model.config,
        tokenizer=model.tokenizer,
        seed=0,
        source=source or DrawnSource(8),
    )


@pytest.mark.parametrize(
    "patterns",
    [
        ["connector"],
        ["connector", "decoder"],
        ["vision", "connector", "decoder"],
        ["vision.layers.0.*"],
        ["decoder.layers.*.attn.q.weight", "decoder.norm"],
    ],
    ids=" ".join,
)
def test_one_step_changes_exactly_the_tensors_that_train(tiny, patterns):
    before = {name: value.clone() for name, value in tiny.vlm.named_parameters()}
    one = prepared(tiny, trainable=patterns, schedule={"warmup_ratio": 0}, steps=1)
    loop = StageLoop(tiny.vlm, one.feed, trainable=one.trainable, objective=next_token)
    list(loop.rows())
    changed = {name for name, value in tiny.vlm.named_parameters() if not torch.equal(value, before[name])}
    # Of the embedding only rows of tokens that occur change, but the tensor does.
    assert changed == set(one.trainable.names)
    assert changed


def test_tensors_that_nothing_depends_on_are_left_out_with_the_reason(tiny):
    one = prepared(tiny, trainable=["vision"])
    unused = tiny.config.vision.num_used_layers
    eva = tiny.config.connector.kind == "qformer"  # whose keys have no bias
    assert set(one.trainable.idle) == {
        name
        for name, _ in tiny.vlm.named_parameters()
        if name.startswith((f"vision.layers.{unused}.", "vision.norm_post."))
        or (eva and name.startswith("vision.") and name.endswith("k.bias"))
    }
    text = "\n".join(describe_trainable(tiny.vlm, one.trainable))
    reason = f"features leave the tower after block {unused} of {tiny.config.vision.num_layers}"
    assert (reason in text) == (unused < tiny.config.vision.num_layers)


def test_training_only_what_nothing_depends_on_is_refused(tiny15):
    with pytest.raises(ConfigError, match="would train nothing: features leave the tower after block 2 of 3"):
        prepared(tiny15, trainable=["vision.norm_post"])


def test_a_newline_does_not_train_in_a_stage_whose_pictures_have_none(tmp_path):
    model = tiny_model(tmp_path, "llava_next")
    with_newlines = prepared(model, trainable=["newline", "connector"])
    assert "newline" in with_newlines.trainable.names
    square = CenterCrop(tile_size=model.config.vision.image_size).model_dump()
    without = prepared(model, trainable=["*"], resolution=square)
    assert "newline" not in without.trainable.names
    assert without.trainable.idle["newline"] == "pictures are laid out without newlines (resolution center_crop)"
    with pytest.raises(ConfigError, match="'newline' would train nothing: pictures are laid out without newlines"):
        prepared(model, trainable=["newline", "connector"], resolution=square)


def test_a_resolution_with_newlines_is_refused_for_a_model_without_one(tiny15):
    anyres = families.family("llava_next").tiny.config.resolution.model_dump()
    with pytest.raises(ConfigError, match="ends rows with a newline, which this model does not have"):
        prepared(tiny15, resolution={**anyres, "tile_size": tiny15.config.vision.image_size})


def test_a_pattern_that_names_nothing_gets_the_nearest_name(tiny15):
    with pytest.raises(ConfigError, match=r"trainable 'conector' names no tensor .*did you mean 'connector'"):
        prepared(tiny15, trainable=["conector"])


def test_a_frozen_tower_is_run_without_recording_a_graph(tiny15):
    seen = []
    hook = tiny15.vlm.vision.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    other = tiny15.vlm.connector.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    try:
        for trainable, expected in (
            (["decoder"], [False, False]),
            (["connector"], [False, True]),
            (["vision"], [True, True]),
        ):
            one = prepared(tiny15, trainable=trainable, steps=1)
            seen.clear()
            list(StageLoop(tiny15.vlm, one.feed, trainable=one.trainable, objective=next_token).rows())
            assert seen == expected
    finally:
        hook.remove()
        other.remove()


def test_nothing_is_differentiated_below_the_lowest_tensor_that_trains(tiny15):
    """With only the last block training, the block before it hands on states without a graph."""
    layers = tiny15.vlm.decoder.layers
    seen = []
    hook = layers[-2].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    try:
        one = prepared(tiny15, trainable=[f"decoder.layers.{len(layers) - 1}"], steps=1)
        list(StageLoop(tiny15.vlm, one.feed, trainable=one.trainable, objective=next_token).rows())
    finally:
        hook.remove()
    assert seen == [False]


def test_a_tensor_that_should_train_but_gets_no_gradient_is_named(tiny15):
    def objective(vlm: VLM, batch: Batch) -> Loss:
        return Loss(next_token(vlm, batch).total.detach() + vlm.decoder.norm.weight.sum(), 1)

    one = prepared(tiny15, trainable=["decoder"])
    with pytest.raises(TrainError, match=r"20 of 21 tensors that should train received no gradient: decoder.embed"):
        list(StageLoop(tiny15.vlm, one.feed, trainable=one.trainable, objective=objective).rows())


def test_a_frozen_tensor_with_a_gradient_is_named(tiny15):
    trained = set_trainable(tiny15.vlm, choose(tiny15.vlm, ["connector"], idle={}))
    check = GradientCheck(tiny15.vlm, trained)
    tiny15.vlm.decoder.norm.weight.grad = torch.zeros_like(tiny15.vlm.decoder.norm.weight)
    with pytest.raises(TrainError, match=r"frozen tensor 'decoder.norm.weight' received a gradient"):
        check(with_pictures=True)
    tiny15.vlm.decoder.norm.weight.grad = None


def test_a_first_step_without_pictures_does_not_accuse_the_connector(tiny15):
    class TextFirst(DrawnSource):
        def sample(self, index, epoch):
            return super().sample(4 if epoch == 0 else 0, epoch)

    one = prepared(tiny15, source=TextFirst(4), trainable=["connector", "decoder"], steps=3)
    loop = StageLoop(tiny15.vlm, one.feed, trainable=one.trainable, objective=next_token)
    rows = list(loop.rows())
    assert [row["image_tokens"] > 0 for row in rows] == [False, True, True]


def test_idle_tensors_of_every_preset_are_the_blocks_and_norm_after_the_features():
    for preset in families.all_presets():
        config = preset.config
        vision = config.vision
        idle = idle_tensors(on_meta(config), config)
        unused = {f"vision.layers.{index}" for index in range(vision.num_used_layers, vision.num_layers)}
        norm = {"vision.norm_post.weight", "vision.norm_post.bias"} if vision.last_norm else set()
        fixed = {"connector.positions"} if config.connector.kind == "resampler" else set()
        assert {".".join(name.split(".")[:3]) for name in idle} == unused | norm | fixed


def test_any_module_can_be_trained_with_an_objective_of_its_own(tiny15):
    """The demo trains a tower under a head of its own before the published stages begin."""

    class Dense(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = tiny15.vlm.vision
            self.head = torch.nn.Linear(tiny15.config.vision.out_dim, 3)

    class Pictures(DrawnSource):
        def sample(self, index, epoch):
            return Encoder(tiny15.config, tiny15.tokenizer).encode(super().sample(index, epoch), mode="train")

    def objective(module: Dense, batch: Batch) -> Loss:
        scores = module.head(module.vision(batch.patches, batch.grids))
        return Loss(scores.square().sum(), scores.shape[0])

    module = Dense()
    rows = train_stage(
        module,
        stage(trainable=["vision.layers.0", "head"], steps=4, schedule={"kind": "constant"}),
        Pictures(4, with_text=False),
        objective=objective,
    )
    assert rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(Exception, match="no tokenizer was given"):
        train_stage(module, stage(trainable=["head"]), DrawnSource(4), objective=objective)
