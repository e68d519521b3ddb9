"""A plan carried over to a model: of each of its activation calls, what becomes of it and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nmconv.errors import PlanError
from nmconv.planning.plan import Plan, Site, Sum
from nmconv.planning.structure import Activation, Place, Structure

__all__ = ["Change", "Changes", "changes_of"]


@dataclass(frozen=True)
class Change:
    """What becomes of one call of an activation.

    Attributes:
        call: The call, as the analysis of the model found it.
        action: As of :class:`nmconv.Site`.
        place: Where a moved activation goes.
    """

    call: Activation
    action: str
    place: Place | None = None


@dataclass(frozen=True)
class Changes:
    """All that a plan does to a model.

    Attributes:
        calls: Of every activation call, in order of execution.
        sums: Additions that go, one operand taking the place of each.
        copied: Those of them in whose place a copy of the operand must be left.
        hoists: Convolutions of each linear run whose padding moves to its first one.
    """

    calls: tuple[Change, ...] = ()
    sums: tuple[Sum, ...] = ()
    copied: frozenset[Sum] = frozenset()
    hoists: tuple[tuple[str, ...], ...] = ()

    @property
    def made(self) -> tuple[Change, ...]:
        """Those that are dropped or moved."""
        return tuple(change for change in self.calls if change.action in ("drop", "move"))


def changes_of(plan: Plan, structure: Structure, copied: frozenset[Sum] = frozenset()) -> Changes:
    """What a plan does to a model.

    Args:
        plan: Of this model or of one of the same structure.
        structure: The model's.
        copied: As of :class:`Changes`.

    Raises:
        PlanError: If the plan drops or moves what is no site of the model.
    """
    sites = {site.id: site for site in plan.sites}
    return Changes(
        calls=tuple(_changes(plan, sites, structure)),
        sums=tuple(branch.sum for branch in plan.branches),
        copied=copied,
        hoists=tuple(hoist.convs for hoist in plan.hoists if not hoist.why),
    )


def _changes(plan: Plan, sites: dict[str, Site], structure: Structure) -> Iterator[Change]:
    items = [item for chain in structure.chains for item in chain.items]
    ends = {conv: item for item in items for conv in item.convs}
    owned = {item.act for item in items} | {index for index, _ in structure.leading}
    for index, call in enumerate(structure.activations):
        site = sites.pop(call.id, None)
        action = "skip" if site is None else site.action
        if action in ("drop", "move") and index not in owned:
            raise PlanError(f"{call.id} is no site of this {structure.model} ({call.skip or 'no convolution'})")
        place = None
        if site is not None and action == "move":
            end = ends.get(site.behind)
            place = None if end is None else end.end
            if place is None or not call.movable:
                why = "no convolution" if end is None else end.end_reason
                raise PlanError(
                    f"{call.id} cannot be moved behind {site.behind!r}: {why if call.movable else 'it has parameters'}"
                )
        yield Change(call, action, place)
    for site in sites.values():
        if site.action in ("drop", "move", "gone"):
            raise PlanError(
                f"the plan changes {site.id}, a call that this {structure.model} does not make: was the model changed, "
                f"or is the plan of another {plan.model}?"
            )
