"""The copy of a model on which all changes are made and checked before the model itself changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.copying import copy_model, copy_sharing_tensors, copy_with_tensors
from nmconv.errors import RemovedParametersWarning, warn_user
from nmconv.surgery.hoist import SETTINGS

__all__ = ["WorkingCopy", "structure_only_copy"]

_NMCONV_PREFIX = "_nmconv_"
_REGISTRIES = ("_modules", "_parameters", "_buffers")
# Attributes other than nmconv's own that surgery sets: by hoisted padding, live merges and slopes.
_CHANGED_SETTINGS = (*SETTINGS, "geometry", "_non_persistent_buffers_set")


def structure_only_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the modules that shares the model's tensors: to be analyzed, not run."""
    return copy_sharing_tensors(model).model


class WorkingCopy:
    """A copy of a model to change and check.

    Args:
        model: Not touched before :meth:`finish`.
        inplace: Whether :meth:`finish` changes the model itself, instead of returning the copy.
        changes_values: Whether the values of parameters and buffers will change, too. If not, a copy for a change in
            place shares its tensors with the model.
        shared: As for :func:`copy_model`.

    Attributes:
        model: The copy.

    Raises:
        ModelTypeError: If the model cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inplace: bool,
        changes_values: bool = False,
        shared: Iterable[Tensor | nn.Module] = (),
    ) -> None:
        self._original = model
        self._inplace = inplace
        self._changes_values = changes_values
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode could never be trained
            if not inplace:
                self.model = copy_model(model, shared)
                return
            result = copy_with_tensors(model) if changes_values else copy_sharing_tensors(model)
        self.model = result.model
        self._pairs = [
            _Pair(original, twin, dict(vars(original)), dict(vars(twin)))
            for original, twin in zip(model.modules(), self.model.modules(), strict=True)
        ]
        self._tensors = [
            (value, result.originals[id(value)]) for value in (*self.model.parameters(), *self.model.buffers())
        ]

    def finish(self) -> nn.Module:
        """Return the copy, or the model itself with all changes that were made to the copy.

        Modules and tensors of the model stay the same objects. It gets the copy's classes, children, new tensors and
        values, and nmconv's own attributes, but nothing that refers to the copy.

        Warns:
            RemovedParametersWarning: If parameters of the model are gone.
        """
        if not self._inplace:
            return self.model
        before = dict(self._original.named_parameters())
        self._transfer()
        remaining = {id(value) for value in self._original.parameters()}
        gone = [name for name, value in before.items() if id(value) not in remaining and not value.is_meta]
        if gone:
            warn_user(
                f"{len(gone)} parameters of this {type(self._original).__name__} are gone ({', '.join(gone[:3])}"
                f"{', …' if len(gone) > 3 else ''}): an optimizer that was made before still holds them",
                RemovedParametersWarning,
            )
        return self._original

    def _transfer(self) -> None:
        """Prepare all changes to the model, then make them in one step that cannot fail."""
        counterparts: dict[int, Any] = {}  # maps the ids of the copy's objects to the model's
        for pair in self._pairs:
            counterparts |= {
                id(value): pair.original_attributes[key]
                for key, value in pair.twin_attributes.items()
                if key in pair.original_attributes
            }
        counterparts |= {id(pair.twin): pair.original for pair in self._pairs}
        counterparts |= {id(twin): original for twin, original in self._tensors}
        for module in self.model.modules():
            if id(module) not in counterparts:
                _replace_references(counterparts, module)
                counterparts |= {id(value): value for value in (module, *module.parameters(), *module.buffers())}
        attributes = [_changed_attributes(pair, counterparts) for pair in self._pairs]
        with torch.no_grad():
            for pair, changed in zip(self._pairs, attributes, strict=True):
                for registry in _REGISTRIES:
                    original, twin = (vars(module)[registry] for module in (pair.original, pair.twin))
                    _make_equal(original, {name: counterparts.get(id(value), value) for name, value in twin.items()})
                vars(pair.original).update(changed)
                for key in pair.twin_attributes:
                    if key.startswith(_NMCONV_PREFIX) and key not in vars(pair.twin):
                        vars(pair.original).pop(key, None)
                if type(pair.twin) is not type(pair.original):
                    object.__setattr__(pair.original, "__class__", type(pair.twin))
            for twin_tensor, tensor in self._tensors if self._changes_values else ():
                if not tensor.is_meta and not torch.equal(twin_tensor, tensor):
                    tensor.copy_(twin_tensor)


@dataclass(frozen=True, eq=False)
class _Pair:
    """A module of the model, its twin in the copy, and the attributes of both before the changes."""

    original: nn.Module
    twin: nn.Module
    original_attributes: dict[str, Any]
    twin_attributes: dict[str, Any]


def _replace_references(counterparts: Mapping[int, Any], module: nn.Module) -> None:
    """Let a new module refer to the model's objects instead of the copy's."""
    for key, value in vars(module).items():
        vars(module)[key] = counterparts.get(id(value), value)
    for registry in _REGISTRIES:
        entries = vars(module)[registry]
        _make_equal(entries, {name: counterparts.get(id(value), value) for name, value in entries.items()})


def _changed_attributes(pair: _Pair, counterparts: Mapping[int, Any]) -> dict[str, Any]:
    """Return the attributes that surgery has set on the twin, with references to the model's objects."""
    changed = {
        key: value
        for key, value in vars(pair.twin).items()
        if pair.twin_attributes.get(key) is not value
        and (key.startswith(_NMCONV_PREFIX) or key in _CHANGED_SETTINGS or type(value).__module__.startswith("nmconv."))
    }
    return copy.deepcopy(changed, dict(counterparts))


def _make_equal(target: dict[str, Any], source: dict[str, Any]) -> None:
    """Make a dict equal to another one, in order; a module that replaces another one takes over its mode."""
    for name, value in source.items():
        if isinstance(value, nn.Module) and isinstance(target.get(name, value), nn.Module):
            vars(value)["training"] = target.get(name, value).training
    if list(target) != list(source):
        target.clear()
    target.update(source)
