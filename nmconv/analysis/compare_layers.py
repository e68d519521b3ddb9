"""The public call: how alike two networks' layers are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.analysis.hsic import debiased_cka
from nmconv.analysis.leave_untouched import untouched
from nmconv.analysis.observed_sites import Observed, axes_of, sites_of
from nmconv.analysis.similarity import CKA
from nmconv.analysis.site_watch import SiteWatch
from nmconv.errors import FitError, NoSitesError, OptionError
from nmconv.fitting import home_of, read_batches, taking
from nmconv.flow import recordings_of
from nmconv.surgery import check_has_run, check_plain

__all__ = ["cka"]

_LEAST = 4  # images


def cka(model_a: nn.Module, model_b: nn.Module, data: Any, layers: Any = None, *, key: str | None = None) -> CKA:
    """Compare the layers of two networks by what they make of the same images: debiased linear CKA of spatial means.

    Centred kernel alignment (Kornblith et al., arXiv 1905.00414) with the unbiased estimator of HSIC (Nguyen et al.,
    arXiv 2010.15327, equation 3), over all images at once: unlike the biased one it does not grow with the number of
    channels over that of images. In memory are a vector of channels for each image and layer, and blocks of rows of
    the ``n × n`` Gram matrices.

    Args:
        model_a: In any mode; it runs in eval mode and is left as it was.
        model_b: The same; it may be the same one.
        data: A tensor ``[images, ...]``, or a loader or iterable of batches: tensors, (x, y) pairs or dicts. Read once.
        layers: Names of modules (``"layer1.0"``), or ids of activations (``"layer1.0.relu#2"``): one list for both
            models, or a pair of lists. None: the activations that belong to convolutions, those that a plan of the
            model has as sites, each model's own. Of what runs several times in one forward the last output counts.
        key: Where batches are dicts: under which key the images are.

    Returns:
        The matrix, with the layers' names and the number of images. Maps ``[n, channels, ...]`` are averaged over
        space, tokens behind linear layers ``[n, ..., channels]`` over these.

    Raises:
        ModelTypeError: If a model is no module, or wrapped, compiled or scripted.
        OptionError: If there are fewer than 4 images, or a layer is none of a model's.
        NoSitesError: If ``layers`` is None, and a model has no activation that belongs to a convolution.
        FitError: If a model does not take the images, or a layer does not run, or gives no tensor with a row for each
            image.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> found = nmconv.cka(model, model, torch.randn(16, 3, 8, 8), ["0", "1#1"])
        >>> found.layers_a, found.matrix.diagonal().round(decimals=6).tolist(), found.n
        (('0', '1#1'), [1.0, 1.0], 16)
    """
    names = _names(layers)
    for model in (model_a, model_b):
        check_plain(model, "compare")
        check_has_run(model)
    count = 0
    with ExitStack() as stack:
        for model in dict.fromkeys((model_a, model_b)):
            stack.enter_context(untouched(model))
        batches = read_batches(data, key)
        first, _ = next(batches)
        sides = [_Side(model, wanted, first[:2]) for model, wanted in zip((model_a, model_b), names, strict=True)]
        for images in itertools.chain([first], (each for each, _ in batches)):
            count += len(images)
            for side in sides:
                side.run(images)
    if count < _LEAST:
        raise OptionError(f"data holds {count} images: debiased CKA needs 4 or more, and is good from some hundreds on")
    one, two = (side.features() for side in sides)
    return CKA(debiased_cka([*one.values()], [*two.values()]), tuple(one), tuple(two), count)


def _names(layers: Any) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The layers of both models as the user gave them.

    Raises:
        OptionError: If that is no list of names, or pair of lists.
    """
    if layers is None:
        return None, None
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        layers = list(layers)
        pair = layers if len(layers) == 2 and not any(isinstance(one, str) for one in layers) else [layers, layers]
        if all(_is_list_of_names(one) for one in pair):
            return tuple(dict.fromkeys(pair[0])), tuple(dict.fromkeys(pair[1]))
    raise OptionError(f"layers={layers!r:.80}: give a list of names for both models, or a pair of lists")


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(name, str) for name in value)


class _Side:
    """One of the models, and what its layers gave."""

    def __init__(self, model: nn.Module, layers: Sequence[str] | None, images: Tensor) -> None:
        self._model = model
        self._device, self._dtype = home_of(model)
        recordings = recordings_of(model, self._taken(images), both_sizes=False)
        sites = {site.id: site for site in sites_of(model, recordings)[False]}
        if layers is None:
            layers = [name for name, site in sites.items() if site.real]
            if not layers:
                raise NoSitesError(
                    f"no activation of this {type(model).__name__} belongs to a convolution: name modules by layers="
                )
        known = {*sites, *(name for name, _ in model.named_modules())}
        for name in layers:
            if name not in known:
                near = sorted(one for one in known if name in one)[:5]
                hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(known)[1:6])}, ..."
                raise OptionError(f"layer {name!r} is no module or activation of this {type(model).__name__}: {hint}")
        self._layers = list(layers)
        self._modules = [name for name in self._layers if name not in sites]
        self._sites = {False: [sites[name] for name in self._layers if name in sites]}
        self._axes = axes_of(model, recordings) if self._modules else {}
        self._now: dict[str, Tensor] = {}
        self._all: dict[str, list[Tensor]] = {name: [] for name in self._layers}

    def run(self, images: Tensor) -> None:
        """One forward, and the spatial means of what the layers gave."""
        self._now = {}
        images = self._taken(images)
        count = len(images)
        watch = SiteWatch(self._model, self._sites, made=self._made)
        with ExitStack() as hooks, torch.no_grad(), taking(self._model, images):
            hooks.enter_context(watch)
            for name in self._modules:
                handle = self._model.get_submodule(name).register_forward_hook(self._returned(name))
                hooks.callback(handle.remove)
            hooks.enter_context(watch.running())
            self._model(images)
        for name in self._layers:
            if name not in self._now:
                raise FitError(f"{name!r} does not run in this {type(self._model).__name__}: leave it out of layers")
            if len(self._now[name]) != count:
                raise FitError(f"{name!r} gives {len(self._now[name])} rows for {count} images: leave it out of layers")
            self._all[name].append(self._now[name])

    def features(self) -> dict[str, Tensor]:
        """By layer ``[images, channels]``, in float64."""
        return {name: torch.cat(parts) for name, parts in self._all.items()}

    def _taken(self, images: Tensor) -> Tensor:
        return images.to(self._device, self._dtype if images.is_floating_point() else images.dtype, copy=True)

    def _made(self, site: Observed, value: Tensor) -> None:
        self._keep(site.id, value, site.axis)

    def _returned(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, value: Any) -> None:
            if not isinstance(value, Tensor):
                raise FitError(f"{name!r} gives a {type(value).__name__}, no tensor: name a module inside of it")
            with torch._C.DisableTorchFunction():
                self._keep(name, value, self._axes.get(name, 1))

        return hook

    def _keep(self, name: str, value: Tensor, axis: int) -> None:
        if value.dim() < 2:
            self._now[name] = value.reshape(-1, 1).double().cpu()
            return
        moved = value.detach().movedim(axis, 1).flatten(2) if value.dim() > 2 else value.detach()[..., None]
        self._now[name] = moved.double().mean(2).cpu()
