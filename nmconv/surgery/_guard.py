"""Checks on what the user gives, before anything is touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nmconv.errors import AlreadyConvertedError, ModelTypeError
from nmconv.planning import Plan

__all__ = ["MARK", "check_model", "plan_of"]

MARK = "_nmconv_plan"
_WRAPPERS = {
    "DistributedDataParallel": "convert model.module before wrapping",
    "DataParallel": "convert model.module before wrapping",
    "FullyShardedDataParallel": "convert the model before sharding it",
    "FSDPModule": "convert the model before fully_shard",
    "OptimizedModule": "convert model._orig_mod before torch.compile",
}


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a model was converted by, or None."""
    plan = model.__dict__.get(MARK)
    return plan if isinstance(plan, Plan) else None


def check_model(model: Any) -> nn.Module:
    """Return the model if it can be converted.

    Raises:
        ModelTypeError: If it is no module, or wrapped, compiled or scripted.
        AlreadyConvertedError: If it or a part of it was converted before.
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"{type(model).__name__} is no nn.Module: give the model itself")
    for name, module in model.named_modules():
        where = f"{name!r} in the model" if name else "the model"
        for base in type(module).__mro__:
            hint = _WRAPPERS.get(base.__name__) if base.__module__.startswith("torch.") else None
            if hint:
                raise ModelTypeError(f"{where} is a {base.__name__}: {hint}")
        if module.__dict__.get("_compiled_call_impl") is not None:
            raise ModelTypeError(f"{where} is compiled: convert it before module.compile()")
        plan = plan_of(module)
        if plan is not None and plan.changes:
            raise AlreadyConvertedError(
                f"{where} was converted already (nmconv.get_plan gives its plan, at {plan.ratio}): a second conversion "
                "would count from what the first has left; make one plan for the original model instead"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelTypeError("the model is scripted: convert it before torch.jit.script or torch.jit.trace")
    return model
