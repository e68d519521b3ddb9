"""A convolution module with a border term or with padding that torch's own classes cannot express."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmconv.algebra.affine import apply_conv, border_term, sizes_of
from nmconv.algebra.geometry import Geometry

__all__ = ["MergedConv"]


class _ParameterSnapshot:
    """The contents of a parameter at one time, to detect later changes."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self._state = self._state_of(parameter)
        # Writing through .data leaves no trace. Only on a CPU is a comparison of the contents free of synchronization.
        self._copy = parameter.detach().clone() if parameter.device.type == "cpu" else None

    @staticmethod
    def _state_of(parameter: Tensor) -> tuple[int, int]:
        return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version

    def matches(self, parameter: Tensor) -> bool:
        """Return whether ``parameter`` is the same object with the same contents."""
        if parameter is not self._parameter or self._state_of(parameter) != self._state:
            return False
        return self._copy is None or torch.equal(self._copy, parameter)


class MergedConv(nn.modules.conv._ConvNd):
    """A convolution with a border term, asymmetric or size-dependent padding, a crop, or an average pool before it.

    ``out = conv(pad(input), weight) + bias + conv(ones, border)``. The last term is the response to biases that end at
    the border of an inner map. It depends on the input size and ``border`` only, and is cached for the latest of both.

    Args:
        geometry: Extents of the convolution; its input is ``[batch, in, *sizes]`` or ``[in, *sizes]``.
        like: A tensor with the dtype and device of the parameters.
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
        self._cached_response: tuple[Any, _ParameterSnapshot, Tensor] | None = None
        if geometry.bounded:
            self.border = nn.Parameter(like.new_zeros(geometry.out_channels, 1, *geometry.border_kernel))
        else:
            self.register_parameter("border", None)

    def reset_parameters(self) -> None:
        """Do nothing: the weights are set afterwards."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[batch, in, *sizes]`` to ``[batch, out, *sizes]``."""
        result = apply_conv(input, self.geometry, self.weight, self.bias, None)
        if self.border is None:
            return result
        if self._may_cache(input):
            result.add_(self._response(input, result.dtype))  # in place, since the result is not yet aliased
        else:
            result = result + border_term(self.geometry, self.border, sizes_of(input, self.geometry.rank))
            if torch.onnx.is_in_onnx_export() and result.dim() == 4 and result.dtype == torch.float32:
                # ONNX Runtime keeps neighboring convolutions in a blocked layout. Adding a constant ends it for all
                # operations up to the next convolution (norms, sums, concatenations); a pool, even over single
                # elements, begins it anew: densenet121 1.00 -> 1.065.
                result = F.avg_pool2d(result, 1)
        return result

    def _response(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        sizes = sizes_of(input, self.geometry.rank)
        border: Any = self.border
        key = (sizes, dtype, border.device)
        cached = self._cached_response
        if cached is not None and cached[0] == key and cached[1].matches(border):
            return cached[2]
        computed = border_term(self.geometry, border, sizes)
        if not torch.is_inference_mode_enabled():
            self._cached_response = (key, _ParameterSnapshot(border), computed)
        return computed

    def _may_cache(self, input: Tensor) -> bool:
        """Return False during compilation, export, tracing or transformations, and if the border may be trained."""
        border: Any = self.border
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        if type(input) is not Tensor or type(border) is not nn.Parameter:
            return False
        if torch.is_grad_enabled() and border.requires_grad:
            self._cached_response = None
            return False
        return True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached_response = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached_response": None}

    def extra_repr(self) -> str:
        """Return torch's text, with padding as (left, right) pairs."""
        geometry = self.geometry
        text = f"{geometry.in_channels}, {geometry.out_channels}, kernel_size={geometry.kernel}"
        text += f", stride={geometry.stride}, padding={geometry.padding}, dilation={geometry.dilation}"
        text += f", groups={geometry.groups}, bias={geometry.bias}, border={bool(geometry.bounded)}"
        text += f", crop={geometry.crop}" if geometry.crop else ""
        text += ", averaged first" if geometry.pooled else ""
        return text + (f", padding_mode={geometry.mode}" if geometry.mode != "zeros" else "")
