"""A plan carried over to a model: what it does there, found anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from nmconv.errors import PlanError
from nmconv.finding import copied_sums, fingerprint, flows_of, read
from nmconv.flow import registered_names, takes_by_forward
from nmconv.planning import Changes, Plan, changes_of
from nmconv.recording import Recordings

__all__ = ["ResolvedPlan", "resolve_plan"]


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan carried over to a model.

    Attributes:
        changes: What it does to the model.
        takes: Of each module whose forward makes a sum that goes, the structure of that forward's arguments.
    """

    changes: Changes
    takes: Mapping[str, str] = field(default_factory=dict)


def resolve_plan(model: nn.Module, plan: Plan, recordings: Recordings) -> ResolvedPlan:
    """What a plan does to a model, found anew in its recordings.

    Raises:
        PlanError: If the plan is for another model, or changes what this one does not have.
    """
    missing = [pair for pair in plan.registered if pair not in registered_names(model)]
    for name, kind in missing[:1]:
        raise PlanError(
            f"the plan was made with {name} registered as {kind!r}, which it is not here, or the model has none: call "
            f"nmconv.register({name.rpartition('.')[2]}, {kind!r}) first"
        )
    structure = read(model, recordings, linear=plan.linear)
    found = fingerprint(model, structure)
    if found != plan.fingerprint:
        raise PlanError(
            f"this plan is for a {plan.model} with fingerprint {plan.fingerprint}, the model is a "
            f"{type(model).__name__} with {found}: other layers, or a forward that does something else with them; make "
            "a plan for this model with nmconv.make_plan"
        )
    for kernel in plan.kernels:
        for name in kernel.convs:
            try:
                model.get_submodule(name.partition(":")[0])
            except AttributeError as error:
                raise PlanError(f"the model has no module {name!r} of which the plan makes a kernel") from error
    if not plan.branches:
        return ResolvedPlan(changes_of(plan, structure))
    sums = [branch.sum for branch in plan.branches]
    flows = [flow for training in (False, True) for flow in flows_of(model, recordings, training=training)]
    copied = copied_sums(flows, sums)
    return ResolvedPlan(changes_of(plan, structure, copied), takes_by_forward(flows, [each.owner for each in sums]))
