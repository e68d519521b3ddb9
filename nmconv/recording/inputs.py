"""Arguments that a model is recorded with: the user's or guessed ones, and variations of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn

from nmconv.recording.tensors import Spec, map_tensors, spec_of

__all__ = ["Inputs", "given_inputs", "guessed_inputs", "other_choices", "other_sizes"]

_SIZE_INCREMENT = 32  # elements added along each spatial axis: a multiple of most patch sizes and strides

# Image sizes to guess, by the number of spatial axes: ImageNet's, CIFAR's, MNIST's, and others that are common.
_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    0: ((),),
    1: ((1024,), (16000,)),
    2: tuple((size, size) for size in (224, 32, 28, 64, 96, 128, 227, 256, 299)),
    3: ((16, 112, 112), (32, 32, 32), (16, 224, 224)),
}


@dataclass(frozen=True)
class Inputs:
    """Arguments of a call.

    Attributes:
        args: Positional arguments, with a :class:`Spec` for each tensor.
        kwargs: Keyword arguments, likewise.
        real: Both with the user's own tensors; None if they are guessed.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def given_inputs(example_inputs: Any) -> Inputs:
    """Return the user's inputs: a tensor, a tuple of arguments or a dict of keyword arguments."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, dict):
        kwargs = example_inputs
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return Inputs(map_tensors(args, spec_of), map_tensors(kwargs, spec_of), (args, kwargs))


def guessed_inputs(model: nn.Module, size: tuple[int, ...] | None, first_layer: tuple[int, int] | None) -> list[Inputs]:
    """Return inputs to try in turn: an image batch for each required argument of the forward, or for the first one.

    Args:
        model: The model.
        size: An image's ``(channels, *spatial)`` by the model's configuration, if known.
        first_layer: The channels and the number of spatial axes of the first layer's input, if known. They are used
            where ``size`` is unknown or does not work.

    Returns:
        The inputs; none if nothing is known.
    """
    shapes: list[tuple[int, ...]] = []
    if first_layer is not None:
        channels, axes = first_layer
        shapes = [(channels, *spatial) for spatial in _SIZES[axes]]
    if size:  # the model may have been created with another number of channels than its configuration says
        same_rank = [shape for shape in shapes if len(shape) == len(size)]
        shapes = [size, *((shape[0], *size[1:]) for shape in same_rank[:1]), *same_rank]
    return [_image_inputs(model, shape) for shape in dict.fromkeys(shapes)]


def _image_inputs(model: nn.Module, shape: tuple[int, ...]) -> Inputs:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = Spec((2, *shape), dtype)
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return Inputs((image,), {})
    required = [each for each in parameters if each.default is each.empty]
    positional = [each for each in required if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    keywords = [each.name for each in required if each.kind is each.KEYWORD_ONLY]
    return Inputs((image,) * max(len(positional), 0 if keywords else 1), dict.fromkeys(keywords, image))


def other_sizes(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield names and arguments with another size and batch size, then with only one of the two, to try in turn."""
    for name, size, batch in (("other size", True, True), ("other size", True, False), ("other batch", False, True)):
        resize = partial(_resized, size=size, batch=batch)
        yield name, Inputs(map_tensors(inputs.args, resize), map_tensors(inputs.kwargs, resize))


def _resized(spec: Spec, size: bool, batch: bool) -> Spec:
    shape = list(spec.shape)
    if spec.dtype.is_floating_point and len(shape) > 2 and size:
        shape[2:] = [extent + _SIZE_INCREMENT for extent in shape[2:]]
    if shape and batch:
        shape[0] += 1
    return Spec(tuple(shape), spec.dtype)


def other_choices(model: nn.Module, inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield names and arguments with one bool inverted, or one enum member replaced by another."""
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except (TypeError, ValueError):
        return
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        for other in _alternatives(value, signature.parameters[name].annotation):
            changed = signature.bind(*bound.args, **bound.kwargs)
            changed.apply_defaults()
            changed.arguments[name] = other
            yield f"{name}={other!r}", Inputs(changed.args, changed.kwargs)


def _alternatives(value: Any, annotation: Any) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, Enum):
        return tuple(member for member in type(value) if member is not value)
    return (True, False) if value is None and "bool" in str(annotation) else ()
