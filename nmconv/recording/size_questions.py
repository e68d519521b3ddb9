"""Sizes that note what a model's code asks about them, and let questions be answered the other way."""

from __future__ import annotations

import math
import operator
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch

__all__ = ["Site", "SizeQuestions"]

Site = tuple[CodeType, int]  # where a question is asked: a function, and the offset in its bytecode
Roots = tuple[int, ...]  # the sizes that a number was computed from
_UNSEEN = frozenset(("range", "log", "log2", "log10", "isqrt", "gcd", "comb"))
_MOST = 16  # times that a question is answered the other way in one forward: it may be a loop's


class SizeQuestions:
    """The questions of one run: comparisons and truths of sizes, and of numbers computed from them.

    Args:
        other_way: Where the questions of each forward are answered the other way.
        frame: Of the forward that is running; None while torch's own code asks.
        position: How many nodes there are.

    Attributes:
        asked: From each place to the sizes behind what was compared there, in order.
        lost: How many nodes there were when a size became a plain number, a text or a key (what that decides is not
            seen), and the sizes behind it.
    """

    def __init__(self, other_way: frozenset[Site], frame: Callable[[], Any], position: Callable[[], int]) -> None:
        self.asked: dict[Site, list[Roots]] = defaultdict(list)
        self.lost: list[tuple[int, Roots]] = []
        self._position = position
        self._other_way = other_way
        self._frame = frame
        self._turned: Counter[tuple[int, Site]] = Counter()

    def of(self, value: Any, roots: Roots | None = None) -> Any:
        """The same sizes, which note what is asked of them; or a number computed from sizes."""
        if type(value) is torch.Size:
            return torch.Size([self.of(part) for part in value])
        kind = _KINDS.get(type(value))
        if kind is None:
            return value
        made = kind(value)
        made.questions, made.roots = self, (value,) if roots is None else roots
        return made

    def hand_out(self, sizes: Any) -> Any:
        """Sizes that the model's code asks for; code that counts with C functions may lose them unseen."""
        if self._frame() is not None:
            code, _ = _site()
            if not _UNSEEN.isdisjoint(code.co_names):
                self.lost.append((self._position(), ()))
        return self.of(sizes)

    def answer(self, answer: bool, *compared: Any) -> bool:
        """The answer to a question, or the other one."""
        frame = self._frame()
        if frame is None:
            return answer
        site = _site()
        self.asked[site].append(_roots(*compared))
        if site not in self._other_way or self._turned[id(frame), site] >= _MOST:
            return answer
        self._turned[id(frame), site] += 1
        return not answer

    def number(self, value: int) -> int:
        """A plain number in the place of a size, which must be one: 1 where it is asked for the other one."""
        frame = self._frame()
        if frame is None:
            return value
        site = _site()
        self.asked[site].append((value,))
        return value if site not in self._other_way else 1 if value != 1 else 2

    def lose(self, value: Any) -> None:
        """Note that a size gets out of sight."""
        if self._frame() is not None:
            self.lost.append((self._position(), _roots(value)))


def _site() -> Site:
    """Where the model's code asks."""
    at: FrameType | None = sys._getframe(2)
    while at is not None and (at.f_globals.get("__name__") or "").startswith(("nmconv.recording", "torch.")):
        at = at.f_back
    assert at is not None
    return at.f_code, at.f_lasti


def _roots(*values: Any) -> Roots:
    return tuple(root for value in values if isinstance(value, _Asked) for root in value.roots)


class _Asked:
    """What sizes and numbers computed from them add to Python's numbers."""

    questions: SizeQuestions
    roots: Roots

    def __bool__(self) -> bool:
        return self.questions.answer(bool(_plain(self)), self)

    def __int__(self) -> int:
        self.questions.lose(self)
        return int(_plain(self))

    def __float__(self) -> float:
        self.questions.lose(self)
        return float(_plain(self))

    def __str__(self) -> str:
        self.questions.lose(self)
        return str(_plain(self))

    def __format__(self, spec: str) -> str:
        self.questions.lose(self)
        return format(_plain(self), spec)

    def __hash__(self) -> int:
        self.questions.lose(self)
        return hash(_plain(self))

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __round__(self, digits: Any = None) -> Any:
        return self.questions.of(round(_plain(self), digits), self.roots)


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
        return self.questions.of(compute(two, one) if flipped else compute(one, two), _roots(self, other))

    return method


def _computing_alone(compute: Callable[[Any], Any]) -> Any:
    def method(self: Any) -> Any:
        return self.questions.of(compute(_plain(self)), self.roots)

    return method


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Asked, f"__{_name}__", _comparing(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(_Asked, f"__{_name}__", _computing(_name, flipped=False))
    setattr(_Asked, f"__r{_name}__", _computing(_name, flipped=True))
for _name, _compute in (
    ("neg", operator.neg), ("abs", abs), ("ceil", math.ceil), ("floor", math.floor), ("trunc", math.trunc),
):  # fmt: skip
    setattr(_Asked, f"__{_name}__", _computing_alone(_compute))


class _Whole(_Asked, int):
    """A size."""

    def bit_length(self) -> int:
        made: int = self.questions.of(int.bit_length(_plain(self)), self.roots)
        return made


for _name in ("and", "or", "xor", "lshift", "rshift"):
    _operator = f"{_name}_" if _name in ("and", "or") else _name
    setattr(_Whole, f"__{_name}__", _computing(_operator, flipped=False))
    setattr(_Whole, f"__r{_name}__", _computing(_operator, flipped=True))


class _Fraction(_Asked, float):
    """What sizes divided by one another give."""


_KINDS: dict[type, Any] = {int: _Whole, float: _Fraction}


def _plain(value: Any) -> Any:
    """The number itself."""
    if isinstance(value, _Whole):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, _Fraction) else value
