"""Accumulate the moments of all activations of a model while it runs, and turn them into statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nmconv.analysis.map_moments import MapMoments
from nmconv.analysis.observed_sites import ObservedSite
from nmconv.analysis.site_watch import SiteWatch
from nmconv.analysis.statistics import ActivationStats, SiteStats
from nmconv.errors import NoSitesError

__all__ = ["SiteAccumulators"]

_RELUS = ("ReLU", "ReLU6")  # constant wherever the input is not positive
_DEAD_VARIANCE = 1e-12  # a channel's variance over the mean of all channels' variances
_ROUNDING = 1e-24  # variance over squared mean of a constant, as computed in float64


class SiteAccumulators:
    """One :class:`MapMoments` for each activation of a model.

    Args:
        model: The model to watch.
        sites: Its activation calls, as :func:`nmconv.analysis.observed_sites.observed_sites` returns them.

    Attributes:
        sites: The activations by id: those of eval mode, then those of train mode only.
        moments: The moments of each, by id.
        images: How many images have been seen; counted by the caller.
        watch: Fills the moments while the model runs.
        gradient_scale: Factor for the gradients of the batch that runs; 0 records no gradients.

    Raises:
        NoSitesError: If there is no activation call.
    """

    def __init__(self, model: nn.Module, sites: Mapping[bool, Sequence[ObservedSite]]) -> None:
        self._model = model
        self.sites: dict[str, ObservedSite] = {}
        for site in (*sites.get(False, ()), *sites.get(True, ())):
            self.sites.setdefault(site.id, site)
        if not self.sites:
            raise NoSitesError(
                f"this {type(model).__name__} calls no activation that nmconv knows: see nmconv.register"
            )
        self.watch = SiteWatch(model, sites, on_input=self._add_input, on_output=self._add_output)
        self.gradient_scale = 0.0
        self.clear()

    def clear(self) -> None:
        """Forget everything seen so far."""
        self.images = 0
        self.moments = {site_id: MapMoments(site_id, site.axis) for site_id, site in self.sites.items()}

    def stats(self) -> ActivationStats:
        """Return the statistics of the activations that have run so far."""
        seen = [
            _site_stats(site, self.moments[site_id])
            for site_id, site in self.sites.items()
            if self.moments[site_id].output_positions and self.moments[site_id].input_positions
        ]
        return ActivationStats(type(self._model).__name__, self.images, tuple(seen))

    def _add_input(self, site: ObservedSite, value: Tensor) -> None:
        self.moments[site.id].add_input(value)

    def _add_output(self, site: ObservedSite, value: Tensor) -> None:
        moments = self.moments[site.id]
        with torch.no_grad():
            moments.add_output(value.detach())
        if self.gradient_scale and value.requires_grad and value.dim():
            scale = self.gradient_scale
            moments.gradient_images += len(value)
            value.register_hook(lambda gradient: moments.add_gradient(gradient, scale))


def _site_stats(site: ObservedSite, moments: MapMoments) -> SiteStats:
    assert moments.mean is not None and moments.scatter is not None and moments.positive_inputs is not None
    channels = len(moments.mean)
    covariance = moments.scatter / moments.output_positions
    variances = covariance.diagonal()
    variances = variances.where(variances > _ROUNDING * moments.mean.square(), 0.0)
    mean, trace = moments.mean.mean(), variances.sum()
    if site.kind in _RELUS:
        dead = moments.positive_inputs == 0
    else:
        dead = variances <= _DEAD_VARIANCE * variances.mean()
    return SiteStats(
        site=site.id,
        kind=site.kind,
        channels=channels,
        values=moments.output_positions * channels,
        positive=float(moments.positive_inputs.sum()) / (moments.input_positions * channels),
        dead=tuple(torch.nonzero(dead).flatten().tolist()),
        mean=float(mean),
        variance=float(variances.mean() + (moments.mean - mean).square().mean()),
        sparsity=moments.output_zeros / (moments.output_positions * channels),
        rank=float(trace.square() / covariance.square().sum()) if trace != 0 else 0.0,
        gradient=moments.gradient_norms / moments.gradient_images if moments.gradient_images else math.nan,
    )
