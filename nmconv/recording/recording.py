"""What a recording is: a model's own run as an fx graph, with what is known of each node beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from nmconv.recording.answers import Answers
from nmconv.recording.size_questions import Roots, Site

__all__ = ["Call", "Fact", "Frame", "Lines", "Read", "Recording", "Spec", "map_tensors", "memory_of"]

# Methods of one module that call one another, and the lines where they do; outermost first.
Lines = tuple[tuple[CodeType, int], ...]
# A tensor that a call is given: the node that made it, and the last one that wrote to its memory, if another did.
Read = tuple[Node, "Node | None"]


@dataclass(frozen=True)
class Spec:
    """A tensor of which only this matters."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def map_tensors(value: Any, function: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists and dicts with ``function`` of each tensor and :class:`Spec` in it."""
    if isinstance(value, (torch.Tensor, Spec)):
        return function(value)
    if isinstance(value, tuple):
        parts = [map_tensors(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_tensors(part, function) for part in value]
    if isinstance(value, dict):
        return {key: map_tensors(part, function) for key, part in value.items()}
    return value


def memory_of(value: torch.Tensor) -> int:
    """What tells the memory of one tensor from another's; of one inside of a transform, itself."""
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(value)


@dataclass(frozen=True)
class Call:
    """One way to call a model.

    Attributes:
        name: What tells it apart: ``eval``, ``train, other size``.
        training: The mode.
        args: Positional arguments, with a :class:`Spec` for each tensor.
        kwargs: Arguments by name.
        method: Which method.
        grad: Whether gradients are recorded.
        autocast: The type of device for which autocast is on, or "".
        optional: Whether a result may refuse it with an error of the library's own.
        asks: Whether sizes note what is asked of them.
        other_way: Where questions about sizes are answered the other way; such a run only shows where they are.
        disguised: Names of modules of which nothing is to be seen: see :mod:`nmconv.recording.wrapping`.
        closable: Whether what it reads inside of what is merged lets it be refused, and does not end the run.
    """

    name: str
    training: bool
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    method: str = "forward"
    grad: bool = True
    autocast: str = ""
    optional: bool = False
    closable: bool = False
    asks: bool = False
    other_way: frozenset[Site] = frozenset()
    disguised: frozenset[str] = frozenset()


@dataclass(eq=False)
class Frame:
    """One call of one module's forward.

    Attributes:
        cls: The module's class.
        path: Its first qualified name.
        parent: The frame it was called from; None for the model's.
        args: Positional arguments, with a :class:`Spec` for each tensor.
        kwargs: Arguments by name.
        start: How many nodes there were when it began.
        lines: Of the parent's methods, where the call is made.
        result: What made the tensor that it returned, where it returned just one.
        calls: How often each child or function was called in it so far.
    """

    cls: type[nn.Module]
    path: str
    parent: Frame | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    start: int = 0
    lines: Lines = ()
    result: Node | None = None
    calls: Counter[Any] = field(default_factory=Counter)


@dataclass(eq=False)
class Fact:
    """What is known of one node.

    Attributes:
        frame: The forward that made it.
        method: The innermost of its module's methods that was running.
        code: The innermost function that is not torch's, and ``offset`` in its bytecode.
        lines: Of the methods of the frame's module that were running.
        label: The qualified name of the module that was called, or the name of the function.
        number: Which call of that label it is in the frame, from 1.
        settings: Of a module: its class and what its ``repr`` says.
        form: The arguments with a mark in the place of each tensor; hashable.
        reads: The tensors in the arguments, in order.
        context: Whether gradients, inference mode and autocast were on.
        shapes: Of the tensors it returned; of an input or attribute, its own.
        before: For each memory that it wrote to, the node that wrote to it last before.
        passes: Whether it returned the very tensor that it was given, unchanged.
    """

    frame: Frame
    method: str = "forward"
    code: CodeType | None = None
    offset: int = 0
    lines: Lines = ()
    label: str = ""
    number: int = 0
    settings: tuple[str, ...] = ()
    form: Any = ()
    reads: tuple[Read, ...] = ()
    context: tuple[Any, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    before: tuple[Node | None, ...] = ()
    passes: bool = False


@dataclass(eq=False)
class Recording:
    """One run.

    Attributes:
        call: How the model was called.
        path: Which part of it was called: "" is the model itself.
        graph: Leaf modules, functions, methods and attributes in the order of execution.
        facts: Of each node of the graph.
        output: The form of what was returned, with the tensors in it.
        written: For each parameter, buffer, other tensor and input that was written to, the tensor as it is afterwards.
        stored: The same for each tensor that an attribute holds afterwards and did not hold before.
        seen: Nodes that stand for what hooks of the user's have seen.
        frames: All calls of forwards, in order; the first is the model's.
        helped: For each frame, and each method besides forward in which something was recorded, what that was given.
        questions: From each place to the sizes behind what was compared there, where sizes note it.
        lost: How many nodes there were when a size became a plain number, and the sizes behind it.
        sized: Nodes whose sizes the model's code has asked for.
        codes: Functions that were running while something was recorded, torch's own aside.
        asked: Where data decided: the function's name and the path of the module.
        answers: What the data said there.
        names: From other names of modules that are registered several times to the first one.
    """

    call: Call
    path: str
    graph: Graph
    facts: dict[Node, Fact]
    output: tuple[Any, tuple[Read, ...]] = ((), ())
    written: dict[str, Read] = field(default_factory=dict)
    stored: dict[str, Read] = field(default_factory=dict)
    seen: list[Node] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    helped: dict[tuple[Frame, str], tuple[Any, ...]] = field(default_factory=dict)
    questions: dict[Site, list[Roots]] = field(default_factory=dict)
    lost: list[tuple[int, Roots]] = field(default_factory=list)
    sized: set[Node] = field(default_factory=set)
    codes: set[CodeType] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)
    answers: Answers = field(default_factory=Answers)
    names: dict[str, str] = field(default_factory=dict)
