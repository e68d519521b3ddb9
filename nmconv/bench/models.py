"""Building a network to measure: the one place here that knows timm, torchvision and files of weights."""

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

__all__ = ["build", "settle_norms"]

_PREFIX = "torchvision:"


def build(name: str, weights: str = "") -> nn.Module:
    """A network in eval mode, the same each time.

    Args:
        name: timm's, or ``torchvision:`` and the name of one of its classifiers.
        weights: Path of a state dict (``.safetensors``, or what ``torch.load`` reads safely); "" for random weights.

    Raises:
        OptionError: For an unknown name, or where timm or torchvision is missing.
        FileError: For weights that cannot be read or do not fit.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision, on how it draws weights
        torch.manual_seed(0)
        model = _torchvision(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else _timm(name)
    if weights:
        try:
            model.load_state_dict(_state_dict(weights))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise FileError(f"{weights}: no weights for {name} ({reason[:300]})") from error
    return model.eval()


def settle_norms(model: nn.Module, example: Tensor) -> None:
    """Give untrained batch norms statistics and scales of their own, so that folding them is real.

    Scales and shifts are drawn from a fixed seed; then one forward measures the statistics, so that nothing overflows
    or vanishes on its way through a deep network. (Denormal numbers are slow.)

    Args:
        model: In eval mode; changed.
        example: A batch, of several images.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    drawn = torch.Generator().manual_seed(0)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        if norm.affine:
            size = norm.weight.shape
            norm.weight.data.copy_(torch.rand(size, generator=drawn) + 0.5)
            norm.bias.data.copy_(torch.randn(size, generator=drawn) * 0.1)
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches: of the one
        norm.train()
    try:
        with torch.no_grad():
            model(example)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _timm(name: str) -> nn.Module:
    timm = _imported("timm")
    if not timm.is_model(name):
        raise _unknown(name, "timm", timm.list_models())
    return timm.create_model(name, pretrained=False)


def _torchvision(name: str) -> nn.Module:
    models = _imported("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown(name, "torchvision's classifiers", known)
    return models.get_model(name, weights=None)


def _imported(package: str) -> ModuleType:
    try:
        return __import__(package)
    except ImportError as error:
        raise OptionError(f"{package} is not installed: pip install 'nmconv[bench]'") from error


def _unknown(name: str, where: str, known: list[str]) -> OptionError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"torchvision's are named {_PREFIX}NAME"
    return OptionError(f"model={name!r} is not one of {where}: {hint}")


def _state_dict(path: str) -> dict[str, Any]:
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    return found.get("state_dict", found)
