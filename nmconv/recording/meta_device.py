"""What keeps a run on the meta device, and tells its code of the device that the model is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._device import _device_constructors

from nmconv.copying import Copy

__all__ = ["ASKS_VALUE", "OnMeta", "makes_of_values"]

ASKS_VALUE = frozenset(("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "is_nonzero"))
_MAKERS = _device_constructors()
_VALUE_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.scalar_tensor)
_DEVICE, _IS_CPU, _IS_META, _IS_CUDA = (getattr(Tensor, name) for name in ("device", "is_cpu", "is_meta", "is_cuda"))
_MOVES = ("cpu", "cuda", "xpu")
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def makes_of_values(func: Any) -> bool:
    """Whether a function makes tensors of numbers that Python or numpy holds."""
    return func in _VALUE_MAKERS


class OnMeta:
    """Stands between a run and the meta device.

    Args:
        copy: Whose run it is.
        device: What the model's tensors are asked for.
    """

    def __init__(self, copy: Copy, device: torch.device) -> None:
        self._originals = copy.originals
        self._device = device
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self._known: dict[int, Tensor] = {}  # real values of constants made inside, by their twins' ids

    def about_device(self, func: Any) -> Any:
        """The answer to a question about a tensor's device; None where it is another question."""
        owner = getattr(func, "__self__", None)
        if owner is _DEVICE:
            return self._device
        if owner is _IS_META:
            return False
        if owner is _IS_CPU or owner is _IS_CUDA:
            return self._device.type == ("cpu" if owner is _IS_CPU else "cuda")
        return None

    def call(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any]:
        """A function and arguments in the place of others, which keep all on the meta device."""
        if func in _VALUE_MAKERS:
            return func, args, kwargs
        kwargs = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
        if kwargs.get("device") is not None or func in _MAKERS:
            kwargs["device"] = "meta"
        if name in _MOVES:
            func, args, kwargs = Tensor.to, (args[0], "meta"), {}
        elif name == "to":
            args = (args[0], *("meta" if isinstance(part, (str, torch.device)) else part for part in args[1:]))
        return func, self._twinned(args), self._twinned(kwargs)

    def inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a function gives that is called inside of one node."""
        if getattr(func, "__name__", "") == "__get__" and args:
            answer = self.about_device(func)
            if answer is not None:
                return answer
        if func in _MAKERS:
            _, _, kwargs = self.call(func, "", (), kwargs)
        return _recurrent(func, args) if func in _RECURRENT else func(*args, **kwargs)

    def returned(self, func: Any, value: Any) -> Any:
        """What a call gives: the twin of a tensor that was made of numbers."""
        if func not in _VALUE_MAKERS or not isinstance(value, Tensor) or value.is_meta:
            return value
        made = value.detach().to("meta").requires_grad_(value.requires_grad)
        self._known[id(made)] = value
        return made

    def is_of_values(self, value: Any) -> bool:
        """Whether a tensor was made of numbers in this run."""
        return id(value) in self._known

    def known_value(self, name: str, value: Tensor) -> tuple[Any] | None:
        """What a tensor holds, in a tuple, where that is known though its twin holds nothing."""
        original = self._originals.get(id(value), self._known.get(id(value)))
        if original is None or original.is_meta:
            return None
        ask = Tensor.__bool__ if name == "is_nonzero" else getattr(Tensor, name)
        with torch._C.DisableTorchFunction():
            return (ask(original),)

    def _twinned(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta:
                return value
            if id(value) not in self._twins:
                with torch._C.DisableTorchFunction():
                    self._twins[id(value)] = (value, value.detach().to("meta"))
            return self._twins[id(value)][1]
        if type(value) in (list, tuple):
            return type(value)(map(self._twinned, value))
        if type(value) is dict:
            return {key: self._twinned(part) for key, part in value.items()}
        return value


def _recurrent(func: Any, args: Any) -> Any:
    """Tensors as a recurrent layer gives them: torch's meta kernels take a second for sixteen steps of an LSTM."""
    at = max(at for at, value in enumerate(args) if isinstance(value, (list, tuple)))  # the layer's weights
    states = args[at - 1] if func is torch.lstm else (args[at - 1],)
    directions = 2 if args[at + 5] else 1
    weight = args[at][0].sum().expand(directions * states[0].shape[-1], args[0].shape[-1])
    output = F.linear(args[0], weight)
    return output, *(state + output.sum() for state in states)
