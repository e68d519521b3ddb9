"""What a module of a linear run computes in eval mode, with its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from nmconv.algebra.affine import Affine, affine_of_norm
from nmconv.algebra.geometry import Geometry, Refusal
from nmconv.algebra.merged_conv import MergedConv
from nmconv.algebra.module_geometry import scale_and_shift_of
from nmconv.copying import copy_model
from nmconv.flow import has_plain_weight

__all__ = ["affine_in_double", "affine_of", "copy_in_float64", "has_plain_parameter"]


def affine_of(module: nn.Module, kind: str, geometry: Geometry) -> Affine:
    """Return a convolution or norm as an affine map in its own dtype, on its device, with its autograd history.

    Args:
        module: The module.
        kind: ``conv`` or ``norm``.
        geometry: Of the module.
    """
    if kind == "norm":
        return affine_of_norm(*scale_and_shift_of(module), geometry.rank)
    assert isinstance(module, _ConvNd)
    border = module.border if isinstance(module, MergedConv) else None
    return Affine(geometry, _effective_weight(module), module.bias, border)


def affine_in_double(module: nn.Module, kind: str, geometry: Geometry) -> Affine:
    """Return the same as :func:`affine_of`, in float64 on the CPU (or the meta device), detached.

    The large weight of a convolution keeps its dtype until :meth:`Affine.dense` multiplies it with its float64 scale.
    """
    with torch.no_grad():
        if kind == "norm":
            scale, shift = scale_and_shift_of(module, torch.float64)
            return affine_of_norm(_moved(scale), _moved(shift), geometry.rank)
        if not has_plain_parameter(module):
            module = copy_in_float64(module)
        affine = affine_of(module, kind, geometry)
        weight = _moved(affine.weight, affine.weight.dtype)
        return Affine(
            geometry,
            weight,
            bias=None if affine.bias is None else _moved(affine.bias),
            border=None if affine.border is None else _moved(affine.border),
            scale=torch.ones(len(weight), dtype=torch.float64, device=weight.device),
        )


def copy_in_float64(module: nn.Module) -> nn.Module:
    """Return a copy in float64 on the CPU (on the meta device if the module is there)."""
    is_meta = any(value.is_meta for value in module.parameters())
    return copy_model(module).to("meta" if is_meta else "cpu", torch.float64)


def has_plain_parameter(module: Any) -> bool:
    """Return whether a convolution uses its parameter ``weight`` as it is."""
    weight = module._parameters.get("weight")
    return _uses_its_weight(module) and isinstance(weight, nn.Parameter) and not module._forward_pre_hooks


def _moved(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", dtype)


def _original_class(module: nn.Module) -> Any:
    """Return the class that the module had before its padding was hoisted or its kernel became live."""
    return getattr(type(module), "_nmconv_base", type(module))


def _uses_its_weight(module: nn.Module) -> bool:
    """Return whether a convolution uses its attribute ``weight`` (which a parametrization may compute)."""
    cls = _original_class(module)
    is_torchs = cls.forward.__module__.startswith("torch.nn.")
    return is_torchs or isinstance(module, MergedConv) or has_plain_weight(cls)


def _effective_weight(module: Any) -> Tensor:
    """Return the weight that a convolution uses: standardized, normalized or as it is."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            normalized: Tensor = hook.compute_weight(module)
            return normalized
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            normalized = hook.compute_weight(module, do_power_iteration=False)
            return normalized
    if _uses_its_weight(module):
        weight: Tensor = module.weight
        return weight
    settings = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    sizes = [gap * (size - 1) + step for size, gap, step in settings]
    with _ConvWeights() as recorded:
        _original_class(module).forward(module, module.weight.new_zeros(1, module.in_channels, *sizes))
    if len(recorded.weights) != 1:
        raise Refusal(f"{type(module).__name__} makes {len(recorded.weights)} convolutions")
    return recorded.weights[0]


class _ConvWeights(TorchFunctionMode):
    """Records the weights that torch's convolution functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("conv1d", "conv2d", "conv3d"):
            self.weights.append(args[1] if len(args) > 1 else (kwargs or {})["weight"])
        return function(*args, **(kwargs or {}))
