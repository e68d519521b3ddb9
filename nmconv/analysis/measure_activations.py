"""The public call: statistics of every activation of a model on a set of images."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nmconv.analysis.leave_untouched import untouched
from nmconv.analysis.observed_sites import sites_of
from nmconv.analysis.site_accumulators import SiteAccumulators
from nmconv.analysis.statistics import ActivationStats
from nmconv.errors import FitError, NoSitesError, OptionError
from nmconv.fitting import home_of, read_batches, taking
from nmconv.flow import recordings_of
from nmconv.surgery import check_has_run, check_plain

__all__ = ["activation_stats"]


def activation_stats(model: nn.Module, data: Any, *, loss: Any = None, key: str | None = None) -> ActivationStats:
    """Measure what each activation of a model is given and gives: how rich it is, what is dead, what is sparse.

    Every call of an activation counts by itself: modules, functions, shared and in-place ones, those inside of timm's
    norm + act layers, and expressions such as ``x * torch.sigmoid(x)``; those of gates and heads, too. Everything is
    summed batch by batch in float64, and no map is kept beyond its batch; the batches' sizes make no difference. The
    scatter matrices take ``8 * channels ** 2`` bytes for each activation.

    Args:
        model: In any mode; it runs in eval mode. Modes, parameters, ``.grad``, buffers, hooks and random states are
            afterwards as they were.
        data: A tensor ``[images, ...]``, or a loader or iterable of batches: tensors, (x, y) pairs or dicts. Read once.
        loss: Measures gradients, too. A function of (output, y), of (output, batch) where batches are dicts, or of the
            output alone, which gives the batch's mean or a number for each image.
        key: Where batches are dicts: under which key the images are.

    Returns:
        The table, a line for each activation that ran: :class:`nmconv.SiteStats` says what the numbers are. The
        effective rank is the participation ratio tr(S)²/tr(S²) of the channel covariance S (Gao et al. 2017, bioRxiv
        214262). A gradient is that of an image's own loss, so that it goes neither by the batch's size nor by how many
        images there are.

    Raises:
        ModelTypeError: If ``model`` is no module, or wrapped, compiled or scripted.
        OptionError: If there are no images, ``loss`` is no function, or asks for a y that the data does not have.
        NoSitesError: If the model calls no activation that nmconv knows.
        FitError: If the model does not take the images, or ``loss`` gives nothing that depends on them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
        >>> _ = nn.init.constant_(model[0].weight, 1.0), nn.init.constant_(model[0].bias, 0.0)
        >>> images = torch.tensor([-1.0, 1.0, 3.0, -2.0]).view(1, 1, 2, 2)
        >>> found = nmconv.activation_stats(model, images)["1#1"]
        >>> found.positive, found.mean, found.sparsity, found.rank, found.dead
        (0.5, 1.0, 0.5, 1.0, ())
    """
    check_plain(model, "measure")
    check_has_run(model)
    if loss is not None and not callable(loss):
        raise OptionError(f"loss={loss!r:.80}: give a function of (output, y) or of the output, or None")
    device, dtype = home_of(model)
    with untouched(model):
        batches = read_batches(data, key)
        images, target = next(batches)
        on_target = _asks_for_target(loss, target) if loss is not None else False
        first = images[:2].to(device, dtype if images.is_floating_point() else images.dtype)
        measured = SiteAccumulators(model, sites_of(model, recordings_of(model, first, both_sizes=False)))
        if not measured.sites:
            raise NoSitesError(
                f"this {type(model).__name__} calls no activation that nmconv knows: see nmconv.register"
            )
        with measured.watch:
            for batch, y in itertools.chain([(images, target)], batches):
                images = batch.to(device, dtype if batch.is_floating_point() else batch.dtype, copy=True)
                measured.images += len(images)
                if loss is None:
                    with torch.no_grad(), taking(model, images), measured.watch.running():
                        model(images)
                else:
                    moved = tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, y)
                    _there_and_back(measured, model, images, loss, (moved,) if on_target else ())
    return measured.stats()


def _there_and_back(
    measured: SiteAccumulators, model: nn.Module, images: Tensor, loss: Callable[..., Any], rest: Any
) -> None:
    """One forward, and the way back to the images: no parameter gets a gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.clone()
        if leaf.is_floating_point():
            leaf.requires_grad_()
        measured.scale = float(len(images))  # the mean loss counts each image for so little
        with taking(model, images), measured.watch.running():
            output = model(leaf.clone())  # some models overwrite their input
        value = loss(output, *rest)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise FitError(
                f"loss gives {'a tensor without gradient' if isinstance(value, Tensor) else type(value).__name__}: it "
                "is to give a tensor computed from the output: the mean over the batch, or a number for each image"
            )
        wanted = [leaf] if leaf.requires_grad else [each for each in model.parameters() if each.requires_grad]
        torch.autograd.grad(value.mean(), wanted, allow_unused=True)


def _asks_for_target(loss: Callable[..., Any], target: Any) -> bool:
    """Whether the loss is called with what comes with the images.

    Raises:
        OptionError: If it has to be, and nothing does.
    """
    if target is not None and _takes(loss, 2):
        return True
    if not _takes(loss, 1):
        raise OptionError(
            "loss is a function of (output, y), and data has no y: give batches of (x, y) pairs or dicts, or a "
            "function of the output alone"
        )
    return False


def _takes(loss: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many arguments; one whose signature is not known can."""
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
