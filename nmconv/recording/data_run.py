"""One real run on a copy, where data decide what a model does: what each call returns."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nmconv.copying import real_copy
from nmconv.recording.answers import Answers, ModelRaised
from nmconv.recording.functions import label_of, not_recorded
from nmconv.recording.recording import Call, map_tensors
from nmconv.recording.wrapping import wrap

__all__ = ["real_run"]


def real_run(
    model: nn.Module,
    call: Call,
    path: str,
    real: tuple[tuple[Any, ...], dict[str, Any]] | None,
    is_leaf: Callable[[nn.Module], bool],
) -> Answers:
    """Run a copy of the model and keep what each call returned, tensors as shapes.

    Args:
        model: Read only.
        call: How it is called.
        path: Which part of it is called.
        real: Arguments with the user's tensors; None: seeded noise.
        is_leaf: Whether a module is one call.

    Raises:
        ModelRaised: If the model's code raises.
    """
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    noise = torch.Generator().manual_seed(0)

    def tensor(value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if value.dtype.is_floating_point:
            return torch.rand(value.shape, generator=noise, dtype=value.dtype).to(device)
        return torch.zeros(value.shape, dtype=value.dtype, device=device)

    args, kwargs = map_tensors((call.args, call.kwargs) if real is None else real, tensor)
    made = real_copy(model).model
    made.train(call.training)
    listener = _Listener()
    wrap(made, is_leaf, listener.forwarded)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), listener:
        torch.manual_seed(0)
        part = made.get_submodule(path)
        function = part if call.method == "forward" else getattr(part, call.method)
        try:
            function(*args, **kwargs)
        except Exception as error:
            raise ModelRaised(error) from error
    return listener.answers


class _Listener(TorchFunctionMode):
    """Notes what the calls return that a :class:`Recorder` would note."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = Answers()
        self._paths = [""]
        self._times: Counter[tuple[str, str]] = Counter()
        self._depth = 0
        self._thread = threading.get_ident()

    def forwarded(self, module: nn.Module, path: str, leaf: bool, forward: Any, args: Any, kwargs: Any) -> Any:
        """What a module's forward gives."""
        if self._depth or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if leaf:
            return self._noted(path, lambda: forward(*args, **kwargs))
        self._paths.append(path)
        try:
            return forward(*args, **kwargs)
        finally:
            self._paths.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._depth or not_recorded(func):
            return func(*args, **(kwargs or {}))
        return self._noted(label_of(func), lambda: func(*args, **(kwargs or {})))

    def _noted(self, label: str, do: Callable[[], Any]) -> Any:
        self._depth += 1
        try:
            returned = do()
        finally:
            self._depth -= 1
        key = (label, self._paths[-1])
        self._times[key] += 1
        self.answers.add((*key, self._times[key]), returned)
        return returned
