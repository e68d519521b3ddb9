"""Looking at values inside a running model: module hooks and a function mode, the model's own code untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.errors import FitError
from nmconv.finding import NORM, SUM, ValueLocation
from nmconv.fitting.data import taking
from nmconv.fitting.forward_tracker import ForwardTracker

__all__ = ["Capture"]

_SUMS = ("add", "add_")
Replace = Callable[[Tensor, Mapping[Any, Tensor]], Tensor]  # from a value, and all that has been seen, to another


class _Enough(BaseException):
    """All that was asked for has been seen: the rest of the forward need not run."""


class Capture(ForwardTracker):
    """Runs a model and returns what comes by at some spots, and what some modules are given.

    Hooks are on the model only between ``__enter__`` and ``__exit__``, and do something only while :meth:`run` runs.

    Args:
        model: In the mode it is to run in.
        spots: Results of calls.
        inputs: Qualified names of modules, each called once, whose input is asked for.
        whole: Whether to run to the end, and give the output as well.
        replace: What to make of the values at some of the spots, for the model to go on with.
        operands: Sums with the position of an operand that is asked for too, as it is before the sum is made; it is
            found under ``(spot, position)``.
    """

    def __init__(
        self,
        model: nn.Module,
        spots: Iterable[ValueLocation] = (),
        inputs: Iterable[str] = (),
        *,
        whole: bool = False,
        replace: Mapping[ValueLocation, Replace] | None = None,
        operands: Mapping[ValueLocation, int] | None = None,
    ) -> None:
        super().__init__(model)
        self._spots = tuple(dict.fromkeys(spots))
        self._inputs = tuple(dict.fromkeys(inputs))
        self._whole = whole
        self._replace = dict(replace or {})
        self._operands = dict(operands or {})
        self._seen: dict[Any, Tensor] = {}
        self._sums = {spot.owner for spot in self._spots if spot.label == SUM}
        self._calls = {(spot.owner, spot.label[:-2]) for spot in self._spots if spot.label.endswith("()")}
        self.output: Any = None

    def run(self, images: Tensor) -> dict[Any, Tensor]:
        """One forward without gradients, of a copy of the images: some models overwrite their input.

        Values are copies, too: later in-place operations do not change them.

        Raises:
            FitError: If a spot did not come by, or a sum's forward made another number of sums than it was recorded to.
        """
        self._seen = {}
        try:
            with torch.no_grad(), taking(self._model, images), self.running():
                self.output = self._model(images.clone())
        except _Enough:
            pass
        missing = [key for key in (*self._spots, *self._inputs) if key not in self._seen]
        if missing:
            raise FitError(
                f"{missing[0]} does not come by when this {type(self._model).__name__} runs: its forward takes another "
                "way with these inputs than it was recorded to take"
            )
        if self._whole:
            for spot in self._spots:
                made = self._counts.get((spot.owner, SUM), 0)
                if spot.label == SUM and spot.total and made != spot.total:
                    raise FitError(f"{spot.owner or 'the model'} makes {made} sums, and {spot.total} in its recording")
        return self._seen

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        super()._hook()
        for name in self._inputs:
            module = self._model.get_submodule(name)
            self._add(module.register_forward_pre_hook(self._given(name), with_kwargs=True))
        for spot in self._spots:
            if spot.label == NORM:
                holder: Any = self._model.get_submodule(spot.owner)
                drop = getattr(holder, "drop", None)
                after = drop if isinstance(drop, nn.Module) else holder.act
                self._add(after.register_forward_pre_hook(self._given(spot), with_kwargs=True))
            elif spot.label != SUM and not spot.label.endswith("()"):
                inner = spot.label[1:] if spot.label.startswith("/") else f"{spot.owner}.{spot.label}".lstrip(".")
                self._add(self._model.get_submodule(inner).register_forward_hook(self._result(spot)))

    def _given(self, key: ValueLocation | str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not self._runs:
                return None
            name = next(iter(kwargs), "")
            value = args[0] if args else kwargs[name]
            self._note(key, value)
            if key in self._replace:
                new = self._replace[key](value, self._seen)
                return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})
            return None

        return hook

    def _result(self, spot: ValueLocation) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            if not self._runs:
                return None
            caller = self._stack[-1] if self._stack else ""
            if caller == spot.owner and self._count(spot.owner, spot.label) == spot.number:
                self._note(spot, result)
                if spot in self._replace:
                    return self._replace[spot](result, self._seen)
            return None

        return hook

    # -- functions ----------------------------------------------------------------------------------------------------

    def calling(self, name: str, args: Any, kwargs: Any) -> None:
        """A function of this name is called, in the forward that is running."""
        owner = self._stack[-1] if self._stack and name in _SUMS else None
        number = self._counts.get((owner or "", SUM), 0) + 1
        for spot, position in self._operands.items():
            if (spot.owner, spot.number) == (owner, number) and len(args) == 2:
                self._seen[spot, position] = torch.as_tensor(args[position]).detach().clone()

    def called(self, name: str, result: Any) -> Any:
        """A function of this name gave this result, in the forward that is running; gives what to go on with."""
        if not self._stack:
            return result
        owner = self._stack[-1]
        if name in _SUMS and owner in self._sums:
            return self._function(owner, SUM, result)
        if (owner, name) in self._calls:
            return self._function(owner, f"{name}()", result)
        return result

    def _function(self, owner: str, label: str, result: Any) -> Any:
        number = self._count(owner, label)
        for spot in self._spots:
            if (spot.owner, spot.label, spot.number) == (owner, label, number):
                self._note(spot, result)
                return self._replace[spot](result, self._seen) if spot in self._replace else result
        return result

    def _note(self, key: ValueLocation | str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise FitError(f"{key} is a {type(value).__name__}, no tensor")
        self._seen[key] = value.detach().clone()
        if not self._whole and all(key in self._seen for key in (*self._spots, *self._inputs)):
            raise _Enough
