"""Intercepting and disguising the forwards of a copy's modules, and the stack of running forwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from nmconv.recording.context import current_context
from nmconv.recording.function_code import method_codes
from nmconv.recording.recording import Fact, Frame, Lines, Read, Recording
from nmconv.recording.tensors import map_tensors, spec_of

__all__ = ["FrameStack", "disguise", "intercept_calls"]


# -- intercepting calls of modules ------------------------------------------------------------------------------------


def intercept_calls(model: nn.Module, is_leaf: Callable[[nn.Module], bool], on_call: Callable[..., Any]) -> None:
    """Let each call of a module run ``on_call(module, path, is_leaf(module), forward, args, kwargs)`` instead.

    A call of ``module.forward(...)`` is not intercepted: it counts as code of the caller, as in traces of torch.fx.

    Args:
        model: A copy, changed in place.
        is_leaf: Whether a module is one node.
        on_call: Returns what the call returns.
    """
    for path, module in list(model.named_modules()):
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if not isinstance(module, torch.jit.ScriptModule):
            module.__dict__["forward"] = _intercepted(module, path, is_leaf(module), module.forward, on_call)


def _intercepted(
    module: nn.Module, path: str, is_leaf: bool, forward: Any, on_call: Callable[..., Any]
) -> Callable[..., Any]:
    def nmconv_forward(*args: Any, **kwargs: Any) -> Any:
        if not _is_module_call(sys._getframe()):
            return forward(*args, **kwargs)
        return on_call(module, path, is_leaf, forward, args, kwargs)

    return nmconv_forward


def _is_module_call(frame: FrameType) -> bool:
    """Return whether an ``nmconv_forward`` runs because its module was called, and not its forward by name."""
    return frame.f_back is not None and frame.f_back.f_globals.get("__name__") == "torch.nn.modules.module"


class _Disguise(nn.Module):
    """Calls a module, and hides its class, attributes and parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.training = module.training

        def forward(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        self.__dict__["forward"] = forward


def disguise(model: nn.Module, names: Container[str]) -> None:
    """Hide some modules of a copy from the model's code, which can still call them, wherever they are registered."""
    disguises = {id(module): _Disguise(module) for name, module in model.named_modules() if name in names}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = disguises.get(id(child), child)


# -- the running forwards ---------------------------------------------------------------------------------------------


class FrameStack:
    """The stack of running forwards.

    Args:
        recording: Where frames are added.
        model: The model that runs.
        outermost: The code of the function that calls the model. Python frames above it are not the model's.
    """

    def __init__(self, recording: Recording, model: nn.Module, outermost: CodeType) -> None:
        self._recording = recording
        self._outermost = outermost
        self._stack = [Frame(type(model), "", None)]
        self._method_codes: dict[type, frozenset[CodeType]] = {}

    @property
    def root(self) -> Frame:
        """The frame of the model's inputs and attributes."""
        return self._stack[0]

    @property
    def current(self) -> Frame:
        """The innermost running forward."""
        return self._stack[-1]

    def enter(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Frame:
        """Begin a module's forward."""
        lines = self._position(is_module=True)[-1]
        arg_specs, kwarg_specs = map_tensors(args, spec_of), map_tensors(kwargs, spec_of)
        frame = Frame(type(module), path, self.current, arg_specs, kwarg_specs, len(self._recording.facts), lines)
        self._recording.frames.append(frame)
        self._stack.append(frame)
        return frame

    def leave(self) -> None:
        """End the innermost forward."""
        self._stack.pop()

    def fact(self, label: str, form: Any, reads: list[Read], is_module: bool = False) -> Fact:
        """Return the facts about a call that the model's code is making now."""
        frame = self.current
        frame.calls[label, is_module] += 1
        method, code, offset, lines = self._position(is_module)
        return Fact(
            frame,
            method,
            code,
            offset,
            lines,
            label,
            number=frame.calls[label, is_module],
            form=form,
            reads=tuple(reads),
            context=current_context(),
        )

    def _position(self, is_module: bool) -> tuple[str, CodeType | None, int, Lines]:
        """Return where the current call is made, and note the code that is running.

        Returns:
            The innermost running method of the frame's module, the innermost running code, the offset in it, and the
            lines of the module's running methods.
        """
        current = self.current
        cls = current.cls
        if cls not in self._method_codes:
            self._method_codes[cls] = method_codes(cls)
        methods = self._method_codes[cls]
        method, innermost, offset = "", None, 0
        lines: list[tuple[CodeType, int]] = []
        for frame in self._python_frames(sys._getframe(1), is_module):
            code = frame.f_code
            self._recording.codes.add(code)
            if innermost is None:
                innermost, offset = code, frame.f_lasti
            if code in methods:
                lines.append((code, frame.f_lineno))
            if not method and _is_method(cls, code):
                method = code.co_name
                if method != "forward" and (current, method) not in self._recording.helper_arguments:
                    arguments = tuple(frame.f_locals.get(name) for name in code.co_varnames[1 : code.co_argcount])
                    self._recording.helper_arguments[current, method] = map_tensors(arguments, spec_of)
        return method or "forward", innermost, offset, tuple(reversed(lines))

    def _python_frames(self, frame: FrameType | None, is_module: bool) -> Iterator[FrameType]:
        """Yield the Python frames of the current forward, without torch's and the recorder's, innermost first."""
        if is_module:  # start at the caller of the module that is being called
            while frame is not None and frame.f_code.co_name != "nmconv_forward":
                frame = frame.f_back
            frame = None if frame is None else frame.f_back
        while frame is not None:
            code = frame.f_code
            if code is self._outermost or (code.co_name == "nmconv_forward" and _is_module_call(frame)):
                return
            name = frame.f_globals.get("__name__") or ""
            if not name.startswith(("torch.", "nmconv.recording")) and name != "torch":
                yield frame
            frame = frame.f_back


def _is_method(cls: type, code: CodeType) -> bool:
    """Return whether the code is that of the class's method of the same name, also inside decorators."""
    for base in cls.__mro__:
        function = base.__dict__.get(code.co_name)
        while function is not None:
            if getattr(function, "__code__", None) is code:
                return True
            function = getattr(function, "__wrapped__", None)
    return False
