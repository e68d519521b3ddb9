"""Checks on what the user gives, before anything is touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from nmconv.errors import AlreadyConvertedError, ModelTypeError, OptionError
from nmconv.planning import Plan

__all__ = [
    "FITTED",
    "FROZEN",
    "MARK",
    "MERGED",
    "check_examples",
    "check_has_run",
    "check_model",
    "check_plain",
    "plan_of",
]

MARK = "_nmconv_plan"
MERGED = "_nmconv_merges"  # what was merged, a tuple for each call of merge
FITTED = "_nmconv_fit"  # what a fit did
FROZEN = "_nmconv_frozen"  # names of parameters that require no gradients since nobody reads them
_WRAPPERS = {
    "DistributedDataParallel": "model.module before wrapping",
    "DataParallel": "model.module before wrapping",
    "FullyShardedDataParallel": "the model before sharding it",
    "FSDPModule": "the model before fully_shard",
    "OptimizedModule": "model._orig_mod before torch.compile",
}


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a model was converted by, or None."""
    plan = model.__dict__.get(MARK)
    return plan if isinstance(plan, Plan) else None


def check_plain(model: Any, todo: str, *, compiled: bool = False) -> nn.Module:
    """Return the model if it is a plain one.

    Args:
        model: What the user gave.
        todo: What is to be done with it, for the message: ``convert``.
        compiled: Whether one that was compiled in place will do.

    Raises:
        ModelTypeError: If it is no module, or wrapped, compiled or scripted.
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"{type(model).__name__} is no nn.Module: give the model itself")
    for name, module in model.named_modules():
        where = f"{name!r} in the model" if name else "the model"
        for base in type(module).__mro__:
            hint = _WRAPPERS.get(base.__name__) if base.__module__.startswith("torch.") else None
            if hint:
                raise ModelTypeError(f"{where} is a {base.__name__}: {todo} {hint}")
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelTypeError(f"{where} is scripted: {todo} it before torch.jit.script or torch.jit.trace")
        if module.__dict__.get("_compiled_call_impl") is not None and not compiled:
            raise ModelTypeError(f"{where} is compiled: {todo} it before module.compile()")
    return model


def check_has_run(model: nn.Module) -> None:
    """Refuse lazy modules, which have no weights until they run, with ModelTypeError."""
    for name, module in model.named_modules():
        if any(is_lazy(value) for value in (*module._parameters.values(), *module._buffers.values())):
            raise ModelTypeError(
                f"{name or 'the model'} is a {type(module).__name__} without weights yet: run the model once first"
            )


def check_examples(example_inputs: Any) -> None:
    """Refuse what no model that convolves is called with: text, a shape.

    Raises:
        OptionError: If there is nothing in ``example_inputs`` but text and numbers.
    """
    leaves = tree_leaves(example_inputs)
    if leaves and all(isinstance(value, (str, bytes, bool, int, float, complex)) for value in leaves):
        raise OptionError(
            f"example_inputs={str(example_inputs)[:80]!r}: give what the model is called with: a tensor such as "
            "torch.zeros(1, 3, 224, 224), a tuple of arguments or a dict of keyword arguments"
        )


def check_model(model: Any) -> nn.Module:
    """Return the model if it can be converted.

    Raises:
        ModelTypeError: If it is no module, or wrapped, compiled or scripted, or has lazy modules that never ran.
        AlreadyConvertedError: If it or a part of it was converted before.
    """
    check_plain(model, "convert")
    check_has_run(model)
    for name, module in model.named_modules():
        plan = plan_of(module)
        if plan is not None and plan.changes_any:
            raise AlreadyConvertedError(
                f"{repr(name) + ' in the model' if name else 'the model'} was converted already (nmconv.get_plan gives "
                f"its plan, at {plan.ratio}): a second conversion would count from what the first has left; go on with "
                "nmconv.apply_plan(model, nmconv.make_plan(model, ...)), which count from the original, or call "
                "nmconv.restore first"
            )
        if MERGED in module.__dict__:
            raise AlreadyConvertedError(
                f"{repr(name) + ' in the model' if name else 'the model'} was merged already (nmconv.get_merges tells "
                "how): convert the original, then merge"
            )
    return model
