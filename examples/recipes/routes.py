"""Routes from a trained network to one with fewer activations, all with the same number of epochs."""

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
from .training import Log, evaluate, train

PICTURES = 2048  # unlabeled pictures to fit with
STAGES = 3
TrainedModel = tuple[nn.Module, Log]


@dataclass(frozen=True)
class Start:
    """What all routes have in common. The original is the teacher.

    A log's `untrained` is the accuracy before training, in percent, on the pictures held back (or else the test split).
    """

    model: nn.Module
    plan: nmconv.Plan
    data: Data
    recipe: Recipe
    out: Path
    device: str

    def longer(self) -> TrainedModel:
        """Train the original for as long, as the baseline."""
        return self._trained(copy.deepcopy(self.model))

    def at_once(self) -> TrainedModel:
        """Drop all activations of the plan before training."""
        return self._trained(nmconv.apply_plan(self.model, self.plan))

    def gradually(self) -> TrainedModel:
        """Drop all activations of the plan gradually, during the first 60 % of the training."""
        return self._trained(nmconv.apply_plan(self.model, self.plan, gradual=True), gradual={})

    def fitted(self) -> TrainedModel:
        """Drop all activations of the plan, fit the linear runs to the original, then train."""
        return self._trained(self._fitted(nmconv.apply_plan(self.model, self.plan)))

    def iteratively(self, fit: bool = False) -> TrainedModel:
        """Drop a third of the plan's activations, evenly spaced over the network, and train; then the next third.

        As in EASIER (ECML 2024), but in a fixed order. Each stage has a third of the epochs and its own schedule.
        """
        dropped = [site.id for site in self.plan.changes]
        model, log = self.model, Log(losses=[], curve=[], seconds=0.0)
        for stage in range(STAGES):
            kept = [site for later in range(stage + 1, STAGES) for site in dropped[later::STAGES]]
            model = nmconv.apply_plan(model, self.plan.edit(dict.fromkeys(kept, "keep")))
            model = self._fitted(model) if fit else model
            recipe = replace(self.recipe, epochs=self.recipe.epochs // STAGES, seed=self.recipe.seed * STAGES + stage)
            _, stage_log = replace(self, recipe=recipe, out=self.out / f"stage-{stage}")._trained(model)
            log = {key: log[key] + stage_log[key] for key in log}
        return model, log

    def fitted_iteratively(self) -> TrainedModel:
        """Do what `iteratively` does, and fit the linear runs before each stage."""
        return self.iteratively(fit=True)

    def _trained(self, model: nn.Module, **options: Any) -> TrainedModel:
        options |= {"out": self.out, "teacher": self.model, "device": self.device}
        untrained = evaluate(model, self.data.valid or self.data.test)
        return model, {"untrained": untrained, **train(model, self.data, self.recipe, **options)}

    def _fitted(self, model: nn.Module) -> nn.Module:
        pictures = self.data.train.first(PICTURES).images
        return nmconv.fit(model, inputs(self.model, pictures), reference=self.model)


ROUTES: dict[str, Callable[[Start], TrainedModel]] = {
    "longer": Start.longer,
    "at once": Start.at_once,
    "gradual": Start.gradually,
    "fitted": Start.fitted,
    "iterative": Start.iteratively,
    "iterative, fitted": Start.fitted_iteratively,
}
