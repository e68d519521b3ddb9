"""Statistics of batch norms estimated anew: the cheapest repair of a converted network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.errors import FitError
from nmconv.fitting.data import Images, read_images, taking
from nmconv.fitting.norm_statistics import counts
from nmconv.surgery import check_plain

__all__ = ["eval_mode", "give_back", "recalibrate", "recalibrate_norms"]

_BATCH = 64  # images
Statistics = list[tuple[Any, list[Tensor]]]


def recalibrate_norms(model: nn.Module, data: Any, *, key: str | None = None) -> nn.Module:
    """Estimate the running statistics of all batch norms anew, in place: the cheapest repair of a converted model.

    Every norm gets the mean and the variance of what it is given, over all images, while the norms before it are
    normalising by their batches' statistics; everything else runs as in eval mode.

    Args:
        model: Its parameters and modes stay as they are.
        data: A handful of batches: a tensor ``[images, ...]``, or a loader or iterable of tensors, of (x, y) pairs
            or of dicts. Small batches are put together.
        key: Where batches are dicts: under which key the images are.

    Returns:
        The model.

    Raises:
        ModelTypeError: If ``model`` is no module, or wrapped, compiled or scripted.
        OptionError: If there are no images.
        FitError: If what a norm is given is not finite, or the model does not take the images. The statistics are as
            they were then.
    """
    check_plain(model, "recalibrate")
    images = read_images(data, model, key=key)
    recalibrate(model, images)
    return model


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """All of the models in eval mode; afterwards every module is in the mode it was found in.

    A module that has taken the place of another by then gets the other's mode.
    """
    before = [(model, name, module, module.training) for model in models for name, module in model.named_modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model in models:
            modes = {name: training for owner, name, _, training in before if owner is model}
            for name, module in model.named_modules():
                module.training = modes.get(name, module.training)
        for _, _, module, training in before:
            module.training = training


def recalibrate(model: nn.Module, images: Images) -> Statistics:
    """Do it with the images that are fitted; if it fails, the norms have the statistics that they had.

    Returns:
        The norms, each with the statistics that it had.
    """
    norms: list[Any] = [module for module in model.modules() if counts(module)]
    before = [(norm, [value.clone() for value in _statistics(norm)]) for norm in norms]
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.training = True
            _estimate(model, norms, images)
            give_back([(norm, had) for norm, had in before if not int(norm.num_batches_tracked)])  # nobody calls it
            for norm in norms:
                if not all(bool(torch.isfinite(value).all()) for value in _statistics(norm)):
                    raise FitError(
                        f"a {type(norm).__name__} of this {type(model).__name__} is given values that are not finite"
                    )
        except BaseException:
            give_back(before)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return before


def give_back(before: Statistics) -> None:
    """Give norms the statistics that they had."""
    with torch.no_grad():
        for norm, had in before:
            for value, number in zip(_statistics(norm), had, strict=True):
                value.copy_(number)


def _statistics(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def _estimate(model: nn.Module, norms: list[Any], images: Images) -> None:
    """Statistics over all images: of each batch, a smaller one counting for less, and of what lies between them."""
    seen: Counter[int] = Counter()
    means: dict[int, Tensor] = {}
    between: dict[int, Tensor] = {}  # squared deviations of the batches' means, times images (Welford's)

    def weigh(norm: Any, args: Any, kwargs: Any) -> None:
        count = len(args[0] if args else kwargs["input"])
        seen[id(norm)] += count
        norm.momentum = count / seen[id(norm)]
        means[id(norm)] = norm.running_mean.double()

    def spread(norm: Any, args: Any, result: Any) -> None:
        part = norm.momentum
        moved = norm.running_mean.double() - means[id(norm)]
        between[id(norm)] = between.get(id(norm), 0) + seen[id(norm)] * moved.square() * (1 / part - 1)

    with ExitStack() as hooks, torch.no_grad():
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(weigh, with_kwargs=True).remove)
            hooks.callback(norm.register_forward_hook(spread).remove)
        for batch in _gathered(images):
            with taking(model, batch):
                try:
                    model(batch)
                except ValueError as error:  # torch's: one value a channel
                    raise FitError(
                        f"a batch of {len(batch)} images has no statistics ({error}): give more images"
                    ) from error
    with torch.no_grad():
        for norm in norms:
            if seen[id(norm)]:
                norm.running_var += (between[id(norm)] / seen[id(norm)]).to(norm.running_var.dtype)


def _gathered(images: Images) -> Iterator[Tensor]:
    """Batches large enough for statistics, where images are of one size; what is left at the end joins the last."""
    whole: list[Tensor] = []  # a batch, held back until there is another
    parts: list[Tensor] = []
    for batch, _ in images.batches(held=False):
        if (whole or parts) and (whole or parts)[0].shape[1:] != batch.shape[1:]:
            yield torch.cat([*whole, *parts])
            whole, parts = [], []
        parts.append(batch)
        if sum(map(len, parts)) >= _BATCH:
            yield from whole
            whole, parts = [torch.cat(parts)], []
    yield torch.cat([*whole, *parts])
