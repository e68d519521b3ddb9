"""What a module of a linear run computes in eval mode, in numbers: its geometry as a convolution."""

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
    "BEFORE",
    "PADS",
    "Padding",
    "averages",
    "before_hoisting",
    "check_hooks",
    "geometry_of",
    "norm_of",
    "per_axis",
]

PADS = "_nmconv_pads"  # on a convolution whose padding was changed and that torch's attributes cannot say: its Geometry
BEFORE = "_nmconv_padding"  # on a convolution whose padding was hoisted: the Padding it had

_PADS = (
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)
_AVERAGES: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}  # and their spatial axes


@dataclass(frozen=True)
class Padding:
    """How a convolution pads; see :class:`nmconv.algebra.Geometry`, whose attributes these are."""

    padding: tuple[tuple[int, int], ...]
    mode: str
    stages: tuple[tuple[Stage, ...], ...]


def averages(module: nn.Module) -> bool:
    """Whether the module is an average pool over whole windows: a convolution that weighs all alike."""
    pool: Any = module
    if type(module) not in _AVERAGES or pool.ceil_mode or getattr(pool, "divisor_override", None) is not None:
        return False
    return not any(per_axis(pool.padding, _AVERAGES[type(module)]))


def before_hoisting(named: Callable[[str], nn.Module]) -> Callable[[str, Geometry], Geometry]:
    """From a module's name and geometry to the geometry it had before its padding was hoisted."""

    def before(name: str, geometry: Geometry) -> Geometry:
        held = named(name).__dict__.get(BEFORE)
        if held is None:
            return geometry
        return replace(geometry, padding=held.padding, mode=held.mode, stages=held.stages)

    return before


def check_hooks(module: nn.Module, name: str) -> None:
    """Refuse a module whose hooks would no longer see what they see now (weight norm's own are understood)."""
    if not all(isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == "weight" for hook in hooks_of(module)):
        raise Refusal(f"{name} has a hook, which would not run any more: remove it first")


def geometry_of(module: nn.Module, kind: str, channels: int, rank: int) -> Geometry:
    """The module's geometry.

    Args:
        module: Of a step of the kind given.
        kind: ``conv``, ``norm``, ``pad`` or ``pool``.
        channels: What comes in.
        rank: Spatial axes.

    Raises:
        Refusal: If it is no convolution with fixed numbers, and why.
    """
    _check_not_registered(module)
    if kind == "norm":
        _check_norm(module)
        return diagonal(channels, rank)
    if kind == "pad":
        return _of_pad(module, channels, rank)
    if kind == "pool":
        return _of_pool(module, channels, rank)
    own = getattr(module, "geometry", None)
    if isinstance(own, Geometry):  # a merged convolution
        return own
    if isinstance(module, _ConvTransposeNd):
        raise Refusal(f"{type(module).__name__} is transposed")
    if not isinstance(module, _ConvNd) or type(module).__module__.startswith("torch.ao."):
        raise Refusal(f"{type(module).__name__} is no single convolution")
    if not (module.weight.is_floating_point() and module.weight.dtype.itemsize > 1):
        raise Refusal(f"its weight is {module.weight.dtype}")
    hoisted: Geometry | None = module.__dict__.get(PADS)
    if hoisted is not None:
        return hoisted
    kernel = tuple(module.kernel_size)
    dilation = tuple(1 if size == 1 else gap for size, gap in zip(kernel, module.dilation, strict=True))
    extent = [gap * (size - 1) + 1 for size, gap in zip(kernel, dilation, strict=True)]
    stages: list[tuple[Stage, ...]] = [()] * len(kernel)
    if pads_same(module):
        padding = []
        for axis, step in enumerate(module.stride):
            stage = Stage(extent[axis], step, -1, -1)
            fixed = step == 1 or extent[axis] == 1
            padding.append(stage.pads(extent[axis]) if fixed else (0, 0))
            stages[axis] = () if fixed else (stage,)
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


def norm_of(module: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in eval mode, each ``[channels]``.

    Args:
        module: The norm.
        dtype: To compute in; the module's own if None.

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
    """Refuse a norm whose statistics depend on the input."""
    _check_not_registered(module)
    if not (isinstance(module, (_BatchNorm, _InstanceNorm)) or is_frozen_norm(module)):
        raise Refusal(f"{type(module).__name__} has no fixed scale in eval mode")
    unused = isinstance(module, _InstanceNorm) and not module.track_running_stats  # though it may have them
    if module.running_mean is None or module.running_var is None or unused:
        raise Refusal(
            f"a {type(module).__name__} goes by no running statistics, so that its scale depends on the input"
        )


def _check_not_registered(module: nn.Module) -> None:
    """Refuse a module of which nothing is known but what the user said."""
    kind = registered_kind(module)
    if kind:
        raise Refusal(f"{type(module).__name__} is registered as {kind!r}, and its numbers are not known")


def _of_pool(module: Any, channels: int, rank: int) -> Geometry:
    if _AVERAGES[type(module)] != rank:
        raise Refusal(f"{type(module).__name__} averages over other axes than the {rank} spatial ones")
    kernel, stride = (per_axis(value, rank) for value in (module.kernel_size, module.stride))
    return Geometry(channels, channels, kernel, stride, (1,) * rank, channels, ((0, 0),) * rank, bias=False)


def per_axis(value: Any, rank: int) -> tuple[int, ...]:
    """A pool's setting for each axis, from any form that torch takes: a number, or a tuple or list of one or all."""
    parts = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return parts * rank if len(parts) == 1 else parts


def _of_pad(module: Any, channels: int, rank: int) -> Geometry:
    kind = type(module).__name__
    if not isinstance(module, _PADS):
        crop = crop_of_module(module, rank)
        if crop is None:
            raise Refusal(f"{kind} does more than crop the {rank} spatial axes")
        return cropped(channels, crop)
    pads = list(module.padding)
    pairs = [(pads[at], pads[at + 1]) for at in reversed(range(0, len(pads), 2))]
    names = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}
    mode = next(
        (mode for name, mode in names.items() if any(name in c.__name__ for c in type(module).__mro__)), "zeros"
    )
    if len(pairs) != rank or (mode != "zeros" and any(extent < 0 for pair in pairs for extent in pair)):
        raise Refusal(f"{kind} does more than pad the {rank} spatial axes")
    if getattr(module, "value", 0) != 0 and any(extent > 0 for pair in pairs for extent in pair):
        raise Refusal(f"{kind} pads with {module.value}")
    kept = [(max(left, 0), max(right, 0)) for left, right in pairs]
    made = padded(channels, kept, mode if any(map(any, kept)) else "zeros")
    crop = tuple((max(-left, 0), max(-right, 0)) for left, right in pairs)
    return replace(made, crop=crop) if any(map(any, crop)) else made
