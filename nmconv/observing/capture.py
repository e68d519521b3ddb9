"""Capture values inside a running model by module hooks and a function mode, without changing its code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.errors import FitError
from nmconv.finding import NORM, SUM, ValueLocation
from nmconv.observing.data import input_errors_as_fit_errors
from nmconv.observing.forward_tracker import ForwardTracker

__all__ = ["Capture"]

_SUM_FUNCTIONS = ("add", "add_")
_DATA_DEPENDENT = "a model whose control flow depends on the data cannot be fitted"
Replace = Callable[[Tensor, Mapping[Any, Tensor]], Tensor]  # from a value and all captured values to a replacement


class _StopForward(BaseException):
    """All values have been captured: the rest of the forward need not run."""


class Capture(ForwardTracker):
    """Run a model and return the values at some locations, and the inputs of some modules.

    Hooks are on the model only between ``__enter__`` and ``__exit__``, and are active only during :meth:`run`.

    Args:
        model: The model, in the mode to run it in.
        locations: Results of calls to capture.
        inputs: Qualified names of modules, each called once, whose input to capture.
        full_forward: Whether to run to the end and store the output in :attr:`output`.
        replace: For some of the locations and inputs, a function that computes what the model continues with.
        operands: Sums with the position of an operand to capture before the sum is computed, under
            ``(location, position)``.

    Attributes:
        output: The model's output, after a full forward.
    """

    def __init__(
        self,
        model: nn.Module,
        locations: Iterable[ValueLocation] = (),
        inputs: Iterable[str] = (),
        *,
        full_forward: bool = False,
        replace: Mapping[ValueLocation, Replace] | None = None,
        operands: Mapping[ValueLocation, int] | None = None,
    ) -> None:
        super().__init__(model)
        self._locations = tuple(dict.fromkeys(locations))
        self._inputs = tuple(dict.fromkeys(inputs))
        self._full_forward = full_forward
        self._replace = dict(replace or {})
        self._operands = dict(operands or {})
        self._values: dict[Any, Tensor] = {}
        self._sum_owners = {location.owner for location in self._locations if location.label == SUM}
        self._functions = {
            (location.owner, location.label[:-2]) for location in self._locations if location.label.endswith("()")
        }
        self.output: Any = None

    def run(self, images: Tensor) -> dict[Any, Tensor]:
        """Run one forward without gradients, on a copy of the images, since some models overwrite their input.

        Returns:
            Copies of the values, by location or name: later in-place operations do not change them.

        Raises:
            FitError: If a location is not reached, or a forward computes another number of sums than was recorded.
        """
        self._values = {}
        try:
            with torch.no_grad(), input_errors_as_fit_errors(self._model, images), self.running():
                self.output = self._model(images.clone())
        except _StopForward:
            pass
        missing = [key for key in (*self._locations, *self._inputs) if key not in self._values]
        if missing:
            raise FitError(
                f"{missing[0]} is not reached when this {type(self._model).__name__} runs on these images, although it "
                f"was in the recording: {_DATA_DEPENDENT}"
            )
        if self._full_forward:
            self._check_sums()
        return self._values

    def _check_sums(self) -> None:
        for location in self._locations:
            count = self._counts.get((location.owner, SUM), 0)
            if location.label == SUM and location.total and count != location.total:
                raise FitError(
                    f"{location.owner or 'the model'} computes {count} sums on these images, and {location.total} in "
                    f"the recording: {_DATA_DEPENDENT}"
                )

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        super()._hook()
        for name in self._inputs:
            self._add_input_hook(self._model.get_submodule(name), name)
        for location in self._locations:
            owner, label = location.owner, location.label
            if label == NORM:
                norm_act: Any = self._model.get_submodule(owner)
                drop = getattr(norm_act, "drop", None)
                self._add_input_hook(drop if isinstance(drop, nn.Module) else norm_act.act, location)
            elif label != SUM and not label.endswith("()"):
                name = label[1:] if label.startswith("/") else f"{owner}.{label}".lstrip(".")
                self._add(self._model.get_submodule(name).register_forward_hook(self._output_hook(location)))

    def _add_input_hook(self, module: nn.Module, key: ValueLocation | str) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not self._is_running:
                return None
            name = next(iter(kwargs), "")
            value = args[0] if args else kwargs[name]
            self._store(key, value)
            if key in self._replace:
                new = self._replace[key](value, self._values)
                return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})
            return None

        self._add(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _output_hook(self, location: ValueLocation) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            if not self._is_running:
                return None
            caller = self._stack[-1] if self._stack else ""
            if caller == location.owner and self._count(location.owner, location.label) == location.number:
                self._store(location, result)
                if location in self._replace:
                    return self._replace[location](result, self._values)
            return None

        return hook

    # -- functions ----------------------------------------------------------------------------------------------------

    def calling(self, name: str, args: Any, kwargs: Any) -> None:
        """Capture an operand of a sum before the sum is computed, possibly in place."""
        owner = self._stack[-1] if self._stack and name in _SUM_FUNCTIONS else None
        number = self._counts.get((owner or "", SUM), 0) + 1
        for location, position in self._operands.items():
            if (location.owner, location.number) == (owner, number) and len(args) == 2:
                self._values[location, position] = torch.as_tensor(args[position]).detach().clone()

    def called(self, name: str, result: Any) -> Any:
        """Capture the result of a sum or another function; return the result or its replacement."""
        if not self._stack:
            return result
        owner = self._stack[-1]
        if name in _SUM_FUNCTIONS and owner in self._sum_owners:
            return self._function_result(owner, SUM, result)
        if (owner, name) in self._functions:
            return self._function_result(owner, f"{name}()", result)
        return result

    def _function_result(self, owner: str, label: str, result: Any) -> Any:
        number = self._count(owner, label)
        for location in self._locations:
            if (location.owner, location.label, location.number) == (owner, label, number):
                self._store(location, result)
                return self._replace[location](result, self._values) if location in self._replace else result
        return result

    def _store(self, key: ValueLocation | str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise FitError(f"{key} is a {type(value).__name__}, not a tensor: it cannot be fitted")
        self._values[key] = value.detach().clone()
        if not self._full_forward and all(key in self._values for key in (*self._locations, *self._inputs)):
            raise _StopForward
