"""Calls redirected to the meta device, while the model's code is told that its tensors are on the model's device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nmconv.copying import Copy
from nmconv.recording.torch_functions import FACTORIES, FROM_VALUES

__all__ = ["MetaDevice"]

_DEVICE, _IS_CPU, _IS_META, _IS_CUDA = (getattr(Tensor, name) for name in ("device", "is_cpu", "is_meta", "is_cuda"))
_DEVICE_MOVES = ("cpu", "cuda", "xpu")
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class MetaDevice:
    """Redirects the calls of one run to the meta device.

    Args:
        copy: The copy that runs.
        device: The device that the model's tensors seem to be on.
    """

    def __init__(self, copy: Copy, device: torch.device) -> None:
        self._originals = copy.originals
        self._device = device
        # Real tensors by id, each with its meta tensor.
        self._meta_tensors: dict[int, tuple[Tensor, Tensor]] = {}
        # Tensors made of numbers in this run, by the ids of their meta tensors.
        self._constants: dict[int, Tensor] = {}

    def device_query(self, getter: Any) -> Any:
        """Return the value of a tensor's device property; None if the getter is another property's."""
        owner = getattr(getter, "__self__", None)
        if owner is _DEVICE:
            return self._device
        if owner is _IS_META:
            return False
        if owner is _IS_CPU or owner is _IS_CUDA:
            return self._device.type == ("cpu" if owner is _IS_CPU else "cuda")
        return None

    def redirect(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any]:
        """Return a function and arguments that do the same on the meta device."""
        if func in FROM_VALUES:
            return func, args, kwargs
        kwargs = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
        if kwargs.get("device") is not None or func in FACTORIES:
            kwargs["device"] = "meta"
        if name in _DEVICE_MOVES:
            func, args, kwargs = Tensor.to, (args[0], "meta"), {}
        elif name == "to":
            args = (args[0], *("meta" if isinstance(part, (str, torch.device)) else part for part in args[1:]))
        return func, self._to_meta(args), self._to_meta(kwargs)

    def call_inside_node(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function that runs inside a call that is one node."""
        if getattr(func, "__name__", "") == "__get__" and args:
            answer = self.device_query(func)
            if answer is not None:
                return answer
        if func in FACTORIES:
            _, _, kwargs = self.redirect(func, "", (), kwargs)
        return _cheap_recurrent(func, args) if func in _RECURRENT else func(*args, **kwargs)

    def redirect_result(self, func: Any, value: Any) -> Any:
        """Return a call's result; for a tensor that was made of numbers, a meta tensor."""
        if func not in FROM_VALUES or not isinstance(value, Tensor) or value.is_meta:
            return value
        meta = value.detach().to("meta").requires_grad_(value.requires_grad)
        self._constants[id(meta)] = value
        return meta

    def is_constant(self, value: Any) -> bool:
        """Return whether a tensor was made of numbers in this run."""
        return id(value) in self._constants

    def known_value(self, name: str, value: Tensor) -> tuple[Any] | None:
        """Return, in a tuple, what a method such as ``item`` reads from a tensor; None if its value is unknown."""
        original = self._originals.get(id(value), self._constants.get(id(value)))
        if original is None or original.is_meta:
            return None
        read = Tensor.__bool__ if name == "is_nonzero" else getattr(Tensor, name)
        with torch._C.DisableTorchFunction():
            return (read(original),)

    def _to_meta(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta:
                return value
            if id(value) not in self._meta_tensors:
                with torch._C.DisableTorchFunction():
                    self._meta_tensors[id(value)] = (value, value.detach().to("meta"))
            return self._meta_tensors[id(value)][1]
        if type(value) in (list, tuple):
            return type(value)(map(self._to_meta, value))
        if type(value) is dict:
            return {key: self._to_meta(part) for key, part in value.items()}
        return value


def _cheap_recurrent(func: Any, args: Any) -> Any:
    """Return tensors like a recurrent layer's; torch's own meta kernels take a second for 16 steps of an LSTM."""
    at = max(at for at, value in enumerate(args) if isinstance(value, (list, tuple)))  # the layer's weights
    states = args[at - 1] if func is torch.lstm else (args[at - 1],)
    directions = 2 if args[at + 5] else 1
    weight = args[at][0].sum().expand(directions * states[0].shape[-1], args[0].shape[-1])
    output = F.linear(args[0], weight)
    return output, *(state + output.sum() for state in states)
