"""How far a network's outputs are from a reference's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconv.algebra import is_finite
from nmconv.errors import FitError, OptionError
from nmconv.fitting.data import Images, taking
from nmconv.fitting.report import Divergence

__all__ = ["Loss", "NotFiniteError", "Outputs", "check_loss", "divergence", "outputs_of"]

Loss = Callable[[Any, Any], Any]  # of the output and the reference's output of a batch: a number, or one for each image
Outputs = list[tuple[int, Any]]  # of each batch: how many images, and the output


class NotFiniteError(FitError):
    """Outputs or a loss that are not: of one candidate among many this says that it is none."""


def check_loss(loss: object) -> None:
    """Refuse what is no function, with OptionError."""
    if loss is not None and not callable(loss):
        raise OptionError(f"loss={loss!r:.80}: give a function of (output, the original's output), or None")


def outputs_of(model: nn.Module, images: Images, held: bool | None) -> Outputs:
    """Outputs of all batches, in the model's present mode.

    Raises:
        NotFiniteError: If one is not finite.
        FitError: If the model does not take the images.
    """
    found = []
    with torch.no_grad():
        for batch, _ in images.batches(held):
            with taking(model, batch):
                output = model(batch)
            for part in tree_leaves(output):
                if isinstance(part, Tensor) and part.is_floating_point() and not is_finite(part):
                    raise NotFiniteError(
                        f"this {type(model).__name__} gives values that are not finite on these images"
                    )
            found.append((len(batch), output))
    return found


def divergence(outputs: Outputs, reference: Outputs, loss: Loss | None) -> Divergence:
    """Mean over images; by KL divergence where the output is one row of logits for each image, else by ``loss``.

    Without a loss, outputs of any other form are compared by their squared error relative to the reference's mean
    square.

    Raises:
        FitError: If there is nothing to compare; NotFiniteError if ``loss`` gives what is not finite.
    """
    total = same = 0.0
    images = 0
    for (count, output), (_, wanted) in zip(outputs, reference, strict=True):
        floats = isinstance(output, Tensor) and output.is_floating_point()
        logits = floats and output.dim() == 2 and output.shape[1] > 1
        images += count
        if loss is not None:
            total += _number(loss(output, wanted)) * count
        elif logits:
            one, two = output.double().log_softmax(1), wanted.double().log_softmax(1)
            total += float((two.exp() * (two - one)).sum())
        else:
            total += _relative(output, wanted) * count
        if logits:
            same += float((output.argmax(1) == wanted.argmax(1)).sum())
        else:
            same = math.nan
    if not math.isfinite(total):
        raise NotFiniteError(
            f"the {'divergence' if loss is None else 'loss'} is {total / images} on these images: not finite"
        )
    return Divergence(total / images, same / images)


def _number(lost: Any) -> float:
    try:
        return float(torch.as_tensor(lost).double().mean())
    except (TypeError, ValueError, RuntimeError) as error:
        raise FitError(f"loss gives a {type(lost).__name__}: it is to give a number, or one for each image") from error


def _relative(output: Any, wanted: Any) -> float:
    error = size = 0.0
    pairs = zip(tree_leaves(output), tree_leaves(wanted), strict=True)
    compared = [(one, two) for one, two in pairs if isinstance(one, Tensor) and one.is_floating_point()]
    if not compared:
        raise FitError(
            f"an output of type {type(output).__name__} holds no floating-point tensor to compare: give loss=, a "
            "function of (output, the original's output)"
        )
    for one, two in compared:
        error += float((one.double() - two.double()).square().sum())
        size += float(two.double().square().sum())
    return error / size if size else error
