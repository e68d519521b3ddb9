"""Activations that somebody has written by hand: modules that compute one value from each element, and nothing else."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.fx import Node

from nmconv.recording import Answers, Call, ModelRaised, NeedsData, Recording, Spec, record_call

__all__ = ["is_handmade_activation"]

_SIMPLE = (bool, int, float, str, type(None))
_OWN = frozenset(nn.Module().__dict__)
# What gives each element's own value times or plus numbers, and what bends it; all differentiable.
_AFFINE = frozenset(["add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "clone", "contiguous"])
_BENDING = frozenset(
    [
        "sigmoid",
        "sigmoid_",
        "tanh",
        "tanh_",
        "relu",
        "relu_",
        "relu6",
        "hardtanh",
        "hardtanh_",
        "hardsigmoid",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
        "selu",
        "selu_",
        "celu",
        "celu_",
        "gelu",
        "silu",
        "hardswish",
        "mish",
        "softplus",
        "softsign",
        "logsigmoid",
        "tanhshrink",
        "clamp",
        "clamp_",
        "clamp_min",
        "clamp_max",
        "exp",
        "erf",
        "erfc",
        "log",
        "log1p",
        "expm1",
        "sqrt",
        "rsqrt",
        "pow",
        "square",
        "abs",
        "atan",
        "sin",
        "cos",
        "reciprocal",
        "minimum",
        "maximum",
    ]
)
_known: WeakKeyDictionary[type[nn.Module], dict[Any, bool]] = WeakKeyDictionary()
_asking = threading.local()


def is_handmade_activation(module: nn.Module) -> bool:
    """Whether a module without parameters is elementwise in its one input, differentiable, and not affine.

    Rounding, quantizers and what only scales are none. Its forward is recorded on a small input to tell.
    """
    cls = type(module)
    settings = {name: value for name, value in vars(module).items() if name not in _OWN}
    held = module._parameters or module._buffers or module._modules or module._forward_hooks
    if held or "forward" in settings or not all(isinstance(value, _SIMPLE) for value in settings.values()):
        return False
    if cls.forward is nn.Module.forward or getattr(_asking, "on", False):
        return False
    known = _known.setdefault(cls, {})
    key = getattr(cls.forward, "__code__", None), *((name, type(value), value) for name, value in settings.items())
    if key not in known:
        _asking.on = True
        try:
            known[key] = _is_elementwise(module)
        finally:
            _asking.on = False
    return known[key]


def _is_elementwise(module: nn.Module) -> bool:
    inputs = (Spec((2, 3, 4, 5), torch.float32),)
    for training in (False, True):
        try:
            run = record_call(module, Call("probe", training, inputs), "", lambda part: False, Answers())
        except (ModelRaised, NeedsData):
            return False
        if not _bends_each(run):
            return False
    return True


def _bends_each(run: Recording) -> bool:
    """Whether all that the run does is done to each element, and something of it bends."""
    made: set[Node] = set()
    bends = False
    for node, fact in run.facts.items():
        if node.op == "placeholder":
            made.add(node)
            continue
        label = "div" if fact.label == "rdiv" else fact.label
        if node.op != "call_function" or label not in _AFFINE | _BENDING or fact.shapes != ((2, 3, 4, 5),):
            return False
        if not made.issuperset(node.all_input_nodes) or not _is_plain((node.args, tuple(node.kwargs.values()))):
            return False
        made.add(node)
        products = label in ("mul", "mul_", "div", "div_") and len(node.all_input_nodes) + _same(node) > 1
        bends |= label in _BENDING or products
    (read,) = run.output[1] if len(run.output[1]) == 1 else (None,)
    return bends and read is not None and read[0] in made and not run.stored and not run.written


def _same(node: Node) -> int:
    """How many operands there are beyond different ones: ``x * x``."""
    operands = [part for part in node.args if isinstance(part, Node)]
    return len(operands) - len(set(operands))


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, (Node, *_SIMPLE))
