"""Build a network by name: the only file of the benchmark that knows timm, torchvision and weight files."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nmconv.errors import FileError, OptionError

__all__ = ["build", "randomize_norms"]

_PREFIX = "torchvision:"


def build(name: str, weights: str = "") -> nn.Module:
    """Build a network in eval mode, with the same weights in every call.

    Args:
        name: A timm name, or ``torchvision:`` and the name of one of its classifiers.
        weights: Path of a state dict (``.safetensors``, or readable by ``torch.load(weights_only=True)``); "" for
            random weights.

    Raises:
        OptionError: If the name is unknown, or timm or torchvision is not installed.
        FileError: If the weights cannot be read or do not fit.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's, about weight initialization
        torch.manual_seed(0)
        model = _torchvision(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else _timm(name)
    if weights:
        try:
            model.load_state_dict(_state_dict(weights))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise FileError(
                f"{weights}: no weights for {name} ({reason[:300]}): give the path of a state dict of this network"
            ) from error
    return model.eval()


def randomize_norms(model: nn.Module, example: Tensor) -> None:
    """Give untrained batch norms nontrivial scales, shifts and statistics, in place.

    Scales and shifts are drawn from a fixed seed. One forward then measures the statistics, so that values neither
    overflow nor vanish in a deep network; denormal numbers would be slow.

    Args:
        model: A model in eval mode.
        example: A batch of several images.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    generator = torch.Generator().manual_seed(0)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        if norm.affine:
            size = norm.weight.shape
            norm.weight.data.copy_(torch.rand(size, generator=generator) + 0.5)
            norm.bias.data.copy_(torch.randn(size, generator=generator) * 0.1)
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average, here of one batch
        norm.train()
    try:
        with torch.no_grad():
            model(example)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _timm(name: str) -> nn.Module:
    timm = _import_package("timm")
    if not timm.is_model(name):
        raise _unknown_name(name, "timm", timm.list_models())
    return timm.create_model(name, pretrained=False)


def _torchvision(name: str) -> nn.Module:
    models = _import_package("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown_name(name, "torchvision's classifiers", known)
    return models.get_model(name, weights=None)


def _import_package(package: str) -> ModuleType:
    try:
        return __import__(package)
    except ImportError as error:
        raise OptionError(f"{package} is not installed: pip install 'nmconv[bench]'") from error


def _unknown_name(name: str, source: str, known: list[str]) -> OptionError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"torchvision's are named {_PREFIX}NAME"
    return OptionError(f"model={name!r} is not one of {source}: {hint}")


def _state_dict(path: str) -> dict[str, Any]:
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint.get("state_dict", checkpoint)
