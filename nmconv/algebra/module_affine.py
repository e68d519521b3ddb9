"""What a module of a run computes in eval mode, with its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from nmconv.algebra.affine import Affine, of_norm
from nmconv.algebra.geometry import Geometry, Refusal
from nmconv.algebra.merged_conv import MergedConv
from nmconv.algebra.module_geometry import norm_of
from nmconv.copying import copy_of
from nmconv.flow import has_plain_weight

__all__ = ["affine_in_double", "affine_of", "doubled", "has_plain_parameter", "weight_of"]


def affine_of(module: nn.Module, kind: str, geometry: Geometry) -> Affine:
    """A convolution or norm with its numbers, as they are: in its dtype, on its device, with their history."""
    if kind == "norm":
        return of_norm(*norm_of(module), geometry.rank)
    assert isinstance(module, _ConvNd)
    border = module.border if isinstance(module, MergedConv) else None
    return Affine(geometry, weight_of(module), module.bias, border)


def affine_in_double(module: nn.Module, kind: str, geometry: Geometry) -> Affine:
    """The same computed in float64, on the CPU (or without data, on the meta device), without history.

    Of a convolution only ``dense()`` is in float64: its weight waits for what it is multiplied by.
    """
    with torch.no_grad():
        if kind == "norm":
            scale, shift = norm_of(module, torch.float64)
            return of_norm(_moved(scale), _moved(shift), geometry.rank)
        if not has_plain_parameter(module):
            module = doubled(module)
        made = affine_of(module, kind, geometry)
        bias = None if made.bias is None else _moved(made.bias)
        border = None if made.border is None else _moved(made.border)
        weight = _moved(made.weight, made.weight.dtype)  # large: the product with the scale is float64
        return Affine(
            geometry, weight, bias, border, scale=torch.ones(len(weight), dtype=torch.float64, device=weight.device)
        )


def _moved(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", dtype)


def _base(module: nn.Module) -> Any:
    """The class it had before its padding moved, or it went live."""
    return getattr(type(module), "_nmconv_base", type(module))


def _has_own_weight(module: nn.Module) -> bool:
    """Whether what it convolves with is called ``weight`` (which a parametrization may compute)."""
    base = _base(module)
    torchs = base.forward.__module__.startswith("torch.nn.")
    return torchs or isinstance(module, MergedConv) or has_plain_weight(base)


def has_plain_parameter(module: Any) -> bool:
    """Whether what a convolution convolves with is its parameter ``weight`` as it stands."""
    weight = module._parameters.get("weight")
    return _has_own_weight(module) and isinstance(weight, nn.Parameter) and not module._forward_pre_hooks


def weight_of(module: Any) -> Tensor:
    """The weight that a convolution convolves with: standardised, normalised or as it is."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            made: Tensor = hook.compute_weight(module)
            return made
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            made = hook.compute_weight(module, do_power_iteration=False)
            return made
    if _has_own_weight(module):
        weight: Tensor = module.weight
        return weight
    base = _base(module)
    with _Watched() as watched:
        sizes = [gap * (size - 1) + step for size, gap, step in _per_axis(module)]
        base.forward(module, module.weight.new_zeros(1, module.in_channels, *sizes))
    if len(watched.weights) != 1:
        raise Refusal(f"{type(module).__name__} makes {len(watched.weights)} convolutions")
    return watched.weights[0]


def _per_axis(module: Any) -> Any:
    return zip(module.kernel_size, module.dilation, module.stride, strict=True)


class _Watched(TorchFunctionMode):
    """Notes the weights that convolutions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("conv1d", "conv2d", "conv3d"):
            self.weights.append(args[1] if len(args) > 1 else (kwargs or {})["weight"])
        return function(*args, **(kwargs or {}))


def doubled(module: nn.Module) -> nn.Module:
    """A copy in float64, on the CPU (or without data, on the meta device)."""
    meta = any(value.is_meta for value in module.parameters())
    return copy_of(module).to("meta" if meta else "cpu", torch.float64)
