"""Match a plan to a model: what happens to each of its activation calls, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nmconv.errors import PlanError
from nmconv.planning.plan import Plan
from nmconv.planning.plan_parts import ReplacedSum
from nmconv.planning.site import Site
from nmconv.planning.structure import Activation, Item, Place, Structure

__all__ = ["Change", "Changes", "changes_of"]


@dataclass(frozen=True)
class Change:
    """What happens to one activation call.

    Attributes:
        call: The call, as found in the model.
        action: The action; see :class:`nmconv.Site`.
        place: For ``move``, where the activation moves to; else None.
    """

    call: Activation
    action: str
    place: Place | None = None


@dataclass(frozen=True)
class Changes:
    """All that a plan does to a model.

    Attributes:
        calls: What happens to each activation call, in order of execution.
        sums: Additions that are replaced by one of their operands.
        copied: The sums that must be replaced by a copy of the operand.
        hoists: The convolutions of each linear run whose padding moves to the first one.
    """

    calls: tuple[Change, ...] = ()
    sums: tuple[ReplacedSum, ...] = ()
    copied: frozenset[ReplacedSum] = frozenset()
    hoists: tuple[tuple[str, ...], ...] = ()

    @property
    def made(self) -> tuple[Change, ...]:
        """The calls that are dropped or moved."""
        return tuple(change for change in self.calls if change.action in ("drop", "move"))


def changes_of(plan: Plan, structure: Structure, copied: frozenset[ReplacedSum] = frozenset()) -> Changes:
    """Return what a plan does to a model.

    Args:
        plan: A plan of this model or of one with the same structure.
        structure: The model's structure.
        copied: Sums that must be replaced by a copy of the operand.

    Raises:
        PlanError: If the plan drops, moves or removes a call that the model does not make or that is not a site, or
            moves one that cannot be moved.
    """
    return Changes(
        calls=tuple(_changes(plan, structure)),
        sums=tuple(branch.sum for branch in plan.branches),
        copied=copied,
        hoists=tuple(hoist.convs for hoist in plan.hoists if not hoist.why),
    )


def _changes(plan: Plan, structure: Structure) -> Iterator[Change]:
    sites = {site.id: site for site in plan.sites}
    items = [item for chain in structure.chains for item in chain.items]
    item_of = {conv: item for item in items for conv in item.convs}
    changeable = {item.act for item in items} | {index for index, _ in structure.leading}
    for index, call in enumerate(structure.activations):
        site = sites.pop(call.id, None)
        action = "skip" if site is None else site.action
        if action in ("drop", "move") and index not in changeable:
            raise PlanError(f"{call.id} is not a site of this {structure.model} ({call.skip or 'no convolution'})")
        place = None
        if site is not None and action == "move":
            place = _target(site, call, item_of.get(site.behind))
        yield Change(call, action, place)
    for site in sites.values():
        if site.action in ("drop", "move", "gone"):
            raise PlanError(
                f"the plan changes {site.id}, a call that this {structure.model} does not make: was the model changed, "
                f"or is the plan of another {plan.model}?"
            )


def _target(site: Site, call: Activation, item: Item | None) -> Place:
    """Return where an activation moves to: the end after an item."""
    if item is not None and item.end is not None and call.movable:
        return item.end
    why = "no convolution" if item is None else item.end_reason
    raise PlanError(f"{call.id} cannot be moved after {site.behind!r}: {why if call.movable else 'it has parameters'}")
