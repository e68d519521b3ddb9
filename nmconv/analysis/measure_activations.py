"""The public function that measures every activation of a model on a set of images."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nmconv.analysis.observed_model import state_preserved
from nmconv.analysis.observed_sites import observed_sites
from nmconv.analysis.site_accumulators import SiteAccumulators
from nmconv.analysis.statistics import ActivationStats
from nmconv.errors import FitError, OptionError
from nmconv.flow import record_model
from nmconv.observing import device_and_dtype_of, input_errors_as_fit_errors, read_batches, to_device_and_dtype
from nmconv.surgery import check_initialized, check_plain

__all__ = ["activation_stats"]


def activation_stats(model: nn.Module, data: Any, *, loss: Any = None, key: str | None = None) -> ActivationStats:
    """Measure the inputs and outputs of each activation of a model: effective rank, dead channels, sparsity.

    Every call of an activation counts separately: modules, functions, shared and in-place activations, those within
    timm's norm + act layers, expressions such as ``x * torch.sigmoid(x)``, and also those of gates and heads. Sums are
    accumulated batch by batch in float64, so that batch sizes do not matter and no map outlives its batch. The scatter
    matrices take ``8 * channels ** 2`` bytes per activation.

    Args:
        model: A module in any mode; it runs in eval mode. Its modes, parameters, ``.grad``, buffers, hooks and the RNG
            state are left unchanged.
        data: A tensor ``[images, ...]``, or a loader or iterable of batches: tensors, (x, y) pairs or dicts. Read once.
        loss: If given, gradients are measured, too. A function of (output, y), of (output, batch) if batches are dicts,
            or of the output alone. It returns the batch's mean loss or one loss per image.
        key: The key of the images if batches are dicts.

    Returns:
        One :class:`nmconv.SiteStats` for each activation that ran. The effective rank is the participation ratio
        tr(S)²/tr(S²) of the channel covariance S (Gao et al. 2017, bioRxiv 214262). Gradients are those of each image's
        own loss, so that they depend neither on the batch size nor on the number of images.

    Raises:
        ModelTypeError: If ``model`` is not a module, or is wrapped, compiled or scripted.
        OptionError: If there are no images, ``loss`` is not a function, or it needs a y that the data does not have.
        NoSitesError: If the model calls no activation that nmconv knows.
        FitError: If the model fails on the images, or the result of ``loss`` does not depend on them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
        >>> _ = nn.init.constant_(model[0].weight, 1.0), nn.init.constant_(model[0].bias, 0.0)
        >>> images = torch.tensor([-1.0, 1.0, 3.0, -2.0]).view(1, 1, 2, 2)
        >>> stats = nmconv.activation_stats(model, images)["1#1"]
        >>> stats.positive, stats.mean, stats.sparsity, stats.rank, stats.dead
        (0.5, 1.0, 0.5, 1.0, ())
    """
    check_plain(model, "measure")
    check_initialized(model)
    if loss is not None and not callable(loss):
        raise OptionError(f"loss={loss!r:.80}: give a function of (output, y) or of the output, or None")
    device_and_dtype = device_and_dtype_of(model)
    device, _ = device_and_dtype
    with state_preserved(model):
        batches = read_batches(data, key)
        first_images, first_target = next(batches)
        with_target = loss is not None and _takes_target(loss, first_target)
        example = to_device_and_dtype(first_images[:2], device_and_dtype)
        accumulators = SiteAccumulators(model, observed_sites(model, record_model(model, example, both_sizes=False)))
        with accumulators.watch:
            for batch, target in itertools.chain([(first_images, first_target)], batches):
                images = to_device_and_dtype(batch, device_and_dtype, copy=True)
                accumulators.images += len(images)
                if loss is None:
                    with torch.no_grad(), input_errors_as_fit_errors(model, images), accumulators.watch.running():
                        model(images)
                else:
                    moved = tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, target)
                    _run_with_gradients(accumulators, model, images, loss, (moved,) if with_target else ())
    return accumulators.stats()


def _run_with_gradients(
    accumulators: SiteAccumulators,
    model: nn.Module,
    images: Tensor,
    loss: Callable[..., Any],
    loss_args: tuple[Any, ...],
) -> None:
    """Run forward and backward. No parameter gets a gradient.

    Args:
        accumulators: Updated, including the gradients.
        model: The model that they watch.
        images: A batch.
        loss: A function of the output and ``loss_args``.
        loss_args: The target in a tuple, or an empty tuple.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.clone()
        if leaf.is_floating_point():
            leaf.requires_grad_()
        accumulators.gradient_scale = float(len(images))  # undoes the division by the batch size in the mean loss
        with input_errors_as_fit_errors(model, images), accumulators.watch.running():
            output = model(leaf.clone())  # some models overwrite their input
        value = loss(output, *loss_args)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise FitError(
                f"loss gives {'a tensor without gradient' if isinstance(value, Tensor) else type(value).__name__}: "
                "return a tensor computed from the output: the mean over the batch, or a number for each image"
            )
        inputs = [leaf] if leaf.requires_grad else [each for each in model.parameters() if each.requires_grad]
        torch.autograd.grad(value.mean(), inputs, allow_unused=True)


def _takes_target(loss: Callable[..., Any], target: Any) -> bool:
    """Return whether to call the loss with the target.

    Raises:
        OptionError: If the loss needs a target and there is none.
    """
    if target is not None and _accepts(loss, 2):
        return True
    if not _accepts(loss, 1):
        raise OptionError(
            "loss is a function of (output, y), and data has no y: give batches of (x, y) pairs or dicts, or a "
            "function of the output alone"
        )
    return False


def _accepts(function: Callable[..., Any], count: int) -> bool:
    """Return whether a function accepts ``count`` positional arguments, True if its signature is unknown."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
