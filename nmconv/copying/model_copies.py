"""Deep copies of models on the meta device, with cloned tensors, or with the tensors themselves."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from nmconv.copying.closures import rebind_closures
from nmconv.copying.copy_checks import check_copy
from nmconv.copying.held_objects import (
    MODULE_INTERNALS,
    held_objects,
    is_uncopyable,
    module_tensors,
    tensor_names,
    tensors_and_modules,
)
from nmconv.copying.tensor_copies import ClonedTensors, MetaTensors, SharedTensors

__all__ = ["Copy", "copy_sharing_tensors", "copy_with_tensors", "meta_copy"]


@dataclass(eq=False)
class Copy:
    """A model's copy.

    Attributes:
        model: The copy.
        originals: The model's tensor for each of the copy's, by the latter's id.
        names: Qualified names of the model's own tensors by id. A copy that meets one of these reaches outside itself.
    """

    model: nn.Module
    originals: dict[int, torch.Tensor]
    names: dict[int, str]


def meta_copy(model: nn.Module) -> Copy:
    """Return a deep copy with every parameter, buffer and other tensor on the meta device.

    Closures and hooks are bound to the copy. Objects that cannot be copied (locks, open files) are shared.

    Raises:
        ModelTypeError: If the copy shares modules with the model or has another structure.
    """
    return _copy_model(model, MetaTensors)


def copy_with_tensors(model: nn.Module) -> Copy:
    """Return a copy like that of :func:`meta_copy`, with clones of the tensors."""
    return _copy_model(model, ClonedTensors)


def copy_sharing_tensors(model: nn.Module) -> Copy:
    """Return a copy like that of :func:`meta_copy`, with the tensors themselves."""
    return _copy_model(model, SharedTensors)


def _copy_model(model: nn.Module, mode: type[ClonedTensors]) -> Copy:
    tensors = mode({id(value): value for module in model.modules() for _, value in module_tensors(module)})
    held, memo = list(held_objects(model)), tensors_and_modules(model)
    for value in held:
        if isinstance(value, torch.Generator):
            tensors.memo[id(value)] = value.clone_state()
        elif is_uncopyable(value, memo):
            tensors.memo[id(value)] = value
    with tensors:
        _copy_modules(model, tensors.memo)
        model_copy = copy.deepcopy(model, tensors.memo)
    check_copy(model, model_copy)
    if any(type(value) is FunctionType and value.__closure__ for value in held):
        rebind_closures(model_copy, tensors)
    return Copy(model_copy, tensors.originals, tensor_names(model))


def _copy_modules(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy the modules into ``memo`` attribute by attribute, without calling a ``__deepcopy__`` of theirs.

    This takes a fifth of the time of ``copy.deepcopy``. Children come first, since a module that copies itself
    (``fx.GraphModule``) looks into its children.
    """
    modules = [module for module in model.modules() if _has_default_state(type(module))]
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in reversed(modules):
        attributes = vars(memo[id(module)])
        for name, value in vars(module).items():
            if type(value) in (bool, int, float, str, type(None)):
                attributes[name] = value
            elif name in MODULE_INTERNALS and type(value) in (dict, OrderedDict) and id(value) not in memo:
                # A dict of tensors, modules or hooks. Handles of hooks refer to the dict, so it is in the memo, too.
                attributes[name] = memo[id(value)] = type(value)()
                attributes[name].update((key, copy.deepcopy(part, memo)) for key, part in value.items())
            else:
                attributes[name] = copy.deepcopy(value, memo)


_STATE_METHODS = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
_COMPATIBILITY_ONLY = ("torch.nn.modules.conv", "torch.nn.modules.batchnorm")  # add what old files lack


def _has_default_state(cls: type[nn.Module]) -> bool:
    """Return whether instances of the class are pickled as plain nn.Modules are."""
    methods = [(name, getattr(cls, name, None)) for name in _STATE_METHODS]
    return all(
        method is getattr(nn.Module, name, None) or getattr(method, "__module__", None) in _COMPATIBILITY_ONLY
        for name, method in methods
    )
