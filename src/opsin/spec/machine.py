"""Machines by name: what one device computes and holds, by its vendor. `parse_machine` reads "8xA100-80GB".

Numbers are dense (without the doubling for sparse matrices) and for matrix products: bfloat16 with float32 sums, and
plain float32, which is what torch multiplies in unless told otherwise. They were written down from memory of the
sources named: check before you quote one.
"""

import math
import re
from dataclasses import dataclass

from opsin.errors import ConfigError, UnknownNameError, nearest

UTILISATION = 0.4
"""Share of the peak that training reaches, computing blocks again counted as work. [ours] Llama-2's 184,320 hours of an
A100 for 7B (arXiv:2307.09288, table 2) are 0.39 by 6 N T, PaLM reached 0.46 (arXiv:2204.02311, table 3); short
sequences, small batches, slow connections and slow disks reach less."""


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    name: str
    half: float
    """Peak of half precision, FLOP/s."""
    single: float
    """Peak of float32, FLOP/s."""
    memory: int | None
    """Bytes; None where it differs from machine to machine."""
    source: str


@dataclass(frozen=True)
class Machine:
    """So many devices of one kind. What connects them is not described: it is part of the utilisation."""

    device: Device
    count: int = 1
    utilisation: float = UTILISATION
    """Share of the peak that is reached."""

    @property
    def name(self) -> str:
        """As `parse_machine` reads it."""
        return f"{self.count}x{self.device.name}"

    def peak(self, precision: str) -> float:
        """FLOP/s of all devices together. precision: as in `RunConfig`."""
        return self.count * (self.device.single if precision == "float32" else self.device.half)


def _device(name: str, half: float, single: float, memory: int | None, source: str) -> Device:
    return Device(name, half * 1e12, single * 1e12, None if memory is None else memory * 2**30, source)


DEVICES = (
    _device("A100-40GB", 312, 19.5, 40, "NVIDIA A100 Tensor Core GPU data sheet"),
    _device("A100-80GB", 312, 19.5, 80, "NVIDIA A100 Tensor Core GPU data sheet"),
    _device("H100", 989.4, 66.9, 80, "NVIDIA H100 Tensor Core GPU data sheet, SXM5"),
    _device("H100-PCIe", 756, 51.2, 80, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
    _device("H200", 989.4, 66.9, 141, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    _device("L4", 121, 30.3, 24, "NVIDIA L4 Tensor Core GPU data sheet"),
    _device("L40S", 362, 91.6, 48, "NVIDIA L40S data sheet"),
    _device("A10", 125, 31.2, 24, "NVIDIA A10 Tensor Core GPU data sheet"),
    _device("A6000", 154.8, 38.7, 48, "NVIDIA Ampere GA102 white paper, RTX A6000"),
    _device("RTX4090", 165.2, 82.6, 24, "NVIDIA Ada GPU architecture white paper, appendix A"),
    _device("RTX3090", 71, 35.6, 24, "NVIDIA Ampere GA102 white paper, appendix A"),
    _device("V100-16GB", 125, 15.7, 16, "NVIDIA V100 data sheet, SXM2; its half precision is float16, not bfloat16"),
    _device("V100-32GB", 125, 15.7, 32, "NVIDIA V100 data sheet, SXM2; its half precision is float16, not bfloat16"),
    _device("T4", 65, 8.1, 16, "NVIDIA T4 data sheet; its half precision is float16, not bfloat16"),
    _device("MI250X", 383, 95.7, 128, "AMD Instinct MI250X data sheet"),
    _device("MI300X", 1307.4, 163.4, 192, "AMD Instinct MI300X data sheet"),
    _device("cpu", 0.77, 0.77, None, "ours: 8 cores at 3 GHz, two 256-bit multiply-adds per cycle (AVX2)"),
)
_OTHER_NAMES = {"a100": "A100-80GB", "v100": "V100-16GB", "4090": "RTX4090", "3090": "RTX3090", "rtxa6000": "A6000"}
"""Names that people use as well; an A100 or V100 whose memory is not told is the one that is rented most often."""


def parse_machine(text: str) -> Machine:
    """A machine such as `8xA100-80GB`, `H100`, `2 x RTX 4090`, `4x8xA100-40G` (four times eight) or `cpu`.

    `8xA100-80GB@0.3` reaches 0.3 of its peak. Raises UnknownNameError with the nearest name, or ConfigError.
    """
    counts, (rest, _, share) = [], text.strip().partition("@")
    utilisation = UTILISATION if not share else _share(share, text)
    while found := re.match(r"(\d+)\s*[x×*]\s*", rest, re.IGNORECASE):
        counts.append(int(found[1]))
        rest = rest[found.end() :]
    known = {_plain(device.name): device for device in DEVICES}
    known |= {_plain(f"{device.name}-{(device.memory or 0) >> 30}GB"): device for device in DEVICES}
    device = known.get(_plain(_OTHER_NAMES.get(_plain(rest), rest)))
    if device is None or 0 in counts:
        names = [each.name for each in DEVICES]
        raise UnknownNameError(
            f"no machine is known as {text!r}{nearest(rest, names)}. Write a number and a name, such as 8xA100-80GB; "
            f"names: {', '.join(names)}"
        )
    return Machine(device, math.prod(counts), utilisation)


def _share(share: str, text: str) -> float:
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ConfigError(
            f"{text!r}: behind @ stands the share of the peak that is reached, such as 0.4, not {share!r}"
        )
    return value


def _plain(name: str) -> str:
    """Without what people write differently: case, spaces, dashes, the vendor, the unit of the memory."""
    plain = re.sub(r"[\s_-]|nvidia|amd|geforce|sxm\d?", "", name.lower())
    return re.sub(r"(\d+)gi?b$|(\d+)g$", r"\1\2", plain)
