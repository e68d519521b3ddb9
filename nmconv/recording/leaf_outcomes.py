"""What leaves of torch's give on meta tensors of one kind: computed once, since some take milliseconds there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.recording.recording import Fact, memory_of

__all__ = ["Outcome", "Outcomes", "key_of_function", "key_of_module", "outcome_of_norm", "remembered"]


@dataclass(frozen=True)
class Outcome:
    """What a call gives: one new tensor.

    Attributes:
        shape: Of the tensor; strides and dtype, too.
        wants_grad: Whether gradients flow through it.
        written: Which of the call's tensors it writes to, by position.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    wants_grad: bool
    written: tuple[int, ...]

    @staticmethod
    def of(returned: Any, tensors: Sequence[Tensor], written: Sequence[Tensor]) -> Outcome | None:
        """The outcome of one call, or None where it is more than a new tensor."""
        if type(returned) is not Tensor or returned._is_view() or any(returned is value for value in tensors):
            return None
        if any(memory_of(value) == memory_of(returned) for value in tensors):
            return None
        changed = {id(value) for value in written}
        return Outcome(
            tuple(returned.shape),
            returned.stride(),
            returned.dtype,
            returned.requires_grad,
            tuple(at for at, value in enumerate(tensors) if id(value) in changed),
        )

    def returned(self) -> Tensor:
        """Such a tensor."""
        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
        return made.requires_grad_().clone() if self.wants_grad else made


Outcomes = dict[Any, "Outcome | None"]
_MOST = 20_000  # a key and an outcome take about a kilobyte


def remembered() -> Outcomes:
    """The outcomes of this process: what decides them is all in their keys."""
    if len(_outcomes) > _MOST:
        _outcomes.clear()
    return _outcomes


_outcomes: Outcomes = {}


def outcome_of_norm(value: Tensor, tensors: Sequence[Tensor], counter: Tensor | None = None) -> Outcome:
    """What a batch norm gives: torch takes milliseconds to find out that it is alike to its input.

    Args:
        value: The input.
        tensors: Of the call, the input and the norm's own.
        counter: What it adds one to, if anything.
    """
    wants_grad = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    written = tuple(at for at, each in enumerate(tensors) if each is counter)
    return Outcome(tuple(value.shape), value.stride(), value.dtype, wants_grad, written)


def key_of_module(module: nn.Module, fact: Fact, tensors: Sequence[Tensor]) -> Any:
    """What decides the outcome of a call of one of torch's own leaves, or None for others."""
    own_forward = not type(module).forward.__module__.startswith("torch.nn.modules.")
    if own_forward or module._modules or fact.form[1] or _is_transformed():
        return None
    own = tuple((value.shape, value.dtype) for value in module._parameters.values() if value is not None)
    return (
        type(module).forward,
        fact.settings,
        module.training,
        fact.form,
        fact.context,
        tuple(map(_kind, tensors)),
        own,
    )


def key_of_function(function: Any, fact: Fact, tensors: Sequence[Tensor]) -> Any:
    """What decides the outcome of a call of a function, or None where there is no tensor to go by."""
    if not tensors or _is_transformed() or not all(type(value) in (Tensor, nn.Parameter) for value in tensors):
        return None
    return function, fact.form, fact.context, tuple(map(_kind, tensors))


def _is_transformed() -> bool:
    """Whether a transform such as ``torch.vmap`` is running, in which tensors are more than they show."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _kind(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype, value.requires_grad
