"""Which modules a forward looks at, and does not just call: at their settings, parameters or class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from nmconv.flow import is_leaf
from nmconv.recording import Fact, ModelRaised, NeedsData, Recording, record_again

__all__ = ["looked_at"]


def looked_at(model: nn.Module, runs: Iterable[Recording], names: Iterable[str]) -> frozenset[str]:
    """Those of the named modules of which some run shows more than their calls.

    The run is recorded again with the modules in disguise: where all goes as before, nobody has looked.

    Args:
        model: Read only.
        runs: Of the model, or of its parts.
        names: Of leaves.
    """
    found: set[str] = set()
    for run in runs:
        todo = [sorted({*names} - found)]
        while todo:
            some = todo.pop()
            if not some or _goes_as_before(model, run, some):
                continue
            if len(some) == 1:
                found.update(some)
            else:
                todo += [some[: len(some) // 2], some[len(some) // 2 :]]
    return frozenset(found)


def _goes_as_before(model: nn.Module, run: Recording, names: Iterable[str]) -> bool:
    try:
        again = record_again(model, replace(run, call=replace(run.call, disguised=frozenset(names))), is_leaf)
    except (ModelRaised, NeedsData):
        return False
    return list(map(_told, run.facts.values())) == list(map(_told, again.facts.values()))


def _told(fact: Fact) -> tuple[object, ...]:
    return fact.label, fact.form, fact.shapes, fact.context, fact.frame.path
