"""What one module is: a leaf of a known kind, or a module whose inner calls are analyzed."""

from __future__ import annotations

from typing import Any

from torch import nn

from nmconv.flow import zoo
from nmconv.flow.gradual_ops import GRADUAL
from nmconv.flow.ops import ACT_MODULES, MODULES, Op, has_torch_forward
from nmconv.flow.probed_modules import is_crop, is_handwritten_activation
from nmconv.flow.registry import registered_op

__all__ = [
    "LEAF",
    "PASS_THROUGH",
    "act_kind",
    "hooks_of",
    "is_activation",
    "is_conv",
    "is_sequential",
    "leaf_op",
    "slot_of",
]

# Attributes that nmconv sets: on a class or module that is one convolution whatever its forward, and on a module that
# passes its input on.
LEAF = "_nmconv_leaf"
PASS_THROUGH = zoo.PASS_THROUGH

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def leaf_op(module: nn.Module) -> Op | None:
    """Return the module's kind, or None if it is not a leaf.

    A subclass with its own forward is not a leaf, since it may do more than its base, unless it is known from timm or
    torchvision or is a handwritten activation. Registered classes are leaves: :func:`nmconv.register` states their
    kind; with timm's ``register_notrace_module`` it is OTHER.
    """
    cls = type(module)
    if PASS_THROUGH in module.__dict__:
        return None
    if GRADUAL in module.__dict__:
        return Op.ACT
    known = registered_op(module) or zoo.module_op(cls)
    if known is not None:
        return known
    op = next((op for base in cls.__mro__ if (op := MODULES.get(base)) is not None), None)
    if op is not None and (has_torch_forward(cls) or getattr(cls, LEAF, False) or LEAF in module.__dict__):
        return op if "forward" not in module.__dict__ else None
    if op in (None, Op.ACT) and is_handwritten_activation(module):
        return Op.ACT
    if op is None and is_crop(module):
        return Op.PAD
    if op is not None or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None
    if zoo.is_opaque(cls):
        return Op.OTHER
    return Op.OTHER if has_torch_forward(cls) and cls.__module__.startswith(("torch.nn.", "torch.ao.nn.")) else None


def act_kind(module: nn.Module) -> str:
    """Return the name of an activation module's kind."""
    known = zoo.act_kind(type(module))
    if known is not None:
        return known
    if not has_torch_forward(type(module)):
        return type(module).__name__
    kinds = (kind for base in type(module).__mro__ if (kind := ACT_MODULES.get(base)) is not None)
    return next(kinds, type(module).__name__)  # a registered class of torch's has no known kind


def is_activation(module: nn.Module) -> bool:
    """Return whether the module is a known activation."""
    return leaf_op(module) is Op.ACT


def is_conv(module: nn.Module) -> bool:
    """Return whether the module's class derives from a convolution, whatever its forward, or is registered as one."""
    return registered_op(module) is Op.CONV or any(MODULES.get(base) is Op.CONV for base in type(module).__mro__)


def is_sequential(module: nn.Module) -> bool:
    """Return whether the module has nn.Sequential's forward: children in order, each called once, on one value."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def hooks_of(module: nn.Module) -> list[Any]:
    """Return all forward and backward hooks of the module itself."""
    return [hook for kind in _HOOKS for hook in (module.__dict__.get(kind) or {}).values()]


def slot_of(owner: nn.Module, child: nn.Module, path: str) -> str:
    """Return the child's name relative to ``owner``, or ``/path`` if it is not a submodule of it."""
    for slot, module in owner._modules.items():
        if module is child:
            return slot
    for name, module in owner.named_modules(remove_duplicate=False):
        if module is child and name:
            return name
    return f"/{path}"
