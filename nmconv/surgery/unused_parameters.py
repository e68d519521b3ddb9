"""Parameters that a converted model does not use: they stop requiring gradients, and start again when it is restored.

Otherwise distributed data-parallel training would wait for gradients that never come.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nmconv.errors import RestoredParametersWarning, warn_user
from nmconv.flow import is_leaf
from nmconv.planning import Activation, Changes, Site
from nmconv.recording import Recording, Recordings, record_again
from nmconv.surgery.checks import FROZEN
from nmconv.surgery.placeholders import is_identity

__all__ = ["UsedParameters", "has_parameters", "unfreeze"]


class UsedParameters:
    """The parameters that a model uses before a change.

    Args:
        original: The model before the change.
        changes: The changes that will be made.
        recordings: Recordings of the original.
    """

    def __init__(self, original: nn.Module, changes: Changes, recordings: Recordings) -> None:
        is_affected = changes.sums or any(has_parameters(original, change.call) for change in changes.made)
        self._runs = [run for mode in (False, True) for run in recordings.of_mode(training=mode)] if is_affected else []
        self._used = _used_parameters(original, self._runs)

    def freeze_unused(self, result: nn.Module) -> None:
        """Let the parameters that the changed model no longer uses require no gradients."""
        used = _used_parameters(result, [record_again(result, run, is_leaf) for run in self._runs])
        parameters = dict(result.named_parameters(remove_duplicate=False))
        frozen = tuple(sorted(name for name in self._used - used if parameters[name].requires_grad))
        for name in frozen:
            parameters[name].requires_grad_(False)
        if frozen:
            vars(result)[FROZEN] = frozen


def unfreeze(model: nn.Module, names: Iterable[str]) -> None:
    """Let frozen parameters require gradients again.

    Warns:
        RestoredParametersWarning: If there are any: an optimizer may lack them.
    """
    vars(model).pop(FROZEN, None)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unfrozen = [name for name in names if name in parameters and not parameters[name].requires_grad]
    for name in unfrozen:
        parameters[name].requires_grad_(True)
    if unfrozen:
        warn_user(
            f"{len(unfrozen)} parameters of this {type(model).__name__} are read again and require gradients "
            f"({', '.join(unfrozen[:3])}{', …' if len(unfrozen) > 3 else ''}): add them to an optimizer that was made "
            "without them",
            RestoredParametersWarning,
        )


def has_parameters(model: nn.Module, act: Activation | Site) -> bool:
    """Return whether an activation has parameters, or is a functional PReLU, which takes them as an argument."""
    if act.kind == "PReLU":
        return True
    return not act.function and next(model.get_submodule(act.name).parameters(), None) is not None


def _used_parameters(model: nn.Module, runs: Iterable[Recording]) -> set[str]:
    """Return the names of all parameters used in recordings of a model; a shared parameter has several names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    used: set[int] = set()
    for run in runs:
        for node, fact in run.facts.items():
            if node.op == "call_module" and fact.label in modules:
                parts = [part for part in modules[fact.label].modules() if not is_identity(part)]
                used |= {id(value) for part in parts for value in part.parameters(recurse=False)}
            if node.op == "get_attr" and str(node.target) in parameters:
                used.add(id(parameters[str(node.target)]))
    return {name for name, value in parameters.items() if id(value) in used}
