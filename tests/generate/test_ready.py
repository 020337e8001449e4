"""Models made ready to answer: device and dtype."""

import pytest
import torch

from opsin import families, weights
from opsin.errors import ConfigError
from opsin.generate.ready import choose_device, load_ready


@pytest.fixture(scope="module")
def half(tmp_path_factory, tokenizer):
    """A folder with float16 weights, as most models are published."""
    folder = tmp_path_factory.mktemp("half") / "model"
    config = families.preset("llava-1.5-tiny").config
    weights.save_native(folder, weights.build(config, dtype=torch.float16), config, tokenizer)
    return folder


def dtype_of(model):
    return {parameter.dtype for parameter in model.vlm.parameters()}


def test_float16_is_not_computed_with_on_a_cpu_unless_asked_for(half):
    fast = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    assert dtype_of(load_ready(half, device="cpu")) == {fast}
    assert dtype_of(load_ready(half, device="cpu", dtype="float32")) == {torch.float32}
    assert dtype_of(load_ready(half, device="cpu", dtype="float16")) == {torch.float16}


def test_devices_are_checked_before_anything_is_loaded():
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="device 'gpu' is not known"):
        load_ready("nowhere", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="has no GPU to offer"):
            choose_device("cuda:1")
