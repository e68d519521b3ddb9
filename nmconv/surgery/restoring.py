"""Undoing a conversion: the original's structure comes back, while weights and settings stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from nmconv.algebra import PADDED_GEOMETRY, PADDING_BEFORE_HOIST
from nmconv.errors import AlreadyConvertedError, FitError, MergeError, PlanError
from nmconv.flow import LEAF
from nmconv.surgery.checks import FITTED, FROZEN, MERGED, PLAN, check_examples, check_plain, plan_of
from nmconv.surgery.hoist import OWN_FORWARD, UNPADDED
from nmconv.surgery.placeholders import ADDED, REPLACED
from nmconv.surgery.plans import resolve_plan
from nmconv.surgery.rewritten_classes import is_rewritten
from nmconv.surgery.slopes import check_finished
from nmconv.surgery.unused_parameters import unfreeze
from nmconv.surgery.witness import Witness
from nmconv.surgery.working_copy import WorkingCopy, structure_only_copy

__all__ = ["original_of", "restore", "unconvert"]


def restore(model: nn.Module, *, example_inputs: Any = None, inplace: bool = False) -> nn.Module:
    """Give a converted model the structure that it had before: activations, padding and branches come back.

    Weights, buffers, new heads and settings stay as they are, and parameters stay the same objects.

    Args:
        model: A model that :func:`convert` or :func:`apply_plan` returned, trained since or not, but not merged.
        example_inputs: As for :func:`convert`. None: the inputs that its plan was made with.
        inplace: Change ``model`` itself instead of a copy.

    Returns:
        The restored model, of the same class, with the same ``state_dict`` keys.

    Raises:
        PlanError: If it was not converted.
        MergeError, FitError: If it was merged, or fitted in merged form.
        WitnessError: If the converted model differs from the restored one in anything but what its plan says.

    Warns:
        RestoredParametersWarning: If the restored model uses parameters that the converted one did not.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> nmconv.restore(nmconv.convert(model, "2:1"))[1]
        ReLU()
    """
    check_plain(model, "restore")
    check_examples(example_inputs)
    plan = plan_of(model)
    if plan is None:
        raise PlanError(f"this {type(model).__name__} was not converted: there is nothing to restore")
    original = original_of(model)
    witness = Witness(original, example_inputs, linear=plan.linear, call=plan.call, options=())
    way_out = "undo what was changed by hand since it was converted"
    witness.check(model, resolve_plan(original, plan, witness.recordings, way_out).changes)
    work, frozen = WorkingCopy(model, inplace=inplace), vars(model).get(FROZEN, ())
    unconvert(work.model)
    result = work.finish()
    unfreeze(result, frozen)
    return result


def original_of(model: nn.Module) -> nn.Module:
    """Return the model as it was before its conversion, for analysis only.

    Returns:
        The model itself if its plan changes nothing, else an outline that shares its tensors.

    Raises:
        PlanError: If it is gradual and not finished.
        MergeError, FitError: If it was merged, or fitted in merged form: the original convolutions are gone.
        AlreadyConvertedError: If only a part of it was converted or merged.
    """
    check_finished(model, PlanError)
    for name, module in model.named_modules():
        plan = plan_of(module)
        if MERGED in module.__dict__:
            if name:
                raise AlreadyConvertedError(
                    f"{name!r} in the model was merged by itself: begin with the model as it was before that"
                )
            is_fitted = FITTED in module.__dict__
            error = FitError if is_fitted else MergeError
            raise error(
                f"this {type(model).__name__} was {'fitted in merged form' if is_fitted else 'merged'}, and what went "
                "into its convolutions is gone: begin with the model as it was before that"
            )
        if name and plan is not None and plan.changes_any:
            raise AlreadyConvertedError(
                f"{name!r} in the model was converted by itself: call nmconv.restore on it, in place, first"
            )
    plan = plan_of(model)
    if plan is None or not plan.changes_any:
        return model
    outline = structure_only_copy(model)
    unconvert(outline)
    return outline


def unconvert(model: nn.Module) -> None:
    """Undo what a plan has changed in a working copy, if anything."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            if ADDED in vars(child):
                del module._modules[name]
            elif REPLACED in vars(child):
                original: nn.Module = vars(child)[REPLACED]
                original.training = child.training
                module._modules[name] = original
    for module in model.modules():
        if UNPADDED in vars(module):
            vars(module).update(vars(module)[UNPADDED])
        for key in (UNPADDED, PADDING_BEFORE_HOIST, PADDED_GEOMETRY, LEAF, OWN_FORWARD):
            vars(module).pop(key, None)
        if is_rewritten(module):
            cls: Any = type(module)
            module.__class__ = cls._nmconv_base
    for key in (PLAN, FITTED):
        vars(model).pop(key, None)
