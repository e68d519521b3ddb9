"""What one module is: a leaf of a known kind, or something to look into."""

from __future__ import annotations

from typing import Any

from torch import nn

from nmconv.flow import zoo
from nmconv.flow.cropping import is_crop
from nmconv.flow.gradual_ops import GRADUAL
from nmconv.flow.handwritten import is_handwritten_activation
from nmconv.flow.ops import ACT_MODULES, MODULES, Op, is_torchs
from nmconv.flow.registry import registered_op

__all__ = ["LEAF", "THROUGH", "act_kind", "hooks_of", "is_activation", "is_conv", "is_sequential", "leaf_op", "slot_of"]

# Marks of our own: on a class or an object that is one convolution whatever its forward; on one to be looked into.
LEAF = "_nmconv_leaf"
THROUGH = zoo.THROUGH


def leaf_op(module: nn.Module) -> Op | None:
    """The module's kind, or None if it is to be looked into.

    A subclass that brings a forward of its own is looked into like any module (it may do more than its base), unless
    timm or torchvision wrote it and it is known, or it is an activation written by hand. What is registered is known:
    with :func:`nmconv.register` as what that says, with timm's ``register_notrace_module`` as a leaf.
    """
    cls = type(module)
    if THROUGH in module.__dict__:
        return None
    if GRADUAL in module.__dict__:
        return Op.ACT
    known = registered_op(module) or zoo.module_op(cls)
    if known is not None:
        return known
    op = next((op for base in cls.__mro__ if (op := MODULES.get(base)) is not None), None)
    if op is not None and (is_torchs(cls) or getattr(cls, LEAF, False) or LEAF in module.__dict__):
        return op if "forward" not in module.__dict__ else None
    if op in (None, Op.ACT) and is_handwritten_activation(module):
        return Op.ACT
    if op is None and is_crop(module):
        return Op.PAD
    if op is not None or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None
    if zoo.is_opaque(cls):
        return Op.OTHER
    return Op.OTHER if is_torchs(cls) and cls.__module__.startswith(("torch.nn.", "torch.ao.nn.")) else None


def act_kind(module: nn.Module) -> str:
    """The name of an activation module's kind."""
    known = zoo.act_kind(type(module))
    if known is not None:
        return known
    if not is_torchs(type(module)):
        return type(module).__name__
    kinds = (kind for base in type(module).__mro__ if (kind := ACT_MODULES.get(base)) is not None)
    return next(kinds, type(module).__name__)  # one of torch's that is registered


def is_activation(module: nn.Module) -> bool:
    """Whether the module is one of the activations that nmconv knows."""
    return leaf_op(module) is Op.ACT


def is_conv(module: nn.Module) -> bool:
    """Whether the module's class derives from a convolution, whatever its forward, or is registered as one."""
    return registered_op(module) is Op.CONV or any(MODULES.get(base) is Op.CONV for base in type(module).__mro__)


def hooks_of(module: nn.Module) -> list[Any]:
    """All hooks on the module itself, of calls and of gradients."""
    return [hook for kind in _HOOKS for hook in (module.__dict__.get(kind) or {}).values()]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def slot_of(owner: nn.Module, child: nn.Module, path: str) -> str:
    """The child's name inside ``owner``: its slot if it has one, else where it is found below, else ``/path``."""
    for slot, module in owner._modules.items():
        if module is child:
            return slot
    for name, module in owner.named_modules(remove_duplicate=False):
        if module is child and name:
            return name
    return f"/{path}"


def is_sequential(module: nn.Module) -> bool:
    """Whether the module's forward is nn.Sequential's: children called in order, each once, on one value."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
