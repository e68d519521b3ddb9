"""Cropping along space by constants: slices, and modules that do nothing else (the chomp of causal convolutions)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nmconv.flow.handwritten import settings_of
from nmconv.recording import Answers, Call, ModelRaised, NeedsData, Recording, Spec, record_call

__all__ = ["Crop", "crop_of_call", "crop_of_module", "is_crop"]

Crop = tuple[tuple[int, int], ...]  # (left, right) of each spatial axis

# Of inputs on the meta device with so many spatial axes: two sizes each, larger than what is usually cut off.
_SIZES = {1: ((4099,), (5003,)), 2: ((257, 263), (307, 311)), 3: ((67, 71, 73), (79, 83, 89))}
_asking = threading.local()
_known: WeakKeyDictionary[type[nn.Module], dict[Any, Crop | None]] = WeakKeyDictionary()


def crop_of_call(label: str, args: Sequence[Any], shape: Sequence[int]) -> Crop | None:
    """What a call leaves out of each spatial axis of a map of this shape; None if it does anything else.

    Args:
        label: What is called: ``getitem``, ``narrow``, or anything else.
        args: What it is given.
        shape: Of its input: batch, channels, and spatial extents.
    """
    slices: list[Any]
    if label == "getitem" and len(args) == 2:
        slices = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    elif label == "narrow" and len(args) == 4 and all(type(part) is int for part in args[1:]):
        _, axis, start, length = args
        slices = [slice(None)] * len(shape)
        slices[axis] = slice(start % shape[axis], start % shape[axis] + length)
    else:
        return None
    dots = [at for at, part in enumerate(slices) if part is Ellipsis]
    if len(dots) == 1:
        slices[dots[0] : dots[0] + 1] = [slice(None)] * (len(shape) - len(slices) + 1)
    if len(slices) > len(shape) or not all(isinstance(part, slice) and _is_plain(part) for part in slices):
        return None
    cuts = [_cut(part, size) for part, size in zip(slices, shape, strict=False)]
    cuts += [(0, 0)] * (len(shape) - len(cuts))
    if len(shape) < 3 or any(map(any, cuts[:2])) or not any(map(any, cuts)):
        return None
    return tuple(cuts[2:])


def is_crop(module: nn.Module) -> bool:
    """Whether a module without parameters only leaves out the border of maps, the same at every size."""
    return any(crop_of_module(module, rank) is not None for rank in _SIZES)


def crop_of_module(module: nn.Module, rank: int) -> Crop | None:
    """What a module leaves out of maps with ``rank`` spatial axes; None if it does anything else.

    Its forward is recorded at two sizes to tell.
    """
    cls = type(module)
    settings = None if module._parameters or module._modules else settings_of(module)
    if settings is None or cls.forward is nn.Module.forward or getattr(_asking, "on", False):
        return None
    known = _known.setdefault(cls, {})
    key = rank, *settings
    if key not in known:
        _asking.on = True
        try:
            known[key] = _recorded(module, rank)
        finally:
            _asking.on = False
    return known[key]


def _recorded(module: nn.Module, rank: int) -> Crop | None:
    found: set[Crop | None] = set()
    for training in (False, True):
        for sizes in _SIZES.get(rank, ()):
            inputs = (Spec((2, 3, *sizes), torch.float32),)
            try:
                run = record_call(module, Call("probe", training, inputs), "", lambda part: False, Answers())
            except (ModelRaised, NeedsData):
                return None
            found.add(_of_run(run, rank))
    return found.pop() if len(found) == 1 else None


def _of_run(run: Recording, rank: int) -> Crop | None:
    """What is left out by all slices, one after the other, if the run makes nothing but these."""
    last = None
    total = [(0, 0)] * rank
    for node, fact in run.facts.items():
        if node.op == "placeholder":
            last = node
            continue
        if last is None or fact.reads != ((last, None),):
            return None
        if fact.label not in ("contiguous", "clone"):
            cut = crop_of_call(fact.label, node.args, run.facts[last].shapes[0])
            if cut is None:
                return None
            total = [(left + a, right + b) for (left, right), (a, b) in zip(total, cut, strict=True)]
        last = node
    whole = run.output == (run.output[0], ((last, None),)) and not run.stored and not run.written
    return tuple(total) if whole and any(map(any, total)) else None


def _is_plain(part: slice) -> bool:
    ends = all(end is None or type(end) is int for end in (part.start, part.stop, part.step))
    return ends and part.step in (None, 1)


def _cut(part: slice, size: int) -> tuple[int, int]:
    start, stop, _ = part.indices(size)
    return start, size - max(start, stop)
