"""Checks of the user's models and inputs before anything is changed, and the plan that a model was converted by."""

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
    "MERGED",
    "PLAN",
    "check_examples",
    "check_initialized",
    "check_is_module",
    "check_model",
    "check_plain",
    "get_plan",
    "plan_of",
]

# Attributes on a model that record what was done to it.
PLAN = "_nmconv_plan"
MERGED = "_nmconv_merges"  # the merges, one tuple per call of merge
FITTED = "_nmconv_fit"  # the report of a fit
FROZEN = "_nmconv_frozen"  # names of parameters that require no gradients because the converted model does not use them

# Wrapper classes of torch, and the model to pass instead.
_WRAPPERS = {
    "DistributedDataParallel": "model.module before wrapping",
    "DataParallel": "model.module before wrapping",
    "FullyShardedDataParallel": "the model before sharding it",
    "FSDPModule": "the model before fully_shard",
    "OptimizedModule": "model._orig_mod before torch.compile",
}


def get_plan(model: nn.Module) -> Plan | None:
    """Return the plan by which a model was converted, or None if it was not.

    Args:
        model: Any module.

    Raises:
        ModelTypeError: If ``model`` is not a module.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> nmconv.get_plan(model) is None
        True
        >>> [(site.id, site.action) for site in nmconv.get_plan(nmconv.convert(model, "2:1")).sites]
        [('1#1', 'keep'), ('3#1', 'drop')]
    """
    check_is_module(model)
    return plan_of(model)


def plan_of(module: nn.Module) -> Plan | None:
    """Return the plan by which a module was converted, or None."""
    plan = module.__dict__.get(PLAN)
    return plan if isinstance(plan, Plan) else None


def check_is_module(model: Any) -> nn.Module:
    """Return the model, or raise ModelTypeError if it is not a module."""
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"{type(model).__name__} is not an nn.Module: pass the model itself")
    return model


def check_plain(model: Any, action: str, *, compiled: bool = False) -> nn.Module:
    """Return the model if it is a plain module.

    Args:
        model: What the user passed.
        action: What the caller does with it, for the message: ``convert``.
        compiled: Whether a model that was compiled in place is allowed.

    Raises:
        ModelTypeError: If it is not a module, or is wrapped, compiled or scripted.
    """
    root = check_is_module(model)
    for name, module in root.named_modules():
        where = f"{name!r} in the model" if name else "the model"
        for base in type(module).__mro__:
            hint = _WRAPPERS.get(base.__name__) if base.__module__.startswith("torch.") else None
            if hint:
                raise ModelTypeError(f"{where} is a {base.__name__}: {action} {hint}")
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelTypeError(f"{where} is scripted: {action} it before torch.jit.script or torch.jit.trace")
        if module.__dict__.get("_compiled_call_impl") is not None and not compiled:
            raise ModelTypeError(f"{where} is compiled: {action} it before module.compile()")
    return root


def check_initialized(model: nn.Module) -> None:
    """Raise ModelTypeError if the model has lazy modules without weights."""
    for name, module in model.named_modules():
        if any(is_lazy(value) for value in (*module._parameters.values(), *module._buffers.values())):
            raise ModelTypeError(
                f"{name or 'the model'} is a {type(module).__name__} without weights yet: run the model once first"
            )


def check_examples(example_inputs: Any) -> None:
    """Raise OptionError if ``example_inputs`` holds nothing but text and numbers, such as a shape."""
    leaves = tree_leaves(example_inputs)
    if leaves and all(isinstance(value, (str, bytes, bool, int, float, complex)) for value in leaves):
        raise OptionError(
            f"example_inputs={str(example_inputs)[:80]!r}: give what the model is called with: a tensor such as "
            "torch.zeros(1, 3, 224, 224), a tuple of arguments or a dict of keyword arguments"
        )


def check_model(model: Any, action: str = "convert") -> nn.Module:
    """Return the model if it is neither converted nor merged.

    Args:
        model: What the user passed.
        action: What the caller does with it, for the message.

    Raises:
        ModelTypeError: If it is not a module, is wrapped, compiled or scripted, or has lazy modules without weights.
        AlreadyConvertedError: If it or a part of it is already converted or merged.
    """
    root = check_plain(model, action)
    instead = (
        "a second conversion would count from what the first has left; go on with nmconv.apply_plan(model, "
        "nmconv.make_plan(model, ...)), which count from the original, or call nmconv.restore first"
        if action == "convert"
        else f"{action} the original: build it anew, or get it from nmconv.restore"
    )
    check_initialized(root)
    for name, module in root.named_modules():
        where = f"{name!r} in the model" if name else "the model"
        plan = plan_of(module)
        if plan is not None and plan.changes_any:
            raise AlreadyConvertedError(
                f"{where} was converted already (nmconv.get_plan gives its plan, at {plan.ratio}): {instead}"
            )
        if MERGED in module.__dict__:
            raise AlreadyConvertedError(
                f"{where} was merged already (nmconv.get_merges tells how): {action} the original"
                f"{', then merge' * (action == 'convert')}"
            )
    return root
