"""What a model is called with when it is recorded: what the user gave, or a guess; and the same at another size."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.recording.recording import Spec, map_tensors

__all__ = ["Inputs", "given_inputs", "guessed_inputs", "other_choices", "other_sizes"]

_MORE = 32  # elements along each spatial axis of the other size: what most patches and strides divide


@dataclass(frozen=True)
class Inputs:
    """Arguments of a call.

    Attributes:
        args: Positional ones, with a :class:`Spec` for each tensor.
        kwargs: By name.
        real: The same with the user's own tensors, or None if it is a guess.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def given_inputs(example_inputs: Any) -> Inputs:
    """What the user gave: a tensor, a tuple of arguments or a dict of keyword arguments."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, dict):
        kwargs = example_inputs
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return Inputs(map_tensors(args, _spec), map_tensors(kwargs, _spec), (args, kwargs))


def guessed_inputs(model: nn.Module, size: tuple[int, ...] | None, first_layer: tuple[int, int] | None) -> list[Inputs]:
    """One image batch for every required argument of the forward, or for the first one, in sizes to try in turn.

    Args:
        model: Whose forward.
        size: Of an image, as the model's family states it: ``(channels, *extents)``.
        first_layer: Channels and spatial axes of its input: they count where ``size`` is not known, or does not fit.

    Returns:
        Nothing where there is neither.
    """
    shapes: list[tuple[int, ...]] = []
    if first_layer is not None:
        channels, axes = first_layer
        shapes = [(channels, *extents) for extents in _EXTENTS[axes]]
    if size:  # a model of the family may have been made for other channels
        alike = [shape for shape in shapes if len(shape) == len(size)]
        shapes = [size, *((shape[0], *size[1:]) for shape in alike[:1]), *alike]
    return [_images(model, shape) for shape in dict.fromkeys(shapes)]


def _images(model: nn.Module, shape: tuple[int, ...]) -> Inputs:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = Spec((2, *shape), dtype)
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return Inputs((image,), {})
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    required = [each for each in positional if each.default is each.empty]
    named = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty]
    return Inputs((image,) * max(len(required), 0 if named else 1), dict.fromkeys(named, image))


# Extents of what networks with a fixed input take: ImageNet's, CIFAR's, MNIST's, and others that are common.
_EXTENTS: dict[int, tuple[tuple[int, ...], ...]] = {
    0: ((),),
    1: ((1024,), (16000,)),
    2: tuple((extent, extent) for extent in (224, 32, 28, 64, 96, 128, 227, 256, 299)),
    3: ((16, 112, 112), (32, 32, 32), (16, 224, 224)),
}


def other_sizes(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """The arguments at another size and batch; if that is not to be had, at one of both."""
    for name, size, batch in (("other size", True, True), ("other size", True, False), ("other batch", False, True)):
        other = partial(_other, size=size, batch=batch)
        yield name, Inputs(map_tensors(inputs.args, other), map_tensors(inputs.kwargs, other))


def other_choices(model: nn.Module, inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """The arguments with each truth value the other way, and each enum's other members."""
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except (TypeError, ValueError):
        return
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        for other in _others(value, signature.parameters[name].annotation):
            changed = signature.bind(*bound.args, **bound.kwargs)
            changed.apply_defaults()
            changed.arguments[name] = other
            yield f"{name}={other!r}", Inputs(changed.args, changed.kwargs)


def _others(value: Any, annotation: Any) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, Enum):
        return tuple(member for member in type(value) if member is not value)
    return (True, False) if value is None and "bool" in str(annotation) else ()


def _other(spec: Spec, size: bool, batch: bool) -> Spec:
    shape = list(spec.shape)
    if spec.dtype.is_floating_point and len(shape) > 2 and size:
        shape[2:] = [extent + _MORE for extent in shape[2:]]
    if shape and batch:
        shape[0] += 1
    return Spec(tuple(shape), spec.dtype)


def _spec(value: Tensor | Spec) -> Spec:
    return Spec(tuple(value.shape), value.dtype)
