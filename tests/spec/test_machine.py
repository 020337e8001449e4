"""Machines as people write them."""

import pytest

from opsin.errors import ConfigError, UnknownNameError
from opsin.spec.machine import DEVICES, parse_machine


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("8xA100-80GB", "8xA100-80GB"),
        ("8x a100 40g", "8xA100-40GB"),
        ("16×A100-40G", "16xA100-40GB"),
        ("4x8xH100", "32xH100"),
        ("NVIDIA H100 PCIe", "1xH100-PCIe"),
        ("H100-SXM-80GB", "1xH100"),
        ("2 * RTX 4090", "2xRTX4090"),
        ("3090", "1xRTX3090"),
        ("V100", "1xV100-16GB"),
        ("cpu", "1xcpu"),
    ],
)
def test_a_machine_is_known_however_it_is_written(text, name):
    assert parse_machine(text).name == name
    assert parse_machine(name).name == name


def test_names_tell_memory_and_peak():
    machine = parse_machine("8xA100-80GB")
    assert (machine.device.memory, machine.peak("bfloat16")) == (80 * 2**30, 8 * 312e12)
    assert machine.peak("float32") == 8 * 19.5e12
    assert parse_machine("8xA100-80GB@0.25").utilisation == 0.25


def test_every_device_has_a_source_and_a_plausible_balance():
    for device in DEVICES:
        assert device.source
        assert 1 <= device.half / device.single < 20
    assert len({device.name for device in DEVICES}) == len(DEVICES)


@pytest.mark.parametrize("text", ["", "8x", "8xH10", "0xH100", "H100x8"])
def test_an_unknown_machine_is_refused_with_the_names(text):
    with pytest.raises(UnknownNameError, match="Write a number and a name, such as 8xA100-80GB"):
        parse_machine(text)


@pytest.mark.parametrize("share", ["1.5", "0", "half", "nan"])
def test_a_share_of_the_peak_lies_between_0_and_1(share):
    with pytest.raises(ConfigError, match="share of the peak"):
        parse_machine(f"H100@{share}")
