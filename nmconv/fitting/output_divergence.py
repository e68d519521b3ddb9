"""How far a model's outputs are from a reference's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconv.algebra import is_finite
from nmconv.errors import FitError, OptionError
from nmconv.fitting.report import Divergence
from nmconv.observing import Images, input_errors_as_fit_errors

__all__ = ["Loss", "NotFiniteError", "Outputs", "check_loss", "divergence", "outputs_by_batch"]

Loss = Callable[[Any, Any], Any]  # (output, the reference's output) of a batch -> a number, or one for each image
Outputs = list[tuple[int, Any]]  # for each batch: its number of images, and the output


class NotFiniteError(FitError):
    """Outputs or a loss that are not finite; a search skips such a candidate."""


def check_loss(loss: object) -> None:
    """Raise OptionError if ``loss`` is neither callable nor None."""
    if loss is not None and not callable(loss):
        raise OptionError(f"loss={loss!r:.80}: give a function of (output, the original's output), or None")


def outputs_by_batch(model: nn.Module, images: Images, held: bool | None) -> Outputs:
    """Return the outputs of all batches, in the model's present mode.

    Args:
        model: The model.
        images: Its inputs.
        held: As for :meth:`Images.batches`.

    Raises:
        NotFiniteError: If an output is not finite.
        FitError: If the model does not accept the images.
    """
    outputs = []
    with torch.no_grad():
        for batch, _ in images.batches(held):
            with input_errors_as_fit_errors(model, batch):
                output = model(batch)
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and not is_finite(leaf):
                    raise NotFiniteError(
                        f"this {type(model).__name__} gives values that are not finite on these images: look for "
                        "infinities and NaN in the images and the weights, or use a dtype with a larger range"
                    )
            outputs.append((len(batch), output))
    return outputs


def divergence(outputs: Outputs, reference: Outputs, loss: Loss | None) -> Divergence:
    """Return the mean divergence over all images.

    It is measured by ``loss`` if given; else by the KL divergence in nats where the output is one row of logits per
    image; else by the squared error relative to the reference's mean square.

    Raises:
        FitError: If there is nothing to compare.
        NotFiniteError: If the result is not finite.
    """
    total = agreeing = 0.0
    images = 0
    for (count, output), (_, wanted) in zip(outputs, reference, strict=True):
        is_float = isinstance(output, Tensor) and output.is_floating_point()
        is_logits = is_float and output.dim() == 2 and output.shape[1] > 1
        images += count
        if loss is not None:
            total += _mean_loss(loss(output, wanted)) * count
        elif is_logits:
            log_probs, wanted_log_probs = output.double().log_softmax(1), wanted.double().log_softmax(1)
            total += float((wanted_log_probs.exp() * (wanted_log_probs - log_probs)).sum())
        else:
            total += _relative_squared_error(output, wanted) * count
        if is_logits:
            agreeing += float((output.argmax(1) == wanted.argmax(1)).sum())
        else:
            agreeing = math.nan
    if not math.isfinite(total):
        what = "divergence" if loss is None else "loss"
        raise NotFiniteError(
            f"the {what} is {total / images} on these images, not finite: look for infinities and NaN in the outputs"
        )
    return Divergence(total / images, agreeing / images)


def _mean_loss(value: Any) -> float:
    try:
        return float(torch.as_tensor(value).double().mean())
    except (TypeError, ValueError, RuntimeError) as error:
        raise FitError(f"loss gives a {type(value).__name__}: return a number, or one for each image") from error


def _relative_squared_error(output: Any, wanted: Any) -> float:
    pairs = zip(tree_leaves(output), tree_leaves(wanted), strict=True)
    compared = [(leaf, other) for leaf, other in pairs if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not compared:
        raise FitError(
            f"an output of type {type(output).__name__} holds no floating-point tensor to compare: give loss=, a "
            "function of (output, the original's output)"
        )
    error = size = 0.0
    for leaf, other in compared:
        error += float((leaf.double() - other.double()).square().sum())
        size += float(other.double().square().sum())
    return error / size if size else error
