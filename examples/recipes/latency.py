"""How long a trial's network takes when it is deployed: it does not depend on what was learnt."""

from __future__ import annotations

import warnings

import torch

import nmconv
from nmconv.timing import interleaved, ratios, runner, threads

from .batches import inputs
from .trial import Trial


def latencies(trials: list[Trial], original: Trial, rounds: int = 11) -> list[float]:
    """How many times longer a forward of one picture takes than the original's: medians, side by side, one thread.

    Eager; norms are folded in all of them, and linear runs are merged where that saves multiply-adds. The classes are
    ten. Time on a quiet machine.
    """
    picture = torch.zeros(1, original.size, original.size, 3, dtype=torch.uint8)
    models = []
    for trial in (original, *trials):
        model = trial.network(10)
        plan = trial.plan(model)
        model = (nmconv.apply_plan(model, plan) if plan.changes else model).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nmconv.NoEffectWarning)
            models.append(nmconv.merge(model, example_inputs=inputs(model, picture)))
    with threads(1):
        sides = [runner(model, (inputs(model, picture),), "eager") for model in models]
        first, *times = interleaved(sides, rounds=rounds, seconds=0.05)
    return [ratios(time, first).median for time in times]
