"""Modules whose kind shows only when their forward is recorded: handwritten activations and cropping modules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.fx import Node

from nmconv.flow.cropping import Crop, crop_of_call
from nmconv.flow.ops import AFFINE, NONLINEAR
from nmconv.recording import Answers, Call, ModelRaised, NeedsData, Recording, Spec, record_call

__all__ = ["crop_of_module", "is_crop", "is_handwritten_activation", "is_plain"]

_CONSTANTS = (bool, int, float, str, type(None))
_MODULE_INTERNALS = frozenset(nn.Module().__dict__)
_SHAPE = (2, 3, 4, 5)  # that handwritten activations are probed with
# The spatial sizes that croppings are probed with: two for each rank, larger than what is usually cut off.
_CROP_SIZES = {1: ((4099,), (5003,)), 2: ((257, 263), (307, 311)), 3: ((67, 71, 73), (79, 83, 89))}

_T = TypeVar("_T")


class _ProbeCache(Generic[_T]):
    """Results of one kind of probe, by the module's class and settings.

    Args:
        default: The result for a module that is asked about while another one is being probed.
    """

    def __init__(self, default: _T) -> None:
        self._default = default
        self._results: WeakKeyDictionary[type[nn.Module], dict[Any, _T]] = WeakKeyDictionary()
        self._state = threading.local()

    def get(self, cls: type[nn.Module], key: Any, probe: Callable[[], _T]) -> _T:
        """Return the cached result, or that of ``probe``."""
        if getattr(self._state, "probing", False):
            return self._default
        results = self._results.setdefault(cls, {})
        if key not in results:
            self._state.probing = True
            try:
                results[key] = probe()
            finally:
                self._state.probing = False
        return results[key]


_activations = _ProbeCache(False)
_crops: _ProbeCache[Crop | None] = _ProbeCache(None)


def is_handwritten_activation(module: nn.Module) -> bool:
    """Return whether a module without parameters is elementwise in its one input, differentiable and not affine.

    Rounding, quantizers and mere scaling do not count. The module's forward is recorded on a small input. If the module
    has children, its own forward must combine what they return, as ``x * self.sigmoid(x)`` does; otherwise the children
    are what counts.
    """
    cls = type(module)
    if module._parameters or module._buffers or next(module.parameters(), None) is not None:
        return False
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or cls.forward is nn.Module.forward:
        return False
    settings = _settings(module)
    return settings is not None and _activations.get(cls, settings, lambda: _is_activation(module))


def is_crop(module: nn.Module) -> bool:
    """Return whether a module without parameters only removes the border of maps, the same at every size."""
    return any(crop_of_module(module, rank) is not None for rank in _CROP_SIZES)


def crop_of_module(module: nn.Module, rank: int) -> Crop | None:
    """Return what a module crops from maps with ``rank`` spatial axes, or None if it does anything else.

    The module's forward is recorded at two sizes.
    """
    cls = type(module)
    settings = None if module._parameters or module._modules else _settings(module)
    if settings is None or cls.forward is nn.Module.forward:
        return None
    return _crops.get(cls, (rank, *settings), lambda: _crop(module, rank))


def is_plain(value: Any) -> bool:
    """Return whether a call's arguments consist of nodes, numbers and strings only."""
    return all(map(is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, (Node, *_CONSTANTS))


def _settings(module: nn.Module) -> tuple[Any, ...] | None:
    """Return what distinguishes a module from others of its class; None if that is more than constants and children."""
    settings = {name: value for name, value in vars(module).items() if name not in _MODULE_INTERNALS}
    if module._buffers or module._forward_hooks or "forward" in settings:
        return None
    if not all(isinstance(value, _CONSTANTS) for value in settings.values()):
        return None
    children = [(name, type(child), _settings(child)) for name, child in module._modules.items() if child is not None]
    if any(child_settings is None for _, _, child_settings in children):
        return None
    attributes = ((name, type(value), value) for name, value in settings.items())
    return getattr(type(module).forward, "__code__", None), *attributes, *children


def _record(module: nn.Module, shape: tuple[int, ...], training: bool) -> Recording | None:
    """Return a recording of the module's forward, every call inside it included; None if it fails."""
    call = Call("probe", training, (Spec(shape, torch.float32),))
    try:
        return record_call(module, call, "", lambda part: False, Answers())
    except (ModelRaised, NeedsData):
        return None


def _is_activation(module: nn.Module) -> bool:
    for training in (False, True):
        recording = _record(module, _SHAPE, training)
        if recording is None or not _is_nonlinear_elementwise(recording):
            return False
        if module._modules and not _combines_values(recording):
            return False
    return True


def _combines_values(recording: Recording) -> bool:
    """Return whether the module's own forward combines two values."""
    return any(fact.frame.path == "" and len(set(fact.reads)) > 1 for fact in recording.facts.values())


def _is_nonlinear_elementwise(recording: Recording) -> bool:
    """Return whether every call is elementwise in the input, at least one is nonlinear, and one value is returned."""
    values: set[Node] = set()
    nonlinear = False
    for node, fact in recording.facts.items():
        if node.op == "placeholder":
            values.add(node)
            continue
        label = "div" if fact.label == "rdiv" else fact.label
        if node.op != "call_function" or label not in AFFINE | NONLINEAR or fact.shapes != (_SHAPE,):
            return False
        if not values.issuperset(node.all_input_nodes) or not is_plain((node.args, tuple(node.kwargs.values()))):
            return False
        values.add(node)
        products = label in ("mul", "mul_", "div", "div_") and _operand_count(node) > 1
        nonlinear |= label in NONLINEAR or products
    (returned,) = recording.output[1] if len(recording.output[1]) == 1 else (None,)
    pure = not recording.stored and not recording.written
    return nonlinear and returned is not None and returned[0] in values and pure


def _operand_count(node: Node) -> int:
    """Return the number of a call's operands that are values; two for ``x * x``."""
    operands = [operand for operand in node.args if isinstance(operand, Node)]
    return len(node.all_input_nodes) + len(operands) - len(set(operands))


def _crop(module: nn.Module, rank: int) -> Crop | None:
    crops: set[Crop | None] = set()
    for training in (False, True):
        for sizes in _CROP_SIZES.get(rank, ()):
            recording = _record(module, (2, 3, *sizes), training)
            if recording is None:
                return None
            crops.add(_total_crop(recording, rank))
    return crops.pop() if len(crops) == 1 else None


def _total_crop(recording: Recording, rank: int) -> Crop | None:
    """Return the sum of all crops in a recording that consists of nothing but a chain of these; None otherwise."""
    last = None
    total = [(0, 0)] * rank
    for node, fact in recording.facts.items():
        if node.op == "placeholder":
            last = node
            continue
        if last is None or fact.reads != ((last, None),):
            return None
        if fact.label not in ("contiguous", "clone"):
            crop = crop_of_call(fact.label, node.args, recording.facts[last].shapes[0])
            if crop is None:
                return None
            total = [(left + a, right + b) for (left, right), (a, b) in zip(total, crop, strict=True)]
        last = node
    returns_last = recording.output == (recording.output[0], ((last, None),))
    pure = returns_last and not recording.stored and not recording.written
    return tuple(total) if pure and any(map(any, total)) else None
