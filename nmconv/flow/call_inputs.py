"""A plan's call: from what a model was recorded with to a signature, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from nmconv.errors import PlanError
from nmconv.planning import Signature, TensorSpec, to_signature
from nmconv.recording import Inputs, Recordings, Spec

__all__ = ["inputs_from", "signature_of"]


def signature_of(model: nn.Module, recordings: Recordings) -> Signature | None:
    """What a model was recorded with, or None if it was not, or if that cannot be put into words."""
    if not recordings.runs:
        return None
    call, own = recordings.runs[0].call, _dtype_of(model)

    def spec(value: Any) -> Any:
        if not isinstance(value, Spec):
            return value
        return TensorSpec(tuple(value.shape), "" if value.dtype == own else str(value.dtype).removeprefix("torch."))

    return to_signature(*tree_map(spec, (call.args, dict(call.kwargs))))


def inputs_from(model: nn.Module, signature: Signature) -> Inputs:
    """What a model is to be recorded with.

    Raises:
        PlanError: If the signature names a dtype that torch does not have.
    """
    own = _dtype_of(model)

    def spec(value: Any) -> Any:
        if not isinstance(value, TensorSpec):
            return value
        dtype = getattr(torch, value.dtype, None) if value.dtype else own
        if not isinstance(dtype, torch.dtype):
            raise PlanError(f"the plan's call has a tensor of dtype {value.dtype!r}, which torch does not have")
        return Spec(value.shape, dtype)

    return Inputs(*tree_map(spec, (signature.args, dict(signature.kwargs))))


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Of the model's first parameter of floats: what plans do not depend on."""
    found = (value.dtype for value in model.parameters() if value.dtype.is_floating_point)
    return next(found, torch.float32)
