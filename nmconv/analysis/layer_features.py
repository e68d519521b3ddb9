"""Features of a model's layers: spatial means of what modules and activations return, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.analysis.observed_sites import ObservedSite, channel_axes, observed_sites
from nmconv.analysis.site_watch import SiteWatch
from nmconv.errors import FitError, NoSitesError, OptionError
from nmconv.flow import record_model
from nmconv.observing import device_and_dtype_of, input_errors_as_fit_errors, to_device_and_dtype

__all__ = ["LayerFeatures"]


class LayerFeatures:
    """Collect the features of a model's layers batch by batch.

    Args:
        model: A module in eval mode.
        layers: Names of modules and ids of activations; None for all activations that belong to convolutions.
        images: A few images to record the model with.

    Raises:
        OptionError: If the model has no module or activation with one of the names.
        NoSitesError: If ``layers`` is None, and no activation belongs to a convolution.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None, images: Tensor) -> None:
        self._model = model
        self._device_and_dtype = device_and_dtype_of(model)
        recordings = record_model(
            model, to_device_and_dtype(images, self._device_and_dtype, copy=True), both_sizes=False
        )
        sites = {site.id: site for site in observed_sites(model, recordings)[False]}
        if layers is None:
            layers = [site_id for site_id, site in sites.items() if site.is_site]
            if not layers:
                raise NoSitesError(
                    f"no activation of this {type(model).__name__} belongs to a convolution: name modules by layers="
                )
        _check_names(model, layers, sites)
        self._layers = list(layers)
        self._modules = [name for name in self._layers if name not in sites]
        self._sites = {False: [sites[name] for name in self._layers if name in sites]}
        self._axes = channel_axes(model, recordings) if self._modules else {}
        self._batch: dict[str, Tensor] = {}
        self._batches: dict[str, list[Tensor]] = {name: [] for name in self._layers}

    def add(self, images: Tensor) -> None:
        """Run one forward and keep the features of its images.

        Raises:
            FitError: If the model fails on the images, or a layer does not run, returns no tensor, or does not return
                one row per image.
        """
        self._batch = {}
        images = to_device_and_dtype(images, self._device_and_dtype, copy=True)
        count = len(images)
        watch = SiteWatch(self._model, self._sites, on_output=self._keep_activation)
        with ExitStack() as hooks, torch.no_grad(), input_errors_as_fit_errors(self._model, images):
            hooks.enter_context(watch)
            for name in self._modules:
                handle = self._model.get_submodule(name).register_forward_hook(self._module_hook(name))
                hooks.callback(handle.remove)
            hooks.enter_context(watch.running())
            self._model(images)
        for name in self._layers:
            features = self._batch.get(name)
            if features is None:
                raise FitError(f"{name!r} does not run in this {type(self._model).__name__}: leave it out of layers")
            if len(features) != count:
                raise FitError(f"{name!r} gives {len(features)} rows for {count} images: leave it out of layers")
            self._batches[name].append(features)

    def features(self) -> dict[str, Tensor]:
        """Return each layer's features ``[images, channels]``, float64 on the CPU, by the layer's name."""
        return {name: torch.cat(batches) for name, batches in self._batches.items()}

    def _keep_activation(self, site: ObservedSite, value: Tensor) -> None:
        self._keep(site.id, value, site.axis)

    def _module_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, value: Any) -> None:
            if not isinstance(value, Tensor):
                raise FitError(f"{name!r} returns a {type(value).__name__}, not a tensor: name a module inside of it")
            with torch._C.DisableTorchFunction():
                self._keep(name, value, self._axes.get(name, 1))

        return hook

    def _keep(self, name: str, value: Tensor, axis: int) -> None:
        """Keep the means over all axes but the first and the channel axis."""
        if value.dim() < 2:
            self._batch[name] = value.reshape(-1, 1).double().cpu()
            return
        rows = value.detach().movedim(axis, 1).flatten(2) if value.dim() > 2 else value.detach()[..., None]
        self._batch[name] = rows.double().mean(2).cpu()


def _check_names(model: nn.Module, layers: Iterable[str], sites: Iterable[str]) -> None:
    """Raise OptionError if a layer is neither a module of the model nor one of its activations."""
    known = {*sites, *(name for name, _ in model.named_modules())}
    for name in layers:
        if name not in known:
            similar = sorted(each for each in known if name in each)[:5]
            hint = f"did you mean {', '.join(similar)}?" if similar else f"it has {', '.join(sorted(known)[1:6])}, ..."
            raise OptionError(f"layer {name!r} is not a module or activation of this {type(model).__name__}: {hint}")
