"""Making the changes of a plan: all of them are prepared first, then put in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nmconv.errors import PlanError, RewriteError
from nmconv.flow import PLAIN_ACTS, is_activation, is_sequential
from nmconv.planning import Activation, Change, Changes, Place
from nmconv.surgery.gradual import (
    GradualActivation,
    appearing_class,
    copy_with_own_children,
    dropping_class,
    make_methods_gradual,
)
from nmconv.surgery.hoist import hoist_padding
from nmconv.surgery.method_edits import Edit, MethodKey, rewrite_methods
from nmconv.surgery.placeholders import ADDED, REPLACED, has_state, identity_class, identity_for, shallow_copy
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten_class
from nmconv.surgery.slopes import SlopeNames, nearest_device, slope_name

__all__ = ["MethodCache", "Surgery"]

# Rewritten methods, or the errors of those that cannot be rewritten, each with the edit that it results from.
MethodCache = dict[MethodKey, tuple[Edit, RewrittenMethod | RewriteError]]


class Surgery:
    """The changes to one model: collected and prepared here, made by :meth:`commit`.

    Args:
        model: A working copy; read only until :meth:`commit`.
        changes: Changes to this model.
        cache: Methods that were rewritten before; new ones are added.
        argument_structure: That of each forward from which a sum is removed, by the module's qualified name.
        gradual: Whether dropped and moved activations are mixed with their inputs instead.

    Raises:
        PlanError: If the changes name something that the model does not have.
        RewriteError: If an activation's class cannot be made gradual.
    """

    def __init__(
        self,
        model: nn.Module,
        changes: Changes,
        cache: MethodCache,
        argument_structure: Mapping[str, str],
        *,
        gradual: bool = False,
    ) -> None:
        self._hard = Surgery(model, changes, cache, argument_structure) if gradual else None
        self._model = model
        self._changes = changes
        self._cache = {} if gradual else cache
        self._edits: dict[MethodKey, Edit] = {}
        self._slots: list[tuple[nn.Module, str, nn.Module]] = []  # parent, slot, new child
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []  # module, new class
        self._added: list[tuple[nn.Module, str, nn.Module, str | None]] = []  # parent, new slot, child, slot before it
        self._gradual_acts: list[GradualActivation] = []
        self._gradual_slots: dict[tuple[nn.Module, str], GradualActivation] = {}  # by parent and slot
        self._method_slopes: dict[str, SlopeNames] = {}  # of the sites in methods, by owner
        for change in changes.made:
            self._prepare_change(change)
        for addition in changes.sums:
            self._module(addition.owner)
            edit = self._edit(addition.owner, "forward", argument_structure.get(addition.owner, ""))
            edit.sums.append(addition)
            edit.copied |= {addition} & changes.copied
        for (owner, method), edit in self._edits.items():
            for (other_owner, other_method), other_edit in self._edits.items():
                if other_owner == owner and other_method != method:
                    edit.others += other_edit.remove
            edit.mixing = self._method_slopes.get(owner, {})

    def failures(self) -> dict[MethodKey, RewriteError]:
        """Rewrite all methods; return the errors of those that cannot be rewritten."""
        new = {key: edit for key, edit in self._edits.items() if self._cache.get(key, (None,))[0] != edit}
        for key, result in rewrite_methods(self._model, new, self._changes.calls).items():
            self._cache[key] = (new[key], result)
        results = {key: self._cache[key][1] for key in self._edits}
        return {key: result for key, result in results.items() if isinstance(result, RewriteError)}

    def commit(self) -> None:
        """Make the changes.

        Raises:
            RewriteError: If a method cannot be rewritten; nothing is changed then.
        """
        methods_by_owner = self._rewritten_methods()
        hard_methods = {} if self._hard is None else self._hard._rewritten_methods()
        devices = {owner: nearest_device(self._model, owner) for owner in self._method_slopes}
        for parent, slot, module in self._slots:
            parent._modules[slot] = module
        for parent, name, module, before in self._added:
            _insert_child(parent._modules, name, module, before)
        for module, cls in self._classes:
            module.__class__ = cls
        for owner, methods in methods_by_owner.items():
            module = self._model.get_submodule(owner)
            if owner in self._method_slopes:
                slopes = self._method_slopes[owner]
                make_methods_gradual(module, methods, hard_methods[owner], slopes, devices[owner])
            else:
                module.__class__ = rewritten_class(type(module), methods)
        for gradual_act in self._gradual_acts:
            gradual_act.commit()
        for convs in self._changes.hoists:
            hoist_padding(self._model, convs)

    def _rewritten_methods(self) -> dict[str, tuple[RewrittenMethod, ...]]:
        """Return all rewritten methods by owner.

        Raises:
            RewriteError: If one cannot be rewritten.
        """
        for error in self.failures().values():
            raise error
        methods: dict[str, tuple[RewrittenMethod, ...]] = {}
        for owner, name in self._edits:
            method = self._cache[owner, name][1]
            assert isinstance(method, RewrittenMethod)
            methods[owner] = (*methods.get(owner, ()), method)
        return methods

    def _prepare_change(self, change: Change) -> None:
        """Prepare to take an activation out of its old place, and to put it into its new one."""
        call = change.call
        act = None if call.function else self._activation(call)
        if act is not None and call.how == "swap":
            self._prepare_swap(act, call)
        else:
            self._module(call.owner)
            self._edit(call.owner, call.method, call.argument_structure).remove.append(call)
            if self._hard is not None:
                slopes = self._method_slopes.setdefault(call.owner, {})
                slopes[call.id] = slope_name(len(slopes))
        if change.place is not None:
            self._prepare_placement(call, change.place, act)

    def _prepare_swap(self, act: nn.Module, call: Activation) -> None:
        parent_name, _, slot = call.name.rpartition(".")
        parent = self._module(parent_name)
        if is_sequential(parent) and call.owner == parent_name:
            # One module may be in several slots: the n-th call is that of the n-th slot.
            slots = [name for name, child in parent._modules.items() if child is act]
            slot = slots[call.call - 1] if call.call <= len(slots) else slot
        if self._hard is not None:
            self._prepare_gradual_swap(act, parent, slot, call)
        elif self._must_change_in_place(act):
            self._classes.append((act, identity_class(type(act), copies=call.copy)))
        else:
            self._slots.append((parent, slot, identity_for(act, copies=call.copy)))

    def _prepare_gradual_swap(self, act: nn.Module, parent: nn.Module, slot: str, call: Activation) -> None:
        earlier = self._gradual_slots.get((parent, slot))
        if earlier is not None:  # the same module's call in the other mode
            earlier.slopes[call.id] = slope_name(len(earlier.slopes))
            earlier.copies = call.copy
            return
        in_place = self._must_change_in_place(act)
        module = act if in_place else copy_with_own_children(act)
        cls, slopes = dropping_class(type(act)), {call.id: slope_name(0)}
        device = nearest_device(self._model, call.name)
        gradual_act = GradualActivation(module, cls, "drop", call.copy, slopes, device)
        self._gradual_acts.append(gradual_act)
        self._gradual_slots[parent, slot] = gradual_act
        if not in_place:
            vars(module)[REPLACED] = act
            self._slots.append((parent, slot, module))

    def _prepare_placement(self, call: Activation, place: Place, act: nn.Module | None) -> None:
        """Prepare to put an activation, or a new one for a function, into another place."""
        moved: Any = PLAIN_ACTS[call.kind]() if act is None else shallow_copy(act)
        if getattr(moved, "inplace", False):
            moved.inplace = False  # its new input may have other readers
        owner = self._module(place.owner)
        if self._hard is not None:
            moved = copy_with_own_children(moved)
            cls, slopes = appearing_class(type(moved)), {call.id: slope_name(0)}
            device = nearest_device(self._model, place.owner)
            self._gradual_acts.append(GradualActivation(moved, cls, "move", False, slopes, device))
        if place.how == "slot":
            vars(moved)[REPLACED] = owner._modules[place.op]
            self._slots.append((owner, place.op, moved))
            return
        vars(moved)[ADDED] = True
        taken = {*owner._modules, *(name for parent, name, *_ in self._added if parent is owner)}
        name = next(name for number in range(len(taken) + 1) if (name := f"moved_act{number or ''}") not in taken)
        self._added.append((owner, name, moved, place.op if place.how == "insert" else None))
        if place.how == "rewrite":
            self._edit(place.owner, place.method, place.argument_structure).insert.append((place, name))

    def _must_change_in_place(self, act: nn.Module) -> bool:
        """Return whether an activation must stay the same object, since it has state and a single slot."""
        if not has_state(act):
            return False
        return sum(child is act for module in self._model.modules() for child in module._modules.values()) == 1

    def _edit(self, owner: str, method: str, argument_structure: str) -> Edit:
        return self._edits.setdefault((owner, method), Edit(argument_structure))

    def _module(self, name: str) -> nn.Module:
        try:
            return self._model.get_submodule(name)
        except AttributeError as error:
            raise PlanError(
                f"the plan names {name!r}, which the model does not have: make a plan for this model"
            ) from error

    def _activation(self, call: Activation) -> nn.Module:
        module = self._module(call.name)
        if not is_activation(module):
            raise PlanError(
                f"the plan changes {call.name!r}, which is a {type(module).__name__} and not an activation: make a "
                "plan for this model"
            )
        return module


def _insert_child(children: dict[str, Any], name: str, module: nn.Module, before: str | None) -> None:
    """Insert a child after the one named ``before``, or at the end."""
    names = list(children)
    later = names[names.index(before) + 1 :] if before is not None else []
    children[name] = module
    for key in later:
        children[key] = children.pop(key)
