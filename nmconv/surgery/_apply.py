"""Doing what a plan says: everything is prepared first, then put in place in one go."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from nmconv.errors import PlanError, RewriteError
from nmconv.graph import PLAIN_ACTS, is_activation, is_sequential
from nmconv.planning import Plan, Site
from nmconv.surgery._classes import Method, rewritten
from nmconv.surgery._guard import MARK
from nmconv.surgery._hoist import hoist_padding
from nmconv.surgery._identity import identity_for, keeps_something, passing
from nmconv.surgery._rewrite import Edit, rewrite

__all__ = ["Known", "Surgery"]

# Methods written before, and why others could not be: by owner and method, with the edit they are for.
Known = dict[tuple[str, str], tuple[Edit, Method | RewriteError]]


class Surgery:
    """The changes one plan makes to one model: gathered, prepared, then made.

    Args:
        model: A working copy; read only until :meth:`commit`.
        plan: Of this model.
        known: Methods that were written for the same edits before; new ones are added.

    Raises:
        PlanError: If the plan names what the model does not have.
    """

    def __init__(self, model: nn.Module, plan: Plan, known: Known) -> None:
        self._model = model
        self._plan = plan
        self._known = known
        self._edits: dict[tuple[str, str], Edit] = {}
        self._slots: list[tuple[nn.Module, str, nn.Module]] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._added: list[tuple[nn.Module, str, nn.Module, str | None]] = []
        for site in plan.changes:
            self._take_out(site)
        for convs in [*(kernel.convs for kernel in plan.kernels), *(hoist.convs for hoist in plan.hoists)]:
            for name in convs:
                self._module(name)
        for branch in plan.branches:
            self._module(branch.sum.owner)
            edit = self._edit(branch.sum.owner, "forward", branch.sum.takes)
            edit.sums.append(branch.sum)
        for (owner, method), edit in self._edits.items():
            for (other, name), its in self._edits.items():
                if other == owner and name != method:
                    edit.others += its.remove

    def failures(self) -> dict[tuple[str, str], RewriteError]:
        """Write all new methods; for each that cannot be written, by owner and method, why."""
        new = {where: edit for where, edit in self._edits.items() if self._known.get(where, (None,))[0] != edit}
        for where, made in rewrite(self._model, new, self._plan.sites).items():
            self._known[where] = (new[where], made)
        written = {where: self._known[where][1] for where in self._edits}
        return {where: made for where, made in written.items() if isinstance(made, RewriteError)}

    def commit(self) -> None:
        """Make the changes.

        Raises:
            RewriteError: If a method cannot be written; nothing is changed then.
        """
        for error in self.failures().values():
            raise error
        methods: dict[str, tuple[Method, ...]] = {}
        for owner, name in self._edits:
            made = self._known[owner, name][1]
            assert isinstance(made, Method)
            methods[owner] = (*methods.get(owner, ()), made)
        for parent, slot, module in self._slots:
            parent._modules[slot] = module
        for parent, name, module, behind in self._added:
            _insert(parent._modules, name, module, behind)
        for module, cls in self._classes:
            module.__class__ = cls
        for owner, found in methods.items():
            module = self._model.get_submodule(owner)
            module.__class__ = rewritten(type(module), found)
        for hoist in self._plan.hoists:
            hoist_padding(self._model, hoist)
        self._model.__dict__[MARK] = self._plan

    def _take_out(self, site: Site) -> None:
        act = None if site.function else self._activation(site)
        if act is not None and site.how == "swap":
            parent, _, slot = site.name.rpartition(".")
            holder = self._module(parent)
            if is_sequential(holder) and site.owner == parent:  # the call's number tells which slot
                slots = [name for name, child in holder._modules.items() if child is act]
                slot = slots[site.call - 1] if site.call <= len(slots) else slot
            if keeps_something(act) and self._is_alone(act):
                self._classes.append((act, passing(type(act), copies=site.copy)))
            else:
                self._slots.append((holder, slot, identity_for(act, copies=site.copy)))
        else:
            self._module(site.owner)
            self._edit(site.owner, site.method, site.takes).remove.append(site)
        if site.place is not None:
            self._put(site, act)

    def _put(self, site: Site, act: nn.Module | None) -> None:
        place = site.place
        assert place is not None
        moved: Any = PLAIN_ACTS[site.kind]() if act is None else copy.copy(act)
        if getattr(moved, "inplace", False):
            moved.inplace = False  # what it is applied to now may have other readers
        owner = self._module(place.owner)
        if place.how != "rewrite" and place.op not in owner._modules:
            raise PlanError(f"{place.owner or 'the model'} has no child {place.op!r} that the plan names")
        if place.how == "slot":
            self._slots.append((owner, place.op, moved))
            return
        taken = {*owner._modules, *(name for parent, name, *_ in self._added if parent is owner)}
        name = next(name for number in range(len(taken) + 1) if (name := f"moved_act{number or ''}") not in taken)
        self._added.append((owner, name, moved, place.op if place.how == "insert" else None))
        if place.how == "rewrite":
            self._edit(place.owner, place.method, place.takes).insert.append((place, name))

    def _is_alone(self, act: nn.Module) -> bool:
        """Whether the activation is in one slot only."""
        return sum(child is act for module in self._model.modules() for child in module._modules.values()) == 1

    def _edit(self, owner: str, method: str, takes: str) -> Edit:
        return self._edits.setdefault((owner, method), Edit(takes))

    def _module(self, name: str) -> nn.Module:
        try:
            return self._model.get_submodule(name)
        except AttributeError as error:
            raise PlanError(f"the model has no module {name!r} that the plan names") from error

    def _activation(self, site: Site) -> nn.Module:
        module = self._module(site.name)
        if not is_activation(module):
            raise PlanError(f"{site.name!r} is a {type(module).__name__}, no activation, yet the plan changes it")
        return module


def _insert(children: dict[str, Any], name: str, module: nn.Module, behind: str | None) -> None:
    """Add a child behind another one, or last."""
    names = list(children)
    later = names[names.index(behind) + 1 :] if behind is not None else []
    children[name] = module
    for key in later:
        children[key] = children.pop(key)
