"""Sizes that note what a model's code asks about them, and let one question be answered the other way."""

from __future__ import annotations

import math
import operator
import sys
from collections import defaultdict
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch

__all__ = ["Site", "SizeQuestions"]

Site = tuple[CodeType, int]  # where a question is asked: a function, and the offset in its bytecode


class SizeQuestions:
    """The questions of one run: comparisons and truths of sizes, and of numbers computed from them.

    Args:
        other_way: Where the first question of each forward is answered the other way.
        frame: Of the forward that is running.

    Attributes:
        asked: From each place to what was compared there, in order.
    """

    def __init__(self, other_way: frozenset[Site], frame: Callable[[], Any]) -> None:
        self.asked: dict[Site, list[Any]] = defaultdict(list)
        self._other_way = other_way
        self._frame = frame
        self._turned: set[tuple[int, Site]] = set()

    def of(self, value: Any) -> Any:
        """The same sizes, which note what is asked of them."""
        if type(value) is torch.Size:
            return torch.Size([self.of(part) for part in value])
        kind = _KINDS.get(type(value))
        if kind is None:
            return value
        made = kind(value)
        made.questions = self
        return made

    def answer(self, answer: Any, *compared: Any) -> Any:
        """The answer to a question, or the other one: of truths the opposite, of numbers a small one."""
        frame = self._frame()
        if frame is None:  # torch's own code asks
            return answer
        at: FrameType | None = sys._getframe(1)
        while at is not None and (at.f_globals.get("__name__") or "").startswith(_NOT_THE_MODELS):
            at = at.f_back
        assert at is not None
        site = at.f_code, at.f_lasti
        self.asked[site].append(tuple(map(_plain, compared)))
        if site not in self._other_way or (id(frame), site) in self._turned:
            return answer
        self._turned.add((id(frame), site))
        if isinstance(answer, bool):
            return not answer
        return type(answer)(1 if answer != 1 else 2)


_NOT_THE_MODELS = ("nmconv.recording", "torch.")


class _Asked:
    """What sizes and numbers computed from them add to Python's numbers."""

    questions: SizeQuestions

    def __bool__(self) -> bool:
        value = _plain(self)
        return self.questions.answer(bool(value), value)

    def __int__(self) -> int:
        value = int(_plain(self))
        return int(self.questions.answer(value, value))

    def __float__(self) -> float:
        value = float(_plain(self))
        return float(self.questions.answer(value, value))

    def __round__(self, digits: Any = None) -> Any:
        return self.questions.of(round(_plain(self), digits))

    def __ceil__(self) -> Any:
        return self.questions.of(math.ceil(_plain(self)))

    def __floor__(self) -> Any:
        return self.questions.of(math.floor(_plain(self)))

    def __trunc__(self) -> Any:
        return self.questions.of(math.trunc(_plain(self)))

    def __neg__(self) -> Any:
        return self.questions.of(-_plain(self))


def _comparing(name: str) -> Any:
    compare = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self.questions.answer(compare(_plain(self), _plain(other)), self, other)

    return method


def _computing(name: str, flipped: bool) -> Any:
    compute = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        one, two = _plain(self), _plain(other)
        return self.questions.of(compute(two, one) if flipped else compute(one, two))

    return method


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Asked, f"__{_name}__", _comparing(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod"):
    setattr(_Asked, f"__{_name}__", _computing(_name, flipped=False))
    setattr(_Asked, f"__r{_name}__", _computing(_name, flipped=True))


class _Whole(_Asked, int):
    """A size."""

    __hash__ = int.__hash__


class _Fraction(_Asked, float):
    """What sizes divided by one another give."""

    __hash__ = float.__hash__


_KINDS: dict[type, Any] = {int: _Whole, float: _Fraction}


def _plain(value: Any) -> Any:
    """The number itself."""
    if isinstance(value, _Whole):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, _Fraction) else value
