"""The convolutions that merging puts into a model."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmconv.algebra.affine import Affine, apply, response, sizes_of
from nmconv.algebra.geometry import Geometry

__all__ = [
    "MergedConv",
    "channels_last",
    "conv_module",
    "filled",
    "is_channels_last",
    "is_finite",
    "is_plain",
    "laid_out",
    "like_of",
]


_BITS = 8  # times smaller than the least number that has all its digits: three bits fewer


class _Written:
    """What a parameter held, to tell whether it still does."""

    def __init__(self, value: Tensor) -> None:
        self._state = self._of(value)
        self._value = value
        # Writing through .data leaves no trace. Elsewhere than on a CPU, looking would make every call wait.
        self._copy = value.detach().clone() if value.device.type == "cpu" else None

    @staticmethod
    def _of(value: Tensor) -> tuple[int, int]:
        return value.data_ptr(), 0 if value.is_inference() else value._version

    def still(self, value: Tensor) -> bool:
        """Whether ``value`` is the same parameter with the same numbers."""
        if value is not self._value or self._of(value) != self._state:
            return False
        return self._copy is None or torch.equal(self._copy, value)


class MergedConv(nn.modules.conv._ConvNd):
    """A convolution that torch's own classes cannot say: with a border term, or with padding that is not symmetric.

    ``out = conv(pad(input), weight) + bias + conv(ones, border)``; the last term is the response of biases that end at
    the border of an inner map. It depends on the input's size and the border only, and is kept for the last of both.

    Args:
        geometry: Its extents; input ``[batch, in, *sizes]`` or ``[in, *sizes]``.
        like: Gives dtype and device.
    """

    _nmconv_leaf: ClassVar[bool] = True
    border: nn.Parameter | None

    def __init__(self, geometry: Geometry, like: Tensor) -> None:
        rank = geometry.rank
        super().__init__(
            geometry.in_channels, geometry.out_channels, (1,) * rank if geometry.pooled else geometry.kernel,
            geometry.stride, (0,) * rank, geometry.dilation, False, (0,) * rank, geometry.groups, geometry.bias,
            "zeros", device=like.device, dtype=like.dtype,
        )  # fmt: skip
        self.geometry = geometry
        self._kept: tuple[Any, _Written, Tensor] | None = None
        if geometry.bounded:
            self.border = nn.Parameter(like.new_zeros(geometry.out_channels, 1, *geometry.border_kernel))
        else:
            self.register_parameter("border", None)

    def reset_parameters(self) -> None:
        """Draw nothing: the weights are given afterwards."""

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, in, *sizes]`` to ``[batch, out, *sizes]``."""
        result = apply(input, self.geometry, self.weight, self.bias, None)
        if self.border is None:
            return result
        if self._may_keep(input):
            result.add_(self._known_response(input, result.dtype))  # nobody else has seen it yet
        else:
            result = result + response(self.geometry, self.border, sizes_of(input, self.geometry.rank))
            if torch.onnx.is_in_onnx_export() and result.dim() == 4 and result.dtype == torch.float32:
                # ONNX Runtime keeps neighbours of convolutions in a blocked layout; adding a constant ends that for all
                # that follows up to the next convolution (norms, sums, concatenations), and a pool, even of one, takes
                # it up again: densenet121 1.00 -> 1.065.
                result = F.avg_pool2d(result, 1)
        return result

    def _known_response(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        sizes = sizes_of(input, self.geometry.rank)
        border: Any = self.border
        key = (sizes, dtype, border.device)
        kept = self._kept
        if kept is not None and kept[0] == key and kept[1].still(border):
            return kept[2]
        made = response(self.geometry, border, sizes)
        if not torch.is_inference_mode_enabled():
            self._kept = (key, _Written(border), made)
        return made

    def _may_keep(self, input: Tensor) -> bool:
        """Not while somebody compiles, exports, traces or transforms, nor where the border may be about to change."""
        border: Any = self.border
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        if type(input) is not Tensor or type(border) is not nn.Parameter:
            return False
        if torch.is_grad_enabled() and border.requires_grad:
            self._kept = None
            return False
        return True

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
        text += ", averaged first" if geometry.pooled else ""
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
    return symmetric and not (geometry.bounded or geometry.stages or geometry.crop or geometry.pooled)


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


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by how many extents a weight has


def channels_last(value: Tensor) -> Tensor:
    """The value in memory channels last, where it has as many extents as that takes."""
    return value.contiguous(memory_format=_LAST[value.dim()]) if value.dim() in _LAST else value


def is_channels_last(model: nn.Module) -> bool:
    """Whether the model's convolutions have their weights in memory channels last, all those that can tell."""
    convs = (module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd))
    told = set()
    for weight in (value for conv in convs for value in conv.parameters() if value.dim() in _LAST):
        ways = weight.is_contiguous(), weight.is_contiguous(memory_format=_LAST[weight.dim()])
        told |= {ways[1]} if ways[0] != ways[1] else set()  # a 1x1 is both
    return told == {True}


def laid_out(module: nn.Module, last: bool) -> nn.Module:
    """The convolution itself, its weight in memory channels last if so: else some backends lay it out in each call."""
    if last:
        weight: Any = module.weight
        weight.data = channels_last(weight.data)
    return module


def like_of(module: nn.Module) -> Tensor:
    """A tensor of the module's dtype and device: a parameter, as a weight that a hook computes may not have moved."""
    found = next(module.parameters(), None)
    if found is not None:
        return found
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def is_finite(value: Tensor) -> bool:
    """Whether all of its numbers are: a finite sum says so much sooner, though one that overflows says nothing."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _check_range(cast: Tensor, name: str, affine: Affine) -> None:
    if name == "weight" and cast.numel():
        low, high = map(float, torch.aminmax(cast))  # NaN if one is: much faster than any norm
        largest = max(-low, high)
        small = largest < torch.finfo(cast.dtype).tiny / _BITS
        if small and float(affine.dense().weight.abs().max()) > 0:
            raise ValueError(f"the merged weights are too small for {cast.dtype} (at most {largest:.1g})")
        fits = math.isfinite(largest)
    else:
        fits = is_finite(cast)
    if not fits and is_finite(getattr(affine.dense(), name)):
        raise ValueError(f"a merged {name} does not fit into {cast.dtype}")


def filled(affine: Affine, like: Tensor, requires_grad: bool) -> nn.Module:
    """A module that computes ``affine``, its numbers cast to the dtype and device of ``like``.

    Raises:
        ValueError: If a number is out of the dtype's range, or all weights are so small that few of their digits are
            left.
    """
    module: Any = conv_module(affine.geometry, torch.empty(0, dtype=like.dtype, device="meta"))  # all of it is given
    for name in ("weight", "bias", "border"):
        value = getattr(affine, name)
        if value is None:
            continue
        cast = affine.cast(like.dtype) if name == "weight" else value.detach().to(like.dtype)
        if not cast.is_meta:
            _check_range(cast, name, affine)
        own = cast.to(like.device).contiguous()
        if own.data_ptr() == value.data_ptr():  # nothing was to be cast: the original's own numbers
            own = own.clone()
        setattr(module, name, nn.Parameter(own, requires_grad))
    module.train(False)
    return module
