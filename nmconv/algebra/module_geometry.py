"""The geometry of a module of a linear run in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from nmconv.algebra.geometry import Geometry, Refusal, Stage, cropped, diagonal, padded
from nmconv.flow import crop_of_module, hooks_of, is_frozen_norm, pads_same, registered_kind

__all__ = [
    "PADDED_GEOMETRY",
    "PADDING_BEFORE_HOIST",
    "Padding",
    "before_hoisting",
    "check_hooks",
    "geometry_of",
    "is_average_pool",
    "scale_and_shift_of",
]

PADDED_GEOMETRY = (
    "_nmconv_pads"  # on a convolution with changed padding that torch's attributes cannot express: its Geometry
)
PADDING_BEFORE_HOIST = "_nmconv_padding"  # on a convolution whose padding was hoisted: its former Padding

_PADS = (
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)
_MODES = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}  # by part of a class name
_AVERAGES: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}  # number of spatial axes


@dataclass(frozen=True)
class Padding:
    """The padding of a convolution; the attributes are those of :class:`nmconv.algebra.Geometry`."""

    padding: tuple[tuple[int, int], ...]
    mode: str
    stages: tuple[tuple[Stage, ...], ...]


def is_average_pool(module: nn.Module) -> bool:
    """Return whether the module is an average pool over whole windows, which is a convolution with equal weights."""
    pool: Any = module
    if type(module) not in _AVERAGES or pool.ceil_mode or getattr(pool, "divisor_override", None) is not None:
        return False
    return not any(_per_axis(pool.padding, _AVERAGES[type(module)]))


def before_hoisting(named: Callable[[str], nn.Module]) -> Callable[[str, Geometry], Geometry]:
    """Return a function from a module's name and geometry to its geometry before its padding was hoisted.

    Args:
        named: Returns the module of a name.
    """

    def before(name: str, geometry: Geometry) -> Geometry:
        former = named(name).__dict__.get(PADDING_BEFORE_HOIST)
        if former is None:
            return geometry
        return replace(geometry, padding=former.padding, mode=former.mode, stages=former.stages)

    return before


def check_hooks(module: nn.Module, name: str) -> None:
    """Raise Refusal if the module has hooks other than those of weight and spectral norm."""
    if not all(isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == "weight" for hook in hooks_of(module)):
        raise Refusal(f"{name} has a hook, which would not run any more: remove it first")


def geometry_of(module: nn.Module, kind: str, channels: int, rank: int) -> Geometry:
    """Return the module's geometry.

    Args:
        module: The module.
        kind: ``conv``, ``norm``, ``pad`` or ``pool``.
        channels: Number of input channels; only read for norms, pads and pools.
        rank: Number of spatial axes; only read for norms, pads and pools.

    Raises:
        Refusal: If it is not a convolution with fixed weights, with the reason.
    """
    _check_not_registered(module)
    if kind == "norm":
        _check_norm(module)
        return diagonal(channels, rank)
    if kind == "pad":
        return _geometry_of_pad(module, channels, rank)
    if kind == "pool":
        return _geometry_of_pool(module, channels, rank)
    geometry = getattr(module, "geometry", None)
    if isinstance(geometry, Geometry):  # a merged convolution
        return geometry
    _check_conv(module)
    hoisted: Geometry | None = module.__dict__.get(PADDED_GEOMETRY)
    return _geometry_of_conv(module) if hoisted is None else hoisted


def scale_and_shift_of(module: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a norm in eval mode, each ``[channels]``.

    Args:
        module: The norm.
        dtype: The dtype to compute in; None for the module's own.

    Raises:
        Refusal: If its statistics depend on the input.
    """
    _check_norm(module)
    mean, variance, weight, bias = (
        value if value is None or dtype is None else value.to(dtype)
        for value in (module.running_mean, module.running_var, module.weight, module.bias)
    )
    scale = (variance + module.eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _check_norm(module: Any) -> None:
    """Raise Refusal if the statistics of a norm depend on the input."""
    _check_not_registered(module)
    if not (isinstance(module, (_BatchNorm, _InstanceNorm)) or is_frozen_norm(module)):
        raise Refusal(f"{type(module).__name__} has no fixed scale in eval mode")
    ignored = isinstance(module, _InstanceNorm) and not module.track_running_stats  # though it may have statistics
    if module.running_mean is None or module.running_var is None or ignored:
        raise Refusal(f"a {type(module).__name__} uses no running statistics, so that its scale depends on the input")


def _check_not_registered(module: nn.Module) -> None:
    """Raise Refusal for a module that is known only by :func:`nmconv.register`."""
    kind = registered_kind(module)
    if kind:
        raise Refusal(f"{type(module).__name__} is registered as {kind!r}, and its numbers are not known")


def _check_conv(module: nn.Module) -> None:
    """Raise Refusal unless the module is a plain convolution in a floating-point dtype."""
    if isinstance(module, _ConvTransposeNd):
        raise Refusal(f"{type(module).__name__} is transposed")
    if not isinstance(module, _ConvNd) or type(module).__module__.startswith("torch.ao."):
        raise Refusal(f"{type(module).__name__} is not a single convolution")
    if not (module.weight.is_floating_point() and module.weight.dtype.itemsize > 1):
        raise Refusal(f"its weight is {module.weight.dtype}")


def _geometry_of_conv(module: Any) -> Geometry:
    kernel = tuple(module.kernel_size)
    dilation = tuple(1 if size == 1 else gap for size, gap in zip(kernel, module.dilation, strict=True))
    extent = [gap * (size - 1) + 1 for size, gap in zip(kernel, dilation, strict=True)]
    stages: list[tuple[Stage, ...]] = [()] * len(kernel)
    if pads_same(module):
        padding = []
        for axis, step in enumerate(module.stride):
            stage = Stage(extent[axis], step, -1, -1)
            is_fixed = step == 1 or extent[axis] == 1
            padding.append(stage.pads(extent[axis]) if is_fixed else (0, 0))
            stages[axis] = () if is_fixed else (stage,)
    elif isinstance(module.padding, str):
        total = [size - 1 if module.padding == "same" else 0 for size in extent]
        padding = [(size // 2, size - size // 2) for size in total]
    else:
        padding = [(size, size) for size in module.padding]
    mode = module.padding_mode if any(map(any, padding)) or any(stages) else "zeros"
    return Geometry(
        module.in_channels, module.out_channels, kernel, tuple(module.stride), dilation, module.groups,
        tuple(padding), mode, tuple(stages) if any(stages) else (), (), module.bias is not None,
    )  # fmt: skip


def _geometry_of_pool(module: Any, channels: int, rank: int) -> Geometry:
    if _AVERAGES[type(module)] != rank:
        raise Refusal(f"{type(module).__name__} averages over other axes than the {rank} spatial ones")
    kernel, stride = (_per_axis(value, rank) for value in (module.kernel_size, module.stride))
    return Geometry(channels, channels, kernel, stride, (1,) * rank, channels, ((0, 0),) * rank, bias=False)


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    """Return a pool's setting for each axis: torch takes a number, or a tuple or list of one or all."""
    parts = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return parts * rank if len(parts) == 1 else parts


def _geometry_of_pad(module: Any, channels: int, rank: int) -> Geometry:
    kind = type(module).__name__
    if not isinstance(module, _PADS):
        crop = crop_of_module(module, rank)
        if crop is None:
            raise Refusal(f"{kind} does more than crop the {rank} spatial axes")
        return cropped(channels, crop)
    flat = list(module.padding)  # begins with the last axis
    pairs = [(flat[index], flat[index + 1]) for index in reversed(range(0, len(flat), 2))]
    class_names = [cls.__name__ for cls in type(module).__mro__]
    mode = next((mode for part, mode in _MODES.items() if any(part in name for name in class_names)), "zeros")
    if len(pairs) != rank or (mode != "zeros" and any(extent < 0 for pair in pairs for extent in pair)):
        raise Refusal(f"{kind} does more than pad the {rank} spatial axes")
    if getattr(module, "value", 0) != 0 and any(extent > 0 for pair in pairs for extent in pair):
        raise Refusal(f"{kind} pads with {module.value}")
    padding = [(max(left, 0), max(right, 0)) for left, right in pairs]
    geometry = padded(channels, padding, mode if any(map(any, padding)) else "zeros")
    crop = tuple((max(-left, 0), max(-right, 0)) for left, right in pairs)
    return replace(geometry, crop=crop) if any(map(any, crop)) else geometry
