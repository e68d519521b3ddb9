"""Re-estimate batch norm statistics: the cheapest repair of a converted network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.errors import FitError
from nmconv.fitting.norm_statistics import has_running_statistics
from nmconv.observing import Images, eval_mode, input_errors_as_fit_errors, read_images
from nmconv.surgery import check_plain

__all__ = ["recalibrate", "recalibrate_norms", "restore_statistics"]

_MIN_BATCH = 64  # images; smaller batches are concatenated
Statistics = list[tuple[Any, list[Tensor]]]  # norms with copies of their statistics


def recalibrate_norms(model: nn.Module, data: Any, *, key: str | None = None) -> nn.Module:
    """Re-estimate the running statistics of all batch norms, in place: the cheapest repair of a converted model.

    Every batch norm gets the mean and the variance of its input over all images, while the norms before it normalize by
    their batches' statistics; everything else runs as in eval mode.

    Args:
        model: Its parameters and modes stay as they are.
        data: A few batches: a tensor ``[images, ...]``, or a loader or iterable of tensors, of (x, y) pairs or of
            dicts. Small batches are concatenated.
        key: Where batches are dicts: the key of the images.

    Returns:
        The model.

    Raises:
        ModelTypeError: If ``model`` is not a module, or is wrapped, compiled or scripted.
        OptionError: If there are no images.
        FitError: If the input of a norm is not finite, or the model does not accept the images. The statistics are then
            as they were before.

    Example:
        >>> import torch, nmconv
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> images = torch.randn(16, 3, 8, 8)
        >>> _ = nmconv.recalibrate_norms(model, images)
        >>> torch.allclose(model[1].running_mean, model[0](images).mean((0, 2, 3)), atol=1e-5)
        True
    """
    check_plain(model, "recalibrate")
    images = read_images(data, model, key=key)
    recalibrate(model, images)
    return model


def recalibrate(model: nn.Module, images: Images) -> Statistics:
    """Re-estimate the statistics of all batch norms from the fitted images; if that fails, restore them.

    Returns:
        The norms with the statistics that they had before, for :func:`restore_statistics`.

    Raises:
        FitError: See :func:`recalibrate_norms`.
    """
    norms: list[Any] = [module for module in model.modules() if has_running_statistics(module)]
    before = [(norm, [value.clone() for value in _statistics(norm)]) for norm in norms]
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.training = True
            _estimate(model, norms, images)
            restore_statistics([(norm, old) for norm, old in before if not int(norm.num_batches_tracked)])  # not called
            for norm in norms:
                if not all(bool(torch.isfinite(value).all()) for value in _statistics(norm)):
                    raise FitError(
                        f"a {type(norm).__name__} of this {type(model).__name__} gets values that are not finite: look "
                        "for infinities and NaN in the images and the weights"
                    )
        except BaseException:
            restore_statistics(before)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return before


def restore_statistics(before: Statistics) -> None:
    """Copy earlier statistics back into the norms."""
    with torch.no_grad():
        for norm, old in before:
            for value, old_value in zip(_statistics(norm), old, strict=True):
                value.copy_(old_value)


def _statistics(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def _estimate(model: nn.Module, norms: list[Any], images: Images) -> None:
    """Estimate mean and total variance over all images, each batch weighted by its size.

    The momentum turns the running statistics into weighted means over the batches. The variance between the batches'
    means, which a mean of variances lacks, is accumulated by Welford's update and added at the end.
    """
    seen: Counter[int] = Counter()
    means: dict[int, Tensor] = {}
    between: dict[int, Tensor] = {}  # squared deviations of the batches' means, times images

    def set_momentum(norm: Any, args: Any, kwargs: Any) -> None:
        count = len(args[0] if args else kwargs["input"])
        seen[id(norm)] += count
        norm.momentum = count / seen[id(norm)]
        means[id(norm)] = norm.running_mean.double()

    def add_between(norm: Any, args: Any, result: Any) -> None:
        share = norm.momentum
        step = norm.running_mean.double() - means[id(norm)]
        between[id(norm)] = between.get(id(norm), 0) + seen[id(norm)] * step.square() * (1 / share - 1)

    with ExitStack() as hooks, torch.no_grad():
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(set_momentum, with_kwargs=True).remove)
            hooks.callback(norm.register_forward_hook(add_between).remove)
        for batch in _large_batches(images):
            with input_errors_as_fit_errors(model, batch):
                try:
                    model(batch)
                except ValueError as error:  # torch's, for one value per channel
                    raise FitError(
                        f"a batch of {len(batch)} images has no statistics ({error}): give more images"
                    ) from error
    with torch.no_grad():
        for norm in norms:
            if seen[id(norm)]:
                norm.running_var += (between[id(norm)] / seen[id(norm)]).to(norm.running_var.dtype)


def _large_batches(images: Images) -> Iterator[Tensor]:
    """Yield batches of at least 64 images of equal size; add a smaller remainder to the last batch."""
    complete: list[Tensor] = []  # one batch, held back until it is known whether a remainder follows
    parts: list[Tensor] = []
    for batch, _ in images.batches(held=False):
        if (complete or parts) and (complete or parts)[0].shape[1:] != batch.shape[1:]:
            yield torch.cat([*complete, *parts])
            complete, parts = [], []
        parts.append(batch)
        if sum(map(len, parts)) >= _MIN_BATCH:
            yield from complete
            complete, parts = [torch.cat(parts)], []
    yield torch.cat([*complete, *parts])
