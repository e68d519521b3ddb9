"""Making the changes that a plan asks for: everything is prepared first, then put in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nmconv.errors import PlanError, RewriteError
from nmconv.flow import PLAIN_ACTS, is_activation, is_sequential
from nmconv.planning import Activation, Change, Changes, Place
from nmconv.surgery.gradual import Mixing, appearing, begin, begin_methods, device_near, dropping, own_copy, slope_name
from nmconv.surgery.hoist import hoist_padding
from nmconv.surgery.method_edits import Edit, rewrite
from nmconv.surgery.placeholders import ADDED, WAS, hooked_apart, identity_for, keeps_something, passing
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten

__all__ = ["Known", "Surgery"]

# An activation, its class, how it is made gradual, its sites and their slopes, and where these are.
_Begun = tuple[nn.Module, type[nn.Module], tuple[str, bool], Mixing, torch.device]
# Methods written before, and why others could not be: by owner and method, with the edit they are for.
Known = dict[tuple[str, str], tuple[Edit, RewrittenMethod | RewriteError]]


class Surgery:
    """The changes that are made to one model: gathered, prepared, then made.

    Args:
        model: A working copy; read only until :meth:`commit`.
        changes: Of this model.
        known: Methods that were written for the same edits before; new ones are added.
        takes: Of each module whose forward makes a sum that goes, the structure of that forward's arguments.
        gradual: Whether activations do not go, or move, but are mixed with their inputs.

    Raises:
        PlanError: If the changes name what the model does not have.
        RewriteError: If an activation has a class that cannot be made gradual.
    """

    def __init__(
        self, model: nn.Module, changes: Changes, known: Known, takes: Mapping[str, str], *, gradual: bool = False
    ) -> None:
        self._hard = Surgery(model, changes, known, takes) if gradual else None
        self._mixing: dict[str, Mixing] = {}  # of the sites in methods, by owner
        self._begun: list[_Begun] = []
        self._begun_in: dict[tuple[nn.Module, str], int] = {}  # from slots to positions among them
        self._model = model
        self._changes = changes
        self._known = {} if gradual else known
        self._edits: dict[tuple[str, str], Edit] = {}
        self._slots: list[tuple[nn.Module, str, nn.Module]] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._added: list[tuple[nn.Module, str, nn.Module, str | None]] = []
        for change in changes.made:
            self._take_out(change)
        for addition in changes.sums:
            self._module(addition.owner)
            edit = self._edit(addition.owner, "forward", takes.get(addition.owner, ""))
            edit.sums.append(addition)
            edit.copied |= {addition} & changes.copied
        for (owner, method), edit in self._edits.items():
            for (other, name), its in self._edits.items():
                if other == owner and name != method:
                    edit.others += its.remove
            edit.mixing = self._mixing.get(owner, {})

    def failures(self) -> dict[tuple[str, str], RewriteError]:
        """Write all new methods; for each that cannot be written, by owner and method, why."""
        new = {where: edit for where, edit in self._edits.items() if self._known.get(where, (None,))[0] != edit}
        for where, made in rewrite(self._model, new, self._changes.calls).items():
            self._known[where] = (new[where], made)
        written = {where: self._known[where][1] for where in self._edits}
        return {where: made for where, made in written.items() if isinstance(made, RewriteError)}

    def commit(self) -> None:
        """Make the changes.

        Raises:
            RewriteError: If a method cannot be written; nothing is changed then.
        """
        methods = self._methods()
        hard = {} if self._hard is None else self._hard._methods()
        devices = {owner: device_near(self._model, owner) for owner in self._mixing}
        for parent, slot, module in self._slots:
            parent._modules[slot] = module
        for parent, name, module, behind in self._added:
            _insert(parent._modules, name, module, behind)
        for module, cls in self._classes:
            module.__class__ = cls
        for owner, found in methods.items():
            module = self._model.get_submodule(owner)
            if owner in self._mixing:
                begin_methods(module, found, hard[owner], self._mixing[owner], devices[owner])
            else:
                module.__class__ = rewritten(type(module), found)
        for begun in self._begun:
            begin(*begun)
        for convs in self._changes.hoists:
            hoist_padding(self._model, convs)

    def _methods(self) -> dict[str, tuple[RewrittenMethod, ...]]:
        """All new methods by owner.

        Raises:
            RewriteError: If one cannot be written.
        """
        for error in self.failures().values():
            raise error
        methods: dict[str, tuple[RewrittenMethod, ...]] = {}
        for owner, name in self._edits:
            made = self._known[owner, name][1]
            assert isinstance(made, RewrittenMethod)
            methods[owner] = (*methods.get(owner, ()), made)
        return methods

    def _take_out(self, change: Change) -> None:
        call = change.call
        act = None if call.function else self._activation(call)
        if act is not None and call.how == "swap":
            parent, _, slot = call.name.rpartition(".")
            holder = self._module(parent)
            if is_sequential(holder) and call.owner == parent:  # the call's number tells which slot
                slots = [name for name, child in holder._modules.items() if child is act]
                slot = slots[call.call - 1] if call.call <= len(slots) else slot
            if self._hard is not None:
                self._begin(act, holder, slot, call)
            elif keeps_something(act) and self._is_alone(act):
                self._classes.append((act, passing(type(act), copies=call.copy)))
            else:
                self._slots.append((holder, slot, identity_for(act, copies=call.copy)))
        else:
            self._module(call.owner)
            self._edit(call.owner, call.method, call.takes).remove.append(call)
            if self._hard is not None:
                mixing = self._mixing.setdefault(call.owner, {})
                mixing[call.id] = slope_name(len(mixing))
        if change.place is not None:
            self._put(call, change.place, act)

    def _begin(self, act: nn.Module, holder: nn.Module, slot: str, call: Activation) -> None:
        """Let an activation go by degrees: in its place where that is what the hard conversion changes, else a copy."""
        at = self._begun_in.setdefault((holder, slot), len(self._begun))
        if at < len(self._begun):  # the other mode's call of the same module
            made, cls, _, mixing, device = self._begun[at]
            mixing = {**mixing, call.id: slope_name(len(mixing))}
            self._begun[at] = (made, cls, ("drop", call.copy), mixing, device)
            return
        alone = keeps_something(act) and self._is_alone(act)
        made = act if alone else own_copy(act)
        device = device_near(self._model, call.name)
        self._begun.append((made, dropping(type(act)), ("drop", call.copy), {call.id: slope_name(0)}, device))
        if not alone:
            vars(made)[WAS] = act
            self._slots.append((holder, slot, made))

    def _put(self, call: Activation, place: Place, act: nn.Module | None) -> None:
        moved: Any = PLAIN_ACTS[call.kind]() if act is None else hooked_apart(act)
        if getattr(moved, "inplace", False):
            moved.inplace = False  # what it is applied to now may have other readers
        owner = self._module(place.owner)
        if self._hard is not None:
            moved = own_copy(moved)
            device = device_near(self._model, place.owner)
            self._begun.append((moved, appearing(type(moved)), ("move", False), {call.id: slope_name(0)}, device))
        if place.how == "slot":
            vars(moved)[WAS] = owner._modules[place.op]
            self._slots.append((owner, place.op, moved))
            return
        vars(moved)[ADDED] = True
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

    def _activation(self, call: Activation) -> nn.Module:
        module = self._module(call.name)
        if not is_activation(module):
            raise PlanError(f"{call.name!r} is a {type(module).__name__}, no activation, yet the plan changes it")
        return module


def _insert(children: dict[str, Any], name: str, module: nn.Module, behind: str | None) -> None:
    """Add a child behind another one, or last."""
    names = list(children)
    later = names[names.index(behind) + 1 :] if behind is not None else []
    children[name] = module
    for key in later:
        children[key] = children.pop(key)
