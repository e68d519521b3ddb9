"""Building the module of a merged convolution, and casting its weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra.affine import Affine
from nmconv.algebra.geometry import Geometry
from nmconv.algebra.merged_conv import MergedConv

__all__ = ["conv_from_affine", "conv_module", "is_finite", "reference_tensor"]

_LOST_DIGITS = 8  # weights this many times below the smallest normal number have three bits fewer


class _Uninitialized:
    """A mixin that skips initialization, which takes longer than all the rest, even on the meta device."""

    def reset_parameters(self) -> None:
        """Do nothing: the weights are set afterwards."""


_CLASSES: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UNINITIALIZED: dict[int, Any] = {rank: type(cls.__name__, (_Uninitialized, cls), {}) for rank, cls in _CLASSES.items()}


def conv_module(geometry: Geometry, like: Tensor) -> nn.Module:
    """Return a module of this geometry without values for its weights, of torch's own class if that suffices.

    Args:
        geometry: Of the convolution.
        like: A tensor with the dtype and device of the parameters.
    """
    if not _fits_torchs_class(geometry):
        return MergedConv(geometry, like)
    module: nn.Module = _UNINITIALIZED[geometry.rank](
        geometry.in_channels, geometry.out_channels, geometry.kernel, geometry.stride,
        tuple(left for left, _ in geometry.padding), geometry.dilation, geometry.groups, geometry.bias, geometry.mode,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip
    module.__class__ = _CLASSES[geometry.rank]
    return module


def _fits_torchs_class(geometry: Geometry) -> bool:
    symmetric = all(left == right for left, right in geometry.padding)
    return symmetric and not (geometry.bounded or geometry.stages or geometry.crop or geometry.pooled)


def conv_from_affine(affine: Affine, like: Tensor, requires_grad: bool) -> nn.Module:
    """Return a module in eval mode that computes ``affine``, with the dtype and device of ``like``.

    Args:
        affine: The convolution, usually in float64 on the CPU.
        like: A tensor with the dtype and device of the parameters.
        requires_grad: Whether the parameters require gradients.

    Raises:
        ValueError: If a value is outside of the dtype's range, or all weights are so small that few of their digits are
            left.
    """
    module: Any = conv_module(affine.geometry, torch.empty(0, dtype=like.dtype, device="meta"))  # all is set below
    for name in ("weight", "bias", "border"):
        value = getattr(affine, name)
        if value is None:
            continue
        cast = affine.cast(like.dtype) if name == "weight" else value.detach().to(like.dtype)
        if not cast.is_meta:
            _check_range(cast, name, affine)
        data = cast.to(like.device).contiguous()
        if data.data_ptr() == value.data_ptr():  # the cast was a no-op: do not alias the original's memory
            data = data.clone()
        setattr(module, name, nn.Parameter(data, requires_grad))
    module.train(False)
    return module


def _check_range(cast: Tensor, name: str, affine: Affine) -> None:
    if name == "weight" and cast.numel():
        low, high = map(float, torch.aminmax(cast))  # NaN if any element is; much faster than any norm
        largest = max(-low, high)
        is_tiny = largest < torch.finfo(cast.dtype).tiny / _LOST_DIGITS
        if is_tiny and float(affine.dense().weight.abs().max()) > 0:
            raise ValueError(f"the merged weights are too small for {cast.dtype} (at most {largest:.1g})")
        fits = math.isfinite(largest)
    else:
        fits = is_finite(cast)
    if not fits and is_finite(getattr(affine.dense(), name)):
        raise ValueError(f"a merged {name} does not fit into {cast.dtype}")


def is_finite(value: Tensor) -> bool:
    """Return whether all elements are finite; a finite sum proves it faster, a sum that overflows proves nothing."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def reference_tensor(module: nn.Module) -> Tensor:
    """Return a tensor with a module's dtype and device: a parameter, since a weight computed by a hook may be stale."""
    parameter = next(module.parameters(), None)
    if parameter is not None:
        return parameter
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight
