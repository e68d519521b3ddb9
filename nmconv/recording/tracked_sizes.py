"""Sizes that record how the model's code compares them, and that can flip the result of a comparison."""

from __future__ import annotations

import math
import operator
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch

__all__ = ["CodeLocation", "SizeTracker", "Sources"]

CodeLocation = tuple[CodeType, int]  # a function, and an offset in its bytecode
Sources = tuple[int, ...]  # the sizes that a number was computed from
# C functions that return plain numbers.
_UNTRACKED = frozenset(("range", "log", "log2", "log10", "isqrt", "gcd", "comb"))
_MAX_FLIPS = 16  # of one comparison in one forward, since it may be a loop's


class SizeTracker:
    """Records the comparisons and truth tests of sizes, and of numbers computed from sizes, in one run.

    Args:
        flipped: Where comparisons give the opposite result.
        current_frame: Returns the frame of the forward that is running; None while torch's own code runs.
        node_count: Returns the number of nodes so far.

    Attributes:
        comparisons: For each place in the code, the sources of what was compared there, in order.
        lost_sizes: The number of nodes each time that a size became a plain number, a string or a hash, after which its
            use is unknown; and the size's sources.
    """

    def __init__(
        self, flipped: frozenset[CodeLocation], current_frame: Callable[[], Any], node_count: Callable[[], int]
    ) -> None:
        self.comparisons: dict[CodeLocation, list[Sources]] = defaultdict(list)
        self.lost_sizes: list[tuple[int, Sources]] = []
        self._node_count = node_count
        self._flipped = flipped
        self._current_frame = current_frame
        self._flips: Counter[tuple[int, CodeLocation]] = Counter()

    def track(self, value: Any, sources: Sources | None = None) -> Any:
        """Return a tracked copy of a size, a shape, or a number computed from the sizes in ``sources``."""
        if type(value) is torch.Size:
            return torch.Size([self.track(part) for part in value])
        cls = _TRACKED_TYPES.get(type(value))
        if cls is None:
            return value
        tracked = cls(value)
        tracked.tracker, tracked.sources = self, (value,) if sources is None else sources
        return tracked

    def track_queried(self, sizes: Any) -> Any:
        """Return sizes that the model's code has read, tracked.

        Code that names C functions may use the sizes untracked, so a loss is recorded there.
        """
        if self._current_frame() is not None:
            code, _ = _current_location()
            if not _UNTRACKED.isdisjoint(code.co_names):
                self.lost_sizes.append((self._node_count(), ()))
        return self.track(sizes)

    def compare(self, result: bool, *compared: Any) -> bool:
        """Record a comparison; return its result, or the opposite where it is flipped."""
        frame = self._current_frame()
        if frame is None:
            return result
        location = _current_location()
        self.comparisons[location].append(_sources_of(*compared))
        if location not in self._flipped or self._flips[id(frame), location] >= _MAX_FLIPS:
            return result
        self._flips[id(frame), location] += 1
        return not result

    def read_length(self, value: int) -> int:
        """Return the result of ``len(tensor)``, which Python requires to be a plain int.

        It is recorded as a comparison with 1. Where that is flipped, 1 becomes 2, and any other length becomes 1.
        """
        if self._current_frame() is None:
            return value
        location = _current_location()
        self.comparisons[location].append((value,))
        return value if location not in self._flipped else 1 if value != 1 else 2

    def lose(self, value: Any) -> None:
        """Record that the further use of a size is unknown."""
        if self._current_frame() is not None:
            self.lost_sizes.append((self._node_count(), _sources_of(value)))


def _current_location() -> CodeLocation:
    """Return the innermost code that is running, without the recorder's and torch's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_globals.get("__name__") or "").startswith(("nmconv.recording", "torch.")):
        frame = frame.f_back
    assert frame is not None
    return frame.f_code, frame.f_lasti


def _sources_of(*values: Any) -> Sources:
    return tuple(source for value in values if isinstance(value, _Tracked) for source in value.sources)


class _Tracked:
    """Mixin for numbers that report comparisons and conversions to a tracker."""

    tracker: SizeTracker
    sources: Sources

    def __bool__(self) -> bool:
        return self.tracker.compare(bool(_plain(self)), self)

    def __int__(self) -> int:
        self.tracker.lose(self)
        return int(_plain(self))

    def __float__(self) -> float:
        self.tracker.lose(self)
        return float(_plain(self))

    def __str__(self) -> str:
        self.tracker.lose(self)
        return str(_plain(self))

    def __format__(self, spec: str) -> str:
        self.tracker.lose(self)
        return format(_plain(self), spec)

    def __hash__(self) -> int:
        self.tracker.lose(self)
        return hash(_plain(self))

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __round__(self, digits: Any = None) -> Any:
        return self.tracker.track(round(_plain(self), digits), self.sources)


def _comparison(name: str) -> Any:
    compare = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self.tracker.compare(compare(_plain(self), _plain(other)), self, other)

    return method


def _binary(name: str, reflected: bool) -> Any:
    compute = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        one, two = _plain(self), _plain(other)
        return self.tracker.track(compute(two, one) if reflected else compute(one, two), _sources_of(self, other))

    return method


def _unary(compute: Callable[[Any], Any]) -> Any:
    def method(self: Any) -> Any:
        return self.tracker.track(compute(_plain(self)), self.sources)

    return method


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Tracked, f"__{_name}__", _comparison(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(_Tracked, f"__{_name}__", _binary(_name, reflected=False))
    setattr(_Tracked, f"__r{_name}__", _binary(_name, reflected=True))
for _name, _compute in (
    ("neg", operator.neg), ("abs", abs), ("ceil", math.ceil), ("floor", math.floor), ("trunc", math.trunc),
):  # fmt: skip
    setattr(_Tracked, f"__{_name}__", _unary(_compute))


class _TrackedInt(_Tracked, int):
    def bit_length(self) -> int:
        tracked: int = self.tracker.track(int.bit_length(_plain(self)), self.sources)
        return tracked


for _name in ("and", "or", "xor", "lshift", "rshift"):
    _operator = f"{_name}_" if _name in ("and", "or") else _name
    setattr(_TrackedInt, f"__{_name}__", _binary(_operator, reflected=False))
    setattr(_TrackedInt, f"__r{_name}__", _binary(_operator, reflected=True))


class _TrackedFloat(_Tracked, float):
    pass


_TRACKED_TYPES: dict[type, Any] = {int: _TrackedInt, float: _TrackedFloat}


def _plain(value: Any) -> Any:
    """Return a tracked number as a plain one, without reporting it."""
    if isinstance(value, _TrackedInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, _TrackedFloat) else value
