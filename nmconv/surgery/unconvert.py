"""From a converted model back to the one that it was made from, in structure; weights and settings stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from nmconv.algebra import BEFORE, PADS
from nmconv.errors import AlreadyConvertedError, FitError, MergeError, PlanError, RestoredParametersWarning
from nmconv.flow import LEAF, is_leaf
from nmconv.planning import Changes
from nmconv.recording import Recording, Recordings, record_again
from nmconv.surgery.checks import FITTED, FROZEN, MARK, MERGED, plan_of
from nmconv.surgery.gradual import check_finished
from nmconv.surgery.hoist import UNPADDED
from nmconv.surgery.placeholders import ADDED, WAS, is_passing
from nmconv.surgery.rewritten_classes import is_rewritten
from nmconv.surgery.working_copy import outline_of

__all__ = ["Readers", "original_of", "thaw", "unconvert"]


def original_of(model: nn.Module) -> nn.Module:
    """The model as it was before it was converted, for looking: itself, or an outline that shares its tensors.

    Raises:
        MergeError, FitError: If it was merged, or fitted in merged form: what went into a convolution is gone.
        AlreadyConvertedError: If only a part of it was converted or merged.
    """
    check_finished(model, PlanError)
    for name, module in model.named_modules():
        plan = plan_of(module)
        if MERGED in module.__dict__:
            if name:
                raise AlreadyConvertedError(
                    f"{name!r} in the model was merged by itself: restore the whole before merging"
                )
            fitted = FITTED in module.__dict__
            text = "fitted in merged form" if fitted else "merged"
            error = FitError if fitted else MergeError
            raise error(
                f"this {type(model).__name__} was {text}, and what went into its convolutions is gone: begin with the "
                "model as it was before that"
            )
        if name and plan is not None and plan.changes_any:
            raise AlreadyConvertedError(
                f"{name!r} in the model was converted by itself: call nmconv.restore on it, in place, first"
            )
    plan = plan_of(model)
    if plan is None or not plan.changes_any:
        return model
    outline = outline_of(model)
    unconvert(outline)
    return outline


def unconvert(model: nn.Module) -> None:
    """Take back what a plan has changed in a working copy, which is left as it is if nothing has."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            if ADDED in vars(child):
                del module._modules[name]
            elif WAS in vars(child):
                before: nn.Module = vars(child)[WAS]
                before.training = child.training
                module._modules[name] = before
    for module in model.modules():
        if UNPADDED in vars(module):
            vars(module).update(vars(module)[UNPADDED])
        for key in (UNPADDED, BEFORE, PADS, LEAF, "_nmconv_own"):
            vars(module).pop(key, None)
        if is_rewritten(module):
            cls: Any = type(module)
            module.__class__ = cls._nmconv_base
    for key in (MARK, FITTED):
        vars(model).pop(key, None)


# -- parameters that nobody reads -------------------------------------------------------------------------------------


class Readers:
    """Which parameters a model reads: those that it does not read after a change are not to require gradients.

    Else data-parallel training waits for gradients that never come.

    Args:
        original: As it is before the change.
        changes: That will be made.
        recordings: Of the original.
    """

    def __init__(self, original: nn.Module, changes: Changes, recordings: Recordings) -> None:
        concerned = changes.sums or any(_has_parameters(original, change.call) for change in changes.made)
        self._runs = [run for mode in (False, True) for run in recordings.of_mode(training=mode)] if concerned else []
        self._read = _read(original, self._runs)

    def freeze_unread(self, result: nn.Module) -> None:
        """Do it to what became of the model."""
        after = _read(result, [record_again(result, run, is_leaf) for run in self._runs])
        parameters = dict(result.named_parameters(remove_duplicate=False))
        frozen = tuple(sorted(name for name in self._read - after if parameters[name].requires_grad))
        for name in frozen:
            parameters[name].requires_grad_(False)
        if frozen:
            vars(result)[FROZEN] = frozen


def thaw(model: nn.Module, names: Iterable[str]) -> None:
    """Let parameters require gradients again that were frozen because nobody read them.

    Warns:
        RestoredParametersWarning: If there are any: an optimizer may not have them.
    """
    vars(model).pop(FROZEN, None)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    back = [name for name in names if name in parameters and not parameters[name].requires_grad]
    for name in back:
        parameters[name].requires_grad_(True)
    if back:
        warnings.warn(
            f"{len(back)} parameters of this {type(model).__name__} are read again and require gradients "
            f"({', '.join(back[:3])}{', …' if len(back) > 3 else ''}): add them to an optimizer that was made without",
            RestoredParametersWarning,
            stacklevel=4,
        )


def _has_parameters(model: nn.Module, call: Any) -> bool:
    module = model.get_submodule(call.name)
    return call.kind == "PReLU" or (not call.function and next(module.parameters(), None) is not None)


def _read(model: nn.Module, runs: Iterable[Recording]) -> set[str]:
    """Names of all parameters that are read in these recordings of a model, each under all its names."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    paths = dict(model.named_modules(remove_duplicate=False))
    found: set[int] = set()
    for run in runs:
        for node, fact in run.facts.items():
            module = paths.get(fact.label) if node.op == "call_module" else None
            if module is not None:
                parts = [part for part in module.modules() if not is_passing(part)]
                found |= {id(value) for part in parts for value in part.parameters(recurse=False)}
            if node.op == "get_attr":
                found |= {id(value) for value in _attribute(model, str(node.target))}
    return {name for key in found for name in names.get(key, ())}


def _attribute(model: nn.Module, path: str) -> list[Any]:
    owner, _, name = path.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(owner)
    value = None if module is None else module._parameters.get(name)
    return [] if value is None else [value]
