"""Ways from a trained network to one with fewer activations, each with as many epochs of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import nmconv

from .batches import inputs
from .pictures import Data
from .recipe import Recipe
from .training import Log, train

PICTURES = 2048  # without labels, to fit with
STAGES = 3
Arrival = tuple[nn.Module, Log]


@dataclass(frozen=True)
class Start:
    """Where all routes begin, and what they share; the original is the teacher."""

    model: nn.Module
    plan: nmconv.Plan
    data: Data
    recipe: Recipe
    out: Path
    device: str

    def longer(self) -> Arrival:
        """Train the original: what the others are compared with."""
        return self._trained(copy.deepcopy(self.model))

    def at_once(self) -> Arrival:
        """Drop everything before training."""
        return self._trained(nmconv.apply_plan(self.model, self.plan))

    def gradually(self) -> Arrival:
        """Drop everything by degrees, in the first six tenths of the training."""
        return self._trained(nmconv.apply_plan(self.model, self.plan, gradual=True), gradual={})

    def fitted(self) -> Arrival:
        """Drop everything, fit what has become linear to what the original computes, then train."""
        return self._trained(self._fitted(nmconv.apply_plan(self.model, self.plan)))

    def iteratively(self, fit: bool = False) -> Arrival:
        """Drop a third of the activations, evenly spread over the network, and train; then the next third.

        As in EASIER (ECML 2024), but in a fixed order. Each stage has a third of the epochs, and a schedule of its own.
        """
        gone = [site.id for site in self.plan.changes]
        model, log = self.model, Log(losses=[], curve=[], seconds=0.0)
        for stage in range(STAGES):
            stays = [site for later in range(stage + 1, STAGES) for site in gone[later::STAGES]]
            model = nmconv.apply_plan(model, self.plan.edit(dict.fromkeys(stays, "keep")))
            model = self._fitted(model) if fit else model
            recipe = replace(self.recipe, epochs=self.recipe.epochs // STAGES, seed=self.recipe.seed * STAGES + stage)
            _, found = replace(self, recipe=recipe, out=self.out / f"stage-{stage}")._trained(model)
            log = {key: log[key] + found[key] for key in log}
        return model, log

    def fitted_iteratively(self) -> Arrival:
        """The same, and fit what has become linear before each stage."""
        return self.iteratively(fit=True)

    def _trained(self, model: nn.Module, **options: Any) -> Arrival:
        options |= {"out": self.out, "teacher": self.model, "device": self.device}
        return model, train(model, self.data, self.recipe, **options)

    def _fitted(self, model: nn.Module) -> nn.Module:
        pictures = self.data.train.first(PICTURES).images
        return nmconv.fit(model, inputs(self.model, pictures), reference=self.model)


ROUTES: dict[str, Callable[[Start], Arrival]] = {
    "longer": Start.longer,
    "at once": Start.at_once,
    "gradual": Start.gradually,
    "fitted": Start.fitted,
    "iterative": Start.iteratively,
    "iterative, fitted": Start.fitted_iteratively,
}
