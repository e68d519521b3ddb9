"""Description of the machine that runs the benchmark."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import nmconv
from nmconv.bench.results import Environment

__all__ = ["environment"]

_PACKAGES = ("torch", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def environment(device: torch.device) -> Environment:
    """Return the machine, the device, and the versions of the packages that compute."""
    versions = {"python": platform.python_version(), "nmconv": nmconv.__version__}
    versions |= {package: _version(package) for package in _PACKAGES}
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        versions=tuple(versions.items()),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """Return the processor's name and the instruction set that torch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
