"""Run a model on example inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nmconv.copying import copy_model
from nmconv.errors import OptionError
from nmconv.recording import rng_restored

__all__ = ["batch_size", "call_model", "outputs_in_float64", "outputs_of", "outputs_of_copy"]


def batch_size(example_inputs: Any) -> int | None:
    """Return the first extent of the first tensor in the example inputs, or None if there is none."""
    tensors = [value for value in tree_leaves(example_inputs) if isinstance(value, Tensor)]
    return int(tensors[0].shape[0]) if tensors and tensors[0].dim() else None


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Return the outputs for copies of the example inputs (the model may write into them), without gradients."""
    inputs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, example_inputs)
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def outputs_of(model: nn.Module, example_inputs: Any) -> Any:
    """Return what :func:`call_model` does; restore the RNG state, so that all calls draw the same numbers."""
    with rng_restored(model):
        return call_model(model, example_inputs)


def outputs_of_copy(model: nn.Module, example_inputs: Any) -> Any:
    """Return the outputs of a copy, so that the model's state does not change.

    Raises:
        OptionError: If the model cannot be called with the example inputs.
    """
    try:
        return outputs_of(copy_model(model), example_inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else value for value in tree_leaves(example_inputs)]
        raise OptionError(
            f"example_inputs of {shapes!r:.80}: this {type(model).__name__} cannot be called with them ({error})"
        ) from error


def outputs_in_float64(model: nn.Module, example_inputs: Any) -> Any:
    """Return the outputs of a copy in float64."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return outputs_of(copy_model(model).double(), tree_map(double, example_inputs))
