"""What a module of a run computes in eval mode, as a convolution: its geometry, and its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from nmconv.graph import is_frozen_norm, pads_same
from nmconv.merging._algebra import Affine, of_norm
from nmconv.merging._geometry import Geometry, Refusal, Stage, diagonal, padded
from nmconv.merging._module import MergedConv

__all__ = ["affine_of", "check_hooks", "geometry_of", "norm_of", "weight_of"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_hooks(module: nn.Module, name: str) -> None:
    """Refuse a module whose hooks would no longer see what they see now (weight norm's own are understood)."""
    for kind in _HOOKS:
        for hook in getattr(module, kind, {}).values():
            if not isinstance(hook, (WeightNorm, SpectralNorm)):
                raise Refusal(f"{name} has a hook, which would not run any more: remove it first")


def geometry_of(module: nn.Module, kind: str, channels: int, rank: int) -> Geometry:
    """The module's geometry.

    Args:
        module: Of a step of the kind given.
        kind: ``conv``, ``norm`` or ``pad``.
        channels: What comes in.
        rank: Spatial axes.

    Raises:
        Refusal: If it is no convolution with fixed numbers, and why.
    """
    if kind == "norm":
        norm_of(module)
        return diagonal(channels, rank)
    if kind == "pad":
        return _of_pad(module, channels, rank)
    if isinstance(module, MergedConv):
        return module.geometry
    if isinstance(module, _ConvTransposeNd):
        raise Refusal(f"{type(module).__name__} is transposed")
    if not isinstance(module, _ConvNd):
        raise Refusal(f"{type(module).__name__} is no single convolution")
    if not (module.weight.is_floating_point() and module.weight.dtype.itemsize > 1):
        raise Refusal(f"its weight is {module.weight.dtype}")
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
    mode = module.padding_mode if any(map(any, padding)) else "zeros"
    return Geometry(
        module.in_channels, module.out_channels, kernel, tuple(module.stride), dilation, module.groups,
        tuple(padding), mode, tuple(stages) if any(stages) else (), (), module.bias is not None,
    )  # fmt: skip


def affine_of(module: nn.Module, kind: str, geometry: Geometry) -> Affine:
    """The module with its numbers, as they are: in its dtype, on its device, with their history for autograd."""
    if kind == "norm":
        return of_norm(*norm_of(module), geometry.rank)
    if kind == "pad":
        raise AssertionError("a pad has no numbers of its own")
    assert isinstance(module, _ConvNd)
    border = module.border if isinstance(module, MergedConv) else None
    return Affine(geometry, weight_of(module), module.bias, border)


def weight_of(module: Any) -> Tensor:
    """The weight that a convolution convolves with: standardised, normalised or as it is."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            made: Tensor = hook.compute_weight(module)
            return made
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            made = hook.compute_weight(module, do_power_iteration=False)
            return made
    if type(module).forward.__module__.startswith("torch.") or isinstance(module, MergedConv):
        weight: Tensor = module.weight
        return weight
    with _Watched() as watched:
        sizes = [gap * (size - 1) + step for size, gap, step in _per_axis(module)]
        module.forward(module.weight.new_zeros(1, module.in_channels, *sizes))
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


def norm_of(module: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in eval mode, each ``[channels]``.

    Raises:
        Refusal: If its statistics depend on the input.
    """
    if not (isinstance(module, (_BatchNorm, _InstanceNorm)) or is_frozen_norm(module)):
        raise Refusal(f"{type(module).__name__} has no fixed scale in eval mode")
    if module.running_mean is None or module.running_var is None:
        raise Refusal(f"a {type(module).__name__} keeps no running statistics, so that its scale depends on the input")
    scale = (module.running_var + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight
    shift = -module.running_mean * scale
    return scale, shift if module.bias is None else shift + module.bias


def _of_pad(module: Any, channels: int, rank: int) -> Geometry:
    if getattr(module, "value", 0) != 0:
        raise Refusal(f"{type(module).__name__} pads with {module.value}")
    pads = list(module.padding)
    pairs = [(pads[at], pads[at + 1]) for at in reversed(range(0, len(pads), 2))]
    if len(pairs) != rank or any(extent < 0 for pair in pairs for extent in pair):
        raise Refusal(f"{type(module).__name__} does more than pad the {rank} spatial axes")
    names = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}
    kind = next(
        (mode for name, mode in names.items() if any(name in c.__name__ for c in type(module).__mro__)), "zeros"
    )
    return padded(channels, pairs, kind if any(map(any, pairs)) else "zeros")


def double(affine: Affine) -> Affine:
    """The same in float64, on the CPU (or without data, on the meta device)."""

    def cast(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        return tensor.detach().to("meta" if tensor.is_meta else "cpu", torch.float64)

    return Affine(affine.geometry, cast(affine.weight), cast(affine.bias), cast(affine.border), affine.diagonal)
