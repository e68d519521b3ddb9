"""Judges what nmconv made of a network: it does the same as the original less the calls dropped, or says it cannot."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import inspect
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nmconv

from .dropping import Dropping
from .networks import Call, Network, calls, cast, quiet, seed


def attempt(net: Network, function: Callable[..., Any], model: nn.Module, *args: Any, **options: Any) -> Any:
    """What a public function of nmconv makes of a model, or the error of its own that it raises.

    Whatever came of it, a model that was handed in must be as it was, unless it was to be changed in place.
    """
    if net.given and "example_inputs" in inspect.signature(function).parameters:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        options["example_inputs"] = calls(net, dtype)[0].args
    before = snapshot(model)
    try:
        with quiet():
            made = function(model, *args, **options)
    except nmconv.NmconvError as error:
        assert str(error), "an error that says nothing"
        assert_untouched(before, model)
        return error
    except Exception as error:
        pytest.fail(f"{function.__name__} raises {type(error).__name__}: {str(error)[:300]}")
    assert_untouched(before, model, "global" if options.get("inplace") else "")
    return made


def refused(net: Network, outcome: Any, must: bool) -> bool:
    """Whether the outcome is an error, and may be one."""
    if not isinstance(outcome, nmconv.NmconvError):
        return False
    assert not must, f"refused: {type(outcome).__name__}: {str(outcome)[:300]}"
    return True


# What a call gives ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What one call gave: all that is in the output, gradients, and the buffers afterwards; or an error."""

    leaves: dict[str, Any] = dataclasses.field(default_factory=dict)
    gradients: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    error: Exception | None = None


def result_of(model: nn.Module, call: Call) -> Result:
    """Runs the call under a seed; where gradients flow, it also runs the backward pass."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    args, kwargs = cast(call.args, dtype), cast(call.kwargs, dtype)
    found = Result()
    context = {
        "": contextlib.nullcontext,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[call.context]
    before = {name: getattr(model, name) for name in call.settings}
    for name, value in call.settings.items():
        setattr(model, name, value)
    seed(3)
    model.zero_grad()
    inputs = [value for value in leaves_of((args, kwargs)).values() if isinstance(value, Tensor)]
    inputs = [value for value in inputs if value.is_floating_point()]
    try:
        with quiet(), context():
            if call.gradients:
                args, kwargs = _entered(args), _entered(kwargs)
            output = leaves_of(getattr(model, call.method or "__call__")(*args, **kwargs))
            found.leaves = {
                path: value.clone() if isinstance(value, Tensor) else value for path, value in output.items()
            }
        if call.gradients:
            floats = [value for value in output.values() if isinstance(value, Tensor) and value.requires_grad]
            if floats:
                with quiet():
                    sum((value * value).sum() + value.sum() for value in floats).backward()
            found.gradients = {f"input {at}": value.grad for at, value in enumerate(inputs)}
            for name, value in model.named_parameters():
                found.gradients[name] = None if value.grad is None else value.grad.clone()
    except Exception as error:
        found.error = error
    for name, value in before.items():
        setattr(model, name, value)
    found.buffers = {name: value.clone() for name, value in model.named_buffers()}
    return found


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _entered(value: Any) -> Any:
    """The inputs as leaves that want gradients, seen through something that lets in-place functions work on them."""
    for leaf in leaves_of(value).values():
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.requires_grad_()
    return _through(value)


def _through(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value * 1 if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _through(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_through(each) for each in value)
    return value


def leaves_of(value: Any, path: str = "") -> dict[str, Any]:
    """Everything in an output or in arguments, by its place; the types of what holds it count, too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f".{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        parts = {f"[{key!r}]": each for key, each in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {f"[{at}]": each for at, each in enumerate(value)}
    else:
        return {path: value}
    found = {f"type of {path or 'all'}": type(value).__name__}
    for key, each in parts.items():
        found |= leaves_of(each, path + key)
    return found


def assert_same(made: Result, wanted: Result, label: str, tolerance: float = 0.0) -> None:
    """To the bit with a tolerance of zero; else within this part of the largest number, and without parameters."""
    for what in ("leaves", "gradients", "buffers") if not tolerance else ("leaves",):
        ours, theirs = getattr(made, what), getattr(wanted, what)
        assert list(ours) == list(theirs), f"{label}: {what} {list(ours)} instead of {list(theirs)}"
        for path, value in theirs.items():
            assert_equal(ours[path], value, f"{label}: {what} {path}", tolerance)
    if tolerance:
        for path, value in wanted.gradients.items():
            if path.startswith("input "):
                assert_equal(made.gradients[path], value, f"{label}: gradient of {path}", 10 * tolerance)


