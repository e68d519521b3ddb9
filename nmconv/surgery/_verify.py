"""The last word before a converted model is handed over: it makes the calls the plan says, and no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from nmconv.errors import RewriteError
from nmconv.graph import Called, act_calls
from nmconv.planning import Plan

__all__ = ["Calls", "calls_of", "check_calls"]

# In eval and, where the plan has sites that differ, in train mode: how often each activation is called by whom.
Calls = dict[bool, "Counter[Called]"]


def calls_of(model: nn.Module, plan: Plan, example_inputs: Any = None) -> Calls:
    """The activation calls of a model, traced anew."""
    modes = [False, True] if any(site.modes != "both" for site in plan.sites) else [False]
    return {training: act_calls(model, training=training, example_inputs=example_inputs) for training in modes}


def check_calls(before: Calls, after: Calls, plan: Plan, moved: Counter[Called]) -> None:
    """Hold the converted model's calls against the original's and the plan.

    Args:
        before: The original's calls.
        after: The converted model's.
        plan: What was to be done.
        moved: The calls of moved activations in their new places.

    Raises:
        RewriteError: If a call is still made that the plan drops, or the other way round.
    """
    # Where a Sequential holds one activation in several slots, the first slot it is still in names all its calls.
    several = {site.owner for site in plan.sites if site.how == "swap" and site.call > 1}

    def named(called: Called) -> Called:
        return (called[0], "*", called[2]) if called[0] in several else called

    for training, made in after.items():
        now_made, calls = _renamed(made, named), _renamed(before[training], named)
        runs = ("both", "train") if training else ("both", "eval")
        changed = [site for site in plan.sites if site.action in ("drop", "move", "gone")]
        gone = Counter(named((site.owner, site.name, site.function)) for site in changed if site.modes in runs)
        every = Counter(
            named((site.owner, site.name, site.function)) for site in plan.sites if site.modes in runs and site.call
        )
        expected: Counter[Called] = Counter()
        for called, times in calls.items():
            repeats = times // every[called] if every[called] else 1  # how often its owner runs
            expected[called] = times - repeats * gone[called]
        now = Counter({called: times for called, times in now_made.items() if called not in moved})
        expected = +expected
        if now != expected:
            wrong = sorted({str(called) for called in now.keys() | expected.keys() if now[called] != expected[called]})
            raise RewriteError(
                f"after the surgery these calls are not as the plan says: {', '.join(wrong[:5])}; the model is as it "
                "was: its forward reaches activations by a way that tracing does not see, exclude them"
            )


def _renamed(calls: Counter[Called], named: Callable[[Called], Called]) -> Counter[Called]:
    found: Counter[Called] = Counter()
    for called, times in calls.items():
        found[named(called)] += times
    return found
