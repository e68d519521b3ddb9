"""Activations that somebody has written by hand: modules that compute one value from each element, and nothing else."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.fx import Node

from nmconv.flow.ops import AFFINE, BENDING
from nmconv.recording import Answers, Call, ModelRaised, NeedsData, Recording, Spec, record_call

__all__ = ["is_handwritten_activation", "is_plain", "settings_of"]

_SIMPLE = (bool, int, float, str, type(None))
_OWN = frozenset(nn.Module().__dict__)
_known: WeakKeyDictionary[type[nn.Module], dict[Any, bool]] = WeakKeyDictionary()
_asking = threading.local()


def is_handwritten_activation(module: nn.Module) -> bool:
    """Whether a module without parameters is elementwise in its one input, differentiable, and not affine.

    Rounding, quantizers and what only scales are none. Its forward is recorded on a small input to tell. One with parts
    must put what they give together itself, as ``x * self.sigmoid(x)`` does: else its parts are what counts.
    """
    cls = type(module)
    if module._parameters or module._buffers or next(module.parameters(), None) is not None:
        return False
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or cls.forward is nn.Module.forward:
        return False
    key = settings_of(module)
    if key is None or getattr(_asking, "on", False):
        return False
    known = _known.setdefault(cls, {})
    if key not in known:
        _asking.on = True
        try:
            known[key] = _is_elementwise(module)
        finally:
            _asking.on = False
    return known[key]


def settings_of(module: nn.Module) -> tuple[Any, ...] | None:
    """All that its class does not say of a module, if that is numbers, texts and parts of the same sort."""
    settings = {name: value for name, value in vars(module).items() if name not in _OWN}
    if module._buffers or module._forward_hooks or "forward" in settings:
        return None
    if not all(isinstance(value, _SIMPLE) for value in settings.values()):
        return None
    parts = [(name, part, settings_of(part)) for name, part in module._modules.items() if part is not None]
    if any(known is None for _, _, known in parts):
        return None
    own = ((name, type(value), value) for name, value in settings.items())
    return (
        getattr(type(module).forward, "__code__", None),
        *own,
        *((name, type(part), its) for name, part, its in parts),
    )


def _is_elementwise(module: nn.Module) -> bool:
    inputs = (Spec((2, 3, 4, 5), torch.float32),)
    for training in (False, True):
        try:
            run = record_call(module, Call("probe", training, inputs), "", lambda part: False, Answers())
        except (ModelRaised, NeedsData):
            return False
        if not _bends_each(run) or (module._modules and not _joins(run)):
            return False
    return True


def _joins(run: Recording) -> bool:
    """Whether the module's own forward makes something of two values."""
    return any(fact.frame.path == "" and len(set(fact.reads)) > 1 for fact in run.facts.values())


def _bends_each(run: Recording) -> bool:
    """Whether all that the run does is done to each element, and something of it bends."""
    made: set[Node] = set()
    bends = False
    for node, fact in run.facts.items():
        if node.op == "placeholder":
            made.add(node)
            continue
        label = "div" if fact.label == "rdiv" else fact.label
        if node.op != "call_function" or label not in AFFINE | BENDING or fact.shapes != ((2, 3, 4, 5),):
            return False
        if not made.issuperset(node.all_input_nodes) or not is_plain((node.args, tuple(node.kwargs.values()))):
            return False
        made.add(node)
        products = label in ("mul", "mul_", "div", "div_") and len(node.all_input_nodes) + _same(node) > 1
        bends |= label in BENDING or products
    (read,) = run.output[1] if len(run.output[1]) == 1 else (None,)
    return bends and read is not None and read[0] in made and not run.stored and not run.written


def _same(node: Node) -> int:
    """How many operands there are beyond different ones: ``x * x``."""
    operands = [part for part in node.args if isinstance(part, Node)]
    return len(operands) - len(set(operands))


def is_plain(value: Any) -> bool:
    """Whether there are but nodes, numbers and texts among the arguments of a call."""
    return all(map(is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, (Node, *_SIMPLE))