def assert_equal(ours: Any, theirs: Any, where: str, tolerance: float) -> None:
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
        assert type(ours) is type(theirs), f"{where}: {ours!r} instead of {theirs!r}"
        assert ours == theirs or ours != ours, f"{where}: {ours!r} instead of {theirs!r}"
        return
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, f"{where}: {ours.shape} instead of {theirs.shape}"
    if not theirs.numel() or (not tolerance and torch.equal(ours, theirs)):
        return
    apart = (ours.detach().double() - theirs.detach().double()).nan_to_num(nan=0.0)
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{where}: not a number"
    largest = theirs.detach().double().nan_to_num().abs().max().item() or 1.0
    assert apart.abs().max().item() <= tolerance * largest, f"{where}: {apart.abs().max().item() / largest:.1e} apart"


# The verdicts ---------------------------------------------------------------------------------------------------------


def assert_converted(net: Network, original: nn.Module, made: nn.Module, plan: Any) -> None:
    """Called in every way, in eval mode, in train mode and in eval mode again, both do the same to the bit."""
    dropping = Dropping(original, [site for site in plan.sites if site.action == "drop"])
    every = [call for call in calls(net) if not call.method]
    for training in (False, True, False) if net.trains else (False,):
        original.train(training)
        made.train(training)
        for call in every if not training else [every[0], *(call for call in every if call.other)]:
            label = f"{call.label}, in {'train' if training else 'eval'} mode"
            with dropping:
                wanted = result_of(original, call)
            found = result_of(made, call)
            _compare(net, found, wanted, call, label, 0.0)
            if found.error is not None:  # which may have come before or after a norm took its statistics
                made.load_state_dict(original.state_dict())
    assert not dropping.missed(), f"no call is {dropping.missed()}"
    assert list(made.state_dict()) == list(original.state_dict()), "other keys"
    made.load_state_dict(original.state_dict())


def assert_merged(net: Network, original: nn.Module, made: nn.Module, brief: bool = False) -> None:
    """Called in every way in eval mode, or, in brief, as it was read, both do the same in float64."""
    for call in calls(net, net.finest)[: 1 if brief else None]:
        tolerance = 1e-9 if net.double else 1e-4
        _compare(net, result_of(made, call), result_of(original, call), call, call.label, tolerance)


def _compare(net: Network, found: Result, wanted: Result, call: Call, label: str, tolerance: float) -> None:
    if wanted.error is not None:
        assert call.label != "as read", f"{label}: what it is held against raises {wanted.error!r}"
        return
    if isinstance(found.error, nmconv.NmconvError):
        assert call.label != "as read" and (net.picky or call.other), f"{label}: refused: {found.error}"
        return
    assert found.error is None, f"{label}: {type(found.error).__name__}: {str(found.error)[:300]}"
    assert_same(found, wanted, label, tolerance)


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("convolution", "_convolution")
        return func(*args, **(kwargs or {}))


def convolutions(model: nn.Module, call: Call) -> int:
    """How many run in one call."""
    seed(3)
    with quiet(), torch.no_grad(), Convolutions() as found:
        model(*call.args, **call.kwargs)
    return found.count


# What must not change -------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model and of the process that nmconv must leave as it is."""
    found: dict[str, Any] = {
        "global torch": bytes(torch.get_rng_state().numpy()),
        "global random": random.getstate(),
        "global numpy": _generator_of_numpy(),
        "global grad": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")),
        "global python": (id(nn.Module.__call__), id(nn.Module.__getattr__), id(builtins.isinstance)),
    }
    for name, module in model.named_modules(remove_duplicate=False):
        names = [each for each in vars(type(module)) if not each.startswith("__")]
        found[f"model {name}: class"] = id(module), id(type(module)), names
        for key, value in vars(module).items():
            found[f"model {name}.{key}"] = _frozen(value, 4)
    return found


def _generator_of_numpy() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return name, keys.tobytes(), *rest


def assert_untouched(before: Mapping[str, Any], model: nn.Module, only: str = "") -> None:
    """The model and the process are as they were; or one of them alone, the ``"model"`` or the ``"global"``."""
    after = snapshot(model)
    changed = [key for key in {**before, **after} if after.get(key, model) != before.get(key, model)]
    changed = [key for key in changed if key.startswith(only)]
    assert not changed, f"touched: {', '.join(sorted(changed)[:5])}"


def _frozen(value: Any, depth: int) -> Any:
    """What an attribute holds, as something that a later look can be compared with."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if depth == 0 or isinstance(value, (nn.parameter.UninitializedTensorMixin, nn.Module, type)):
        return id(value)
    if isinstance(value, Tensor):
        content = b"" if value.is_meta else value.detach().cpu().double().numpy().tobytes()
        version = 0 if value.is_inference() else value._version
        return (
            id(value),
            version,
            value.requires_grad,
            value.dtype,
            value.shape,
            id(value.grad) if value.is_leaf else 0,
            content,
        )
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().numpy())
    if isinstance(value, Mapping):
        return tuple((_frozen(key, depth - 1), _frozen(each, depth - 1)) for key, each in value.items())
    if isinstance(value, (list, tuple, set)):
        return (type(value), *(_frozen(each, depth - 1) for each in value))
    return id(value), *((key, _frozen(each, depth - 1)) for key, each in getattr(value, "__dict__", {}).items())
