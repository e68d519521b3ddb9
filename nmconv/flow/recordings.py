"""Recording a model: with nmconv's leaves, on example inputs, on a plan's call signature, or on guesses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from nmconv.errors import OptionError, PlanError
from nmconv.flow.leaves import is_conv, leaf_op
from nmconv.flow.ops import Op
from nmconv.flow.zoo import default_input_size, takes_list_of_images
from nmconv.planning import Signature, TensorSpec, to_signature
from nmconv.recording import Inputs, Recordings, Spec, given_inputs, guessed_inputs, record

__all__ = ["is_leaf", "record_model", "signature_of"]


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is a single node of a recording."""
    return leaf_op(module) is not None


def record_model(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    linear: bool = False,
    both_sizes: bool = True,
    choices: bool = False,
    methods: Mapping[str, Any] | None = None,
    call: Signature | None = None,
) -> Recordings:
    """Record a model in eval and train mode, at two sizes, and in each context that its code queries.

    A model without convolutions that no guess fits is not recorded, since nothing in it could change.

    Args:
        model: The model; only read.
        example_inputs: Its inputs; None for a guess.
        linear: Whether models with linear layers alone count.
        both_sizes: Whether to record at a second size and in the contexts, too.
        choices: Whether to record with other bools and enum members as arguments, and at other entry points, too.
        methods: Further methods to record, each with its example inputs.
        call: A plan's call signature, used instead of a guess.

    Raises:
        PlanError: If the model cannot be called with ``call``.
        OptionError, ModelTypeError, InternalError: As :func:`nmconv.recording.record`.
    """
    method_inputs = {name: given_inputs(value) for name, value in (methods or {}).items()}
    first: OptionError | None = None
    for inputs in _candidate_inputs(model, example_inputs, call):
        try:
            return record(model, inputs, is_leaf, both_sizes=both_sizes, choices=choices, methods=method_inputs)
        except OptionError as error:
            first = first or error
    if first is not None and example_inputs is None and call is not None:
        raise PlanError(f"{first} (the input is the one that the plan states)") from first
    if first is not None and (linear or example_inputs is not None or any(map(is_conv, model.modules()))):
        raise first
    return Recordings()


def signature_of(model: nn.Module, recordings: Recordings) -> Signature | None:
    """Return the call signature that a model was recorded with; None if there is none that a plan can store."""
    if not recordings.runs:
        return None
    call, model_dtype = recordings.runs[0].call, _dtype_of(model)

    def spec(value: Any) -> Any:
        if not isinstance(value, Spec):
            return value
        dtype = "" if value.dtype == model_dtype else str(value.dtype).removeprefix("torch.")
        return TensorSpec(tuple(value.shape), dtype)

    return to_signature(*tree_map(spec, (call.args, dict(call.kwargs))))


def _candidate_inputs(model: nn.Module, example_inputs: Any, call: Signature | None) -> list[Inputs]:
    """Return the inputs to try in turn: the user's, else the plan's, else guesses by the model's first layer."""
    if example_inputs is not None:
        return [given_inputs(example_inputs)]
    if call is not None:
        return [_inputs_from(model, call)]
    if takes_list_of_images(model):
        return [Inputs(([Spec((3, 224, 224), torch.float32)],), {})]
    return guessed_inputs(model, default_input_size(model), _first_layer(model))


def _inputs_from(model: nn.Module, signature: Signature) -> Inputs:
    """Return the inputs that a call signature describes.

    Raises:
        PlanError: If the signature names a dtype that torch does not have.
    """
    model_dtype = _dtype_of(model)

    def spec(value: Any) -> Any:
        if not isinstance(value, TensorSpec):
            return value
        dtype = getattr(torch, value.dtype, None) if value.dtype else model_dtype
        if not isinstance(dtype, torch.dtype):
            raise PlanError(f"the plan's call has a tensor of dtype {value.dtype!r}, which torch does not have")
        return Spec(value.shape, dtype)

    return Inputs(*tree_map(spec, (signature.args, dict(signature.kwargs))))


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter; plans do not depend on it."""
    dtypes = (value.dtype for value in model.parameters() if value.dtype.is_floating_point)
    return next(dtypes, torch.float32)


def _first_layer(model: nn.Module) -> tuple[int, int] | None:
    """Return the channels and spatial axes of the input of the first convolution, or else of the first linear layer."""
    modules = list(model.modules())
    convs = (module for module in modules if leaf_op(module) is Op.CONV or is_conv(module))
    linear = (module for module in modules if leaf_op(module) is Op.LINEAR)
    for layer in (*convs, *linear):
        sizes = [part.kernel_size for part in layer.modules() if isinstance(part, nn.modules.conv._ConvNd)]
        channels = getattr(layer, "in_channels", getattr(layer, "in_features", None))
        if isinstance(channels, int):
            return channels, len(sizes[0]) if sizes else 0
    return None
