"""The copy of a model that is changed and checked, and what of it goes into the model itself at the end."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.copying import copy_of, real_copy, structure_copy
from nmconv.errors import RemovedParametersWarning
from nmconv.surgery.hoist import SETTINGS

__all__ = ["WorkingCopy", "outline_of"]

_OURS = "_nmconv_"
_SPACES = ("_modules", "_parameters", "_buffers")
# What surgery sets besides: where a padding moves, where a live merge is, and where a slope is.
_SETTINGS = (*SETTINGS, "geometry", "_non_persistent_buffers_set")


def outline_of(model: nn.Module) -> nn.Module:
    """A copy of the modules alone: parameters and buffers are the model's own, for looking and not for running."""
    return structure_copy(model).model


class WorkingCopy:
    """A copy on which all changes are made and checked before the model gets any of them.

    Args:
        model: Not touched before :meth:`finish`.
        inplace: Whether the model itself is to be changed in the end; else the copy is what is returned.
        numbers: Whether parameters and buffers will get other numbers, too. Else a copy for a change in place shares
            them with the model.
        spare: As of :func:`copy_of`.

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
        numbers: bool = False,
        spare: Iterable[Tensor | nn.Module] = (),
    ) -> None:
        self._original = model
        self._inplace = inplace
        self._numbers = numbers
        with torch.inference_mode(False), torch.no_grad():  # or its parameters could never be trained
            if not inplace:
                self.model = copy_of(model, spare)
                return
            made = real_copy(model) if numbers else structure_copy(model)
        self.model = made.model
        self._pairs = [
            _Pair(own, twin, dict(vars(own)), dict(vars(twin)))
            for own, twin in zip(model.modules(), made.model.modules(), strict=True)
        ]
        self._tensors = [
            (value, made.originals[id(value)]) for value in (*made.model.parameters(), *made.model.buffers())
        ]

    def finish(self) -> nn.Module:
        """The result: the copy, or the model with what was changed on the copy.

        Modules and tensors of the model stay the same objects. It gets classes, children, new tensors and numbers, and
        nmconv's own attributes; nothing that is bound to the copy.

        Warns:
            RemovedParametersWarning: If parameters of the model are gone.
        """
        if not self._inplace:
            return self.model
        before = dict(self._original.named_parameters())
        self._adopt()
        left = {id(value) for value in self._original.parameters()}
        gone = [name for name, value in before.items() if id(value) not in left and not value.is_meta]
        if gone:
            warnings.warn(
                f"{len(gone)} parameters of this {type(self._original).__name__} are gone ({', '.join(gone[:3])}"
                f"{', …' if len(gone) > 3 else ''}): an optimizer that was made before still holds them",
                RemovedParametersWarning,
                stacklevel=3,
            )
        return self._original

    def _adopt(self) -> None:
        """Prepare all that the model is to get; then, in one step of which no part can fail, give it."""
        own: dict[int, Any] = {}  # from the id of what is the copy's to what the model has in its place
        for pair in self._pairs:
            own |= {id(value): pair.before[key] for key, value in pair.copied.items() if key in pair.before}
        own |= {id(pair.twin): pair.own for pair in self._pairs} | {id(twin): tensor for twin, tensor in self._tensors}
        for module in self.model.modules():
            if id(module) not in own:
                _hold_only(own, module)
                own |= {id(value): value for value in (module, *module.parameters(), *module.buffers())}
        steps = [(pair, _attributes(pair, own)) for pair in self._pairs]
        with torch.no_grad():
            for pair, attributes in steps:
                for space in _SPACES:
                    mine, its = (vars(module)[space] for module in (pair.own, pair.twin))
                    _take(mine, {name: own.get(id(value), value) for name, value in its.items()})
                vars(pair.own).update(attributes)
                for key in [key for key in pair.copied if key.startswith(_OURS) and key not in vars(pair.twin)]:
                    vars(pair.own).pop(key, None)
                if type(pair.twin) is not type(pair.own):
                    object.__setattr__(pair.own, "__class__", type(pair.twin))
            for twin, tensor in self._tensors if self._numbers else ():
                if not tensor.is_meta and not torch.equal(twin, tensor):
                    tensor.copy_(twin)


@dataclass(frozen=True, eq=False)
class _Pair:
    """A module of the model and its twin in the copy, and the attributes that both had at first."""

    own: nn.Module
    twin: nn.Module
    before: dict[str, Any]
    copied: dict[str, Any]


def _hold_only(own: Mapping[int, Any], module: nn.Module) -> None:
    """Let a new module hold what the model has where it holds what the copy has."""
    for key, value in vars(module).items():
        vars(module)[key] = own.get(id(value), value)
    for space in _SPACES:
        parts = vars(module)[space]
        _take(parts, {name: own.get(id(value), value) for name, value in parts.items()})


def _attributes(pair: _Pair, own: Mapping[int, Any]) -> dict[str, Any]:
    """What the twin has got of nmconv's attributes, and of its settings, over what is the model's own."""
    got = {
        key: value
        for key, value in vars(pair.twin).items()
        if pair.copied.get(key) is not value
        and (key.startswith(_OURS) or key in _SETTINGS or type(value).__module__.startswith("nmconv."))
    }
    return copy.deepcopy(got, dict(own))


def _take(mine: dict[str, Any], its: dict[str, Any]) -> None:
    """Make a dict equal to another one, in order; a module that takes another's place takes its mode."""
    for name, part in its.items():
        if isinstance(part, nn.Module) and isinstance(mine.get(name, part), nn.Module):
            vars(part)["training"] = mine.get(name, part).training
    if list(mine) != list(its):
        mine.clear()
    mine.update(its)
