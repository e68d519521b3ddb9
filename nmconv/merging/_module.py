"""The convolutions that merging puts into a model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from nmconv.merging._algebra import Affine, apply, response, sizes_of
from nmconv.planning import Geometry

__all__ = ["MergedConv", "conv_module", "filled", "is_finite", "is_plain"]


class MergedConv(nn.modules.conv._ConvNd):
    """A convolution that torch's own classes cannot say: with a border term, or with padding that is not symmetric.

    ``out = conv(pad(input), weight) + bias + conv(ones, border)``; the last term is the response of biases that end at
    the border of an inner map. It depends on the input's size only, and is kept for the last size it was computed for.

    Args:
        geometry: Its extents; input ``[batch, in, *sizes]`` or ``[in, *sizes]``.
        like: Gives dtype and device.
    """

    _nmconv_leaf: ClassVar[bool] = True
    border: nn.Parameter | None

    def __init__(self, geometry: Geometry, like: Tensor) -> None:
        rank = geometry.rank
        super().__init__(
            geometry.in_channels, geometry.out_channels, geometry.kernel, geometry.stride, (0,) * rank,
            geometry.dilation, False, (0,) * rank, geometry.groups, geometry.bias, "zeros",
            device=like.device, dtype=like.dtype,
        )  # fmt: skip
        self.geometry = geometry
        self._kept: tuple[Any, Tensor] | None = None
        if geometry.bounded:
            self.border = nn.Parameter(like.new_zeros(geometry.out_channels, 1, *geometry.border_kernel))
        else:
            self.register_parameter("border", None)

    def reset_parameters(self) -> None:
        """Draw nothing: the weights are given afterwards."""

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, in, *sizes]`` to ``[batch, out, *sizes]``."""
        result = apply(input, self.geometry, self.weight, self.bias, None)
        return result if self.border is None else result + self._response(input, result.dtype)

    def _response(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        sizes = sizes_of(input, self.geometry.rank)
        assert self.border is not None
        # While compiling (and exporting) too: there, a map that was kept could go stale unnoticed.
        if torch.compiler.is_compiling() or isinstance(input, Proxy):
            return response(self.geometry, self.border, sizes)
        if torch.is_grad_enabled() and self.border.requires_grad:
            self._kept = None  # the border may be about to change
            return response(self.geometry, self.border, sizes)
        version = 0 if self.border.is_inference() else self.border._version
        key = (sizes, dtype, input.device, version)
        kept = self._kept
        if kept is not None and kept[0] == key:
            return kept[1]
        made = response(self.geometry, self.border, sizes)
        if not torch.is_inference_mode_enabled():
            self._kept = (key, made)
        return made

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """As torch's, with the padding as it is."""
        geometry = self.geometry
        text = f"{geometry.in_channels}, {geometry.out_channels}, kernel_size={geometry.kernel}"
        text += f", stride={geometry.stride}, padding={geometry.padding}, dilation={geometry.dilation}"
        text += f", groups={geometry.groups}, bias={geometry.bias}, border={bool(geometry.bounded)}"
        text += f", crop={geometry.crop}" if geometry.crop else ""
        return text + (f", padding_mode={geometry.mode}" if geometry.mode != "zeros" else "")


class _Bare:
    """Draws nothing: on the meta device too, initialising takes longer than all the rest."""

    def reset_parameters(self) -> None:
        """The weights are given afterwards."""


_CLASSES: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BARE: dict[int, Any] = {rank: type(cls.__name__, (_Bare, cls), {}) for rank, cls in _CLASSES.items()}


def is_plain(geometry: Geometry) -> bool:
    """Whether one of torch's own classes says it all."""
    symmetric = all(left == right for left, right in geometry.padding)
    return symmetric and not (geometry.bounded or geometry.stages or geometry.crop)


def conv_module(geometry: Geometry, like: Tensor) -> nn.Module:
    """A module of this geometry with its weights not set: torch's own class where that is enough."""
    if not is_plain(geometry):
        return MergedConv(geometry, like)
    made: nn.Module = _BARE[geometry.rank](
        geometry.in_channels, geometry.out_channels, geometry.kernel, geometry.stride,
        tuple(left for left, _ in geometry.padding), geometry.dilation, geometry.groups, geometry.bias, geometry.mode,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip
    made.__class__ = _CLASSES[geometry.rank]
    return made


def is_finite(value: Tensor) -> bool:
    """Whether all of its numbers are: a finite sum says so much sooner, though one that overflows says nothing."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def filled(affine: Affine, like: Tensor, requires_grad: bool) -> nn.Module:
    """A module that computes ``affine``, its numbers cast to the dtype and device of ``like``.

    Raises:
        ValueError: If a number is out of the dtype's range.
    """
    module: Any = conv_module(affine.geometry, like)
    for name in ("weight", "bias", "border"):
        value = getattr(affine, name)
        if value is None:
            continue
        cast = affine.cast(like.dtype) if name == "weight" else value.detach().to(like.dtype)
        if not cast.is_meta and not is_finite(cast) and is_finite(getattr(affine.dense(), name)):
            raise ValueError(f"a merged {name} does not fit into {like.dtype}")
        setattr(module, name, nn.Parameter(cast.to(like.device).contiguous(), requires_grad))
    module.train(False)
    return module
