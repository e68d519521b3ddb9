"""Sums of all activations of a model, filled while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nmconv.analysis.map_moments import MapMoments
from nmconv.analysis.observed_sites import Observed
from nmconv.analysis.site_watch import SiteWatch
from nmconv.analysis.statistics import ActivationStats, stats_of

__all__ = ["SiteAccumulators"]


class SiteAccumulators:
    """The activations of a model, and what has been seen of them so far.

    Args:
        model: Any module.
        sites: As :func:`nmconv.analysis.observed_sites.sites_of` gives them.

    Attributes:
        sites: By id, eval mode's first.
        sums: Of each.
        images: How many came by.
        watch: What fills the sums while the model runs.
        scale: Factor of the gradients of the batch that runs: each output's is taken on the way back; 0 takes none.
    """

    def __init__(self, model: nn.Module, sites: Mapping[bool, Sequence[Observed]]) -> None:
        self._model = model
        self.sites: dict[str, Observed] = {}
        for site in (*sites.get(False, ()), *sites.get(True, ())):
            self.sites.setdefault(site.id, site)
        self.watch = SiteWatch(model, sites, given=self._given, made=self._made)
        self.scale = 0.0
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.images = 0
        self.sums = {name: MapMoments(name, site.axis) for name, site in self.sites.items()}

    def stats(self) -> ActivationStats:
        """What there is so far."""
        return stats_of(type(self._model).__name__, self.images, self.sites, self.sums)

    def _given(self, site: Observed, value: Tensor) -> None:
        self.sums[site.id].add_input(value)

    def _made(self, site: Observed, value: Tensor) -> None:
        sums = self.sums[site.id]
        with torch.no_grad():
            sums.add_output(value.detach())
        if self.scale and value.requires_grad and value.dim():
            scale = self.scale
            sums.images += len(value)
            value.register_hook(lambda gradient: sums.add_gradient(gradient, scale))
