"""`opsin env`: what a bug report needs to say."""

import os
import platform
import sys
from importlib import metadata
from typing import Annotated

import typer

PACKAGES = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "sentencepiece", "huggingface-hub", "pydantic")
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "OPSIN_CACHE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OPSIN_DEBUG")


def env(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions and devices, for bug reports.

    Examples:

        opsin env

        opsin env --json
    """
    facts = {**_versions(), **_hardware(), **_settings()}
    if json:
        from json import dumps

        typer.echo(dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {value}")


def _versions() -> dict[str, str]:
    from opsin import __version__

    versions = {"opsin": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _hardware() -> dict[str, str]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "gpu": ", ".join(devices) or "none",
        "bfloat16 kernels": "yes" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no (slower than float32)",
        "memory": f"{_memory() / 2**30:.1f} GiB",
    }


def _settings() -> dict[str, str]:
    from huggingface_hub import constants

    chosen = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {"model cache": constants.HF_HUB_CACHE, **chosen}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not on every system
        return 0
