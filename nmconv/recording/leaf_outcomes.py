"""A cache of what torch's own modules and functions return on meta tensors, since some take milliseconds there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.recording.recording import Fact
from nmconv.recording.tensors import memory_of

__all__ = ["Outcome", "Outcomes", "batch_norm_outcome", "cached_outcomes", "function_key", "module_key"]


@dataclass(frozen=True)
class Outcome:
    """The result of a call that returns one new tensor.

    Attributes:
        shape: The tensor's shape.
        strides: Its strides.
        dtype: Its dtype.
        requires_grad: Whether gradients flow through it.
        written: Positions of the call's tensors that the call writes to.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    written: tuple[int, ...]

    @staticmethod
    def of(returned: Any, tensors: Sequence[Tensor], written: Sequence[Tensor]) -> Outcome | None:
        """Return the outcome of one call; None if it returns anything but a new tensor."""
        if type(returned) is not Tensor or returned._is_view() or any(returned is value for value in tensors):
            return None
        if any(memory_of(value) == memory_of(returned) for value in tensors):
            return None
        written_ids = {id(value) for value in written}
        return Outcome(
            tuple(returned.shape),
            returned.stride(),
            returned.dtype,
            returned.requires_grad,
            tuple(at for at, value in enumerate(tensors) if id(value) in written_ids),
        )

    def new_tensor(self) -> Tensor:
        """Return a meta tensor like the one that the call returned."""
        new = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
        return new.requires_grad_().clone() if self.requires_grad else new


Outcomes = dict[Any, "Outcome | None"]
_MAX_CACHED = 20_000  # of about a kilobyte each
_cache: Outcomes = {}


def cached_outcomes() -> Outcomes:
    """Return this process's cache, by keys that contain everything that an outcome depends on."""
    if len(_cache) > _MAX_CACHED:
        _cache.clear()
    return _cache


def batch_norm_outcome(value: Tensor, tensors: Sequence[Tensor], counter: Tensor | None = None) -> Outcome:
    """Return the outcome of a batch norm, which torch's meta kernel takes milliseconds to find.

    Args:
        value: The input.
        tensors: All tensors of the call: the input and the norm's own.
        counter: ``num_batches_tracked``, if the call increments it.
    """
    requires_grad = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    written = tuple(at for at, each in enumerate(tensors) if each is counter)
    return Outcome(tuple(value.shape), value.stride(), value.dtype, requires_grad, written)


def module_key(module: nn.Module, fact: Fact, tensors: Sequence[Tensor]) -> Any:
    """Return the cache key of a call of a module; None if it is not one of torch's own leaves."""
    is_torchs = type(module).forward.__module__.startswith("torch.nn.modules.")
    if not is_torchs or module._modules or fact.form[1] or _is_in_transform():
        return None
    parameters = tuple((value.shape, value.dtype) for value in module._parameters.values() if value is not None)
    return (
        type(module).forward,
        fact.settings,
        module.training,
        fact.form,
        fact.context,
        tuple(map(_tensor_key, tensors)),
        parameters,
    )


def function_key(function: Any, fact: Fact, tensors: Sequence[Tensor]) -> Any:
    """Return the cache key of a call of a function; None if there is no tensor, or one of a subclass."""
    if not tensors or _is_in_transform() or not all(type(value) in (Tensor, nn.Parameter) for value in tensors):
        return None
    return function, fact.form, fact.context, tuple(map(_tensor_key, tensors))


def _is_in_transform() -> bool:
    """Return whether a transform such as ``torch.vmap`` runs, in which tensors have hidden dimensions."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _tensor_key(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype, value.requires_grad
