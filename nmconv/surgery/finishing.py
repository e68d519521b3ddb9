"""Finishing a gradual model: turning it into the hard conversion."""

from __future__ import annotations

from torch import nn

from nmconv.flow import GRADUAL, record_model
from nmconv.surgery.checks import check_plain, plan_of
from nmconv.surgery.placeholders import REPLACED, has_state, identity_class, identity_for
from nmconv.surgery.plans import resolve_plan
from nmconv.surgery.restoring import original_of
from nmconv.surgery.rewritten_classes import rewritten_class
from nmconv.surgery.slopes import HARD_METHODS, remove_slopes, slopes_of
from nmconv.surgery.unused_parameters import UsedParameters, has_parameters

__all__ = ["finish"]


def finish(model: nn.Module) -> None:
    """Turn a gradual model into the hard conversion, in place, at any slopes.

    Args:
        model: A gradual model, or a module that contains one.

    Raises:
        ModelTypeError: If it is not a plain module.
    """
    check_plain(model, "finish", compiled=True)
    for module in dict.fromkeys(slope.module for slope in slopes_of(model)):
        _finish_module(model, module)
    for converted in list(model.modules()):
        plan = plan_of(converted)
        if plan is not None and any(has_parameters(converted, site) for site in plan.changes):
            original = original_of(converted)
            recordings = record_model(original, both_sizes=False, linear=plan.linear, call=plan.call)
            UsedParameters(original, resolve_plan(original, plan, recordings).changes, recordings).freeze_unused(
                converted
            )


def _finish_module(model: nn.Module, module: nn.Module) -> None:
    remove_slopes(module)
    base = type(module)._nmconv_base  # type: ignore[attr-defined]
    if GRADUAL not in module.__dict__:
        module.__class__ = rewritten_class(base, module.__dict__.pop(HARD_METHODS))
        return
    action, copies = module.__dict__.pop(GRADUAL)
    if action == "move":
        module.__class__ = base
    elif has_state(module):
        module.__class__ = identity_class(base, copies=copies)
    else:
        act = module.__dict__[REPLACED]
        act.training = module.training
        _replace(model, module, identity_for(act, copies=copies))


def _replace(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put another module into all slots of a module."""
    for parent in model.modules():
        for slot, child in parent._modules.items():
            if child is module:
                parent._modules[slot] = other
