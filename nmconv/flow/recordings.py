"""A model recorded with nmconv's own idea of what a leaf is, and of what it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nmconv.errors import OptionError, PlanError
from nmconv.flow.call_inputs import inputs_from
from nmconv.flow.leaves import is_conv, leaf_op
from nmconv.flow.ops import Op
from nmconv.flow.zoo import default_input_size, takes_list_of_images
from nmconv.planning import Signature
from nmconv.recording import Inputs, Recordings, Spec, given_inputs, guessed_inputs, record

__all__ = ["inputs_of", "is_leaf", "recordings_of"]


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node of a recording."""
    return leaf_op(module) is not None


def inputs_of(model: nn.Module, example_inputs: Any, call: Signature | None = None) -> list[Inputs]:
    """What the model is called with: what the user gave, else what a plan says, else guesses to try in turn.

    None without a layer to go by.
    """
    if example_inputs is not None:
        return [given_inputs(example_inputs)]
    if call is not None:
        return [inputs_from(model, call)]
    if takes_list_of_images(model):
        return [Inputs(([Spec((3, 224, 224), torch.float32)],), {})]
    return guessed_inputs(model, default_input_size(model), _first_layer(model))


def _first_layer(model: nn.Module) -> tuple[int, int] | None:
    """Channels and spatial axes of the first convolution's input, or of the first linear layer's."""
    modules = list(model.modules())
    convs = (module for module in modules if leaf_op(module) is Op.CONV or is_conv(module))
    linear = (module for module in modules if leaf_op(module) is Op.LINEAR)
    for layer in (*convs, *linear):
        sizes = [part.kernel_size for part in layer.modules() if isinstance(part, nn.modules.conv._ConvNd)]
        channels = getattr(layer, "in_channels", getattr(layer, "in_features", None))
        if isinstance(channels, int):
            return channels, len(sizes[0]) if sizes else 0
    return None


def recordings_of(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    linear: bool = False,
    both_sizes: bool = True,
    choices: bool = False,
    methods: Mapping[str, Any] | None = None,
    call: Signature | None = None,
) -> Recordings:
    """Record a model in eval and train mode, at two sizes, and in each context that its code asks for.

    Args:
        model: Read only. One without a convolution that no guess fits is not recorded: nothing of it could change.
        example_inputs: What it is called with, or None for a guess.
        linear: Whether it may be one of linear layers alone.
        both_sizes: Whether at another size and in the contexts, too.
        choices: Whether with other truth values and enum members, and at its other entry points, too.
        methods: Further methods, and example inputs of each.
        call: What a plan says that it is called with: instead of a guess.

    Raises: as :func:`nmconv.recording.record` does; a PlanError where it cannot be called as ``call`` says.
    """
    given = {name: given_inputs(value) for name, value in (methods or {}).items()}
    first: OptionError | None = None
    for inputs in inputs_of(model, example_inputs, call):
        try:
            return record(model, inputs, is_leaf, both_sizes=both_sizes, choices=choices, methods=given)
        except OptionError as error:
            first = first or error
    if first is not None and example_inputs is None and call is not None:
        raise PlanError(f"{first} (that is what the plan says that its model is called with)") from first
    if first is not None and (linear or example_inputs is not None or any(map(is_conv, model.modules()))):
        raise first
    return Recordings()
