"""The forwards that are running, and where in them a call is made."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from nmconv.recording.context import context_now
from nmconv.recording.methods import methods_of
from nmconv.recording.recording import Fact, Frame, Lines, Read, Recording, Spec, map_tensors
from nmconv.recording.wrapping import is_wrapped_call

__all__ = ["Frames"]


class Frames:
    """The stack of forwards.

    Args:
        recording: What they are noted in.
        model: Whose run it is.
        outermost: The function that calls the model: what runs above it is not the model's.
    """

    def __init__(self, recording: Recording, model: nn.Module, outermost: CodeType) -> None:
        self._recording = recording
        self._outermost = outermost
        self._stack = [Frame(type(model), "", None)]
        self._methods: dict[type, frozenset[CodeType]] = {}

    @property
    def first(self) -> Frame:
        """Where the model's inputs and attributes are made."""
        return self._stack[0]

    @property
    def now(self) -> Frame:
        """The innermost forward that is running."""
        return self._stack[-1]

    def enter(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Frame:
        """Begin a module's forward."""
        lines = self._position(is_module=True)[-1]
        given, named = map_tensors(args, _spec_of), map_tensors(kwargs, _spec_of)
        frame = Frame(type(module), path, self.now, given, named, len(self._recording.facts), lines)
        self._recording.frames.append(frame)
        self._stack.append(frame)
        return frame

    def leave(self) -> None:
        """End the innermost forward."""
        self._stack.pop()

    def fact(self, label: str, form: Any, reads: list[Read], is_module: bool = False) -> Fact:
        """What is known of a call that is made now."""
        frame = self.now
        frame.calls[label, is_module] += 1
        method, code, offset, lines = self._position(is_module)
        number = frame.calls[label, is_module]
        return Fact(frame, method, code, offset, lines, label, number, (), form, tuple(reads), context_now())

    def _position(self, is_module: bool) -> tuple[str, CodeType | None, int, Lines]:
        """The innermost method of the frame's module that runs, where the call is made, and the lines up to it."""
        at: FrameType | None = sys._getframe(1)
        while is_module and at is not None and at.f_code.co_name != "nmconv_forward":
            at = at.f_back
        at = at.f_back if is_module and at is not None else at
        frame = self.now
        cls = frame.cls
        if cls not in self._methods:
            self._methods[cls] = methods_of(cls)
        methods = self._methods[cls]
        method, code, offset = "", None, 0
        lines: list[tuple[CodeType, int]] = []
        while at is not None:
            running = at.f_code
            if running is self._outermost or (running.co_name == "nmconv_forward" and is_wrapped_call(at)):
                break
            home = at.f_globals.get("__name__") or ""
            if not home.startswith(("torch.", "nmconv.recording")) and home != "torch":
                self._recording.codes.add(running)
                if code is None:
                    code, offset = running, at.f_lasti
                if running in methods:
                    lines.append((running, at.f_lineno))
                if not method and _is_method(cls, running):
                    method = running.co_name
                    if method != "forward" and (frame, method) not in self._recording.helped:
                        held = tuple(at.f_locals.get(name) for name in running.co_varnames[1 : running.co_argcount])
                        self._recording.helped[frame, method] = map_tensors(held, _spec_of)
            at = at.f_back
        return method or "forward", code, offset, tuple(reversed(lines))


def _spec_of(value: Tensor | Spec) -> Spec:
    return Spec(tuple(value.shape), value.dtype)


def _is_method(cls: type, code: CodeType) -> bool:
    for base in cls.__mro__:
        found = base.__dict__.get(code.co_name)
        while found is not None:
            if getattr(found, "__code__", None) is code:
                return True
            found = getattr(found, "__wrapped__", None)
    return False
