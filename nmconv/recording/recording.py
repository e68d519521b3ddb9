"""A recording: one run of a model as an fx graph, with facts about each node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from nmconv.recording.answers import Answers
from nmconv.recording.tracked_sizes import CodeLocation, Sources

__all__ = ["Call", "Fact", "Frame", "Lines", "Read", "Recording"]

# The running methods of one module, outermost first: the code of each, and the line that it is at.
Lines = tuple[tuple[CodeType, int], ...]
# A tensor argument: the node that made it, and the last node that wrote to its memory, if that is another one.
Read = tuple[Node, "Node | None"]


@dataclass(frozen=True)
class Call:
    """One way to call a model.

    Attributes:
        name: A name for error messages, such as ``eval`` or ``train, other size``.
        training: Whether the model is in train mode.
        args: Positional arguments, with a :class:`Spec` for each tensor.
        kwargs: Keyword arguments, likewise.
        method: Name of the method that is called.
        grad: Whether gradients are enabled.
        autocast: The device type for which autocast is on, or "".
        may_raise: Whether a converted model may raise an NmconvError in this call instead.
        closable: Whether ``merge`` may make the method raise where it would read an intermediate value of a merged
            run, instead of ending the run there.
        track_sizes: Whether sizes record what they are compared with.
        flipped: Where comparisons of sizes give the opposite result. Such a run only reveals further paths.
        disguised: Names of modules that are hidden from the model's code, see ``forwards.disguise``.
    """

    name: str
    training: bool
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    method: str = "forward"
    grad: bool = True
    autocast: str = ""
    may_raise: bool = False
    closable: bool = False
    track_sizes: bool = False
    flipped: frozenset[CodeLocation] = frozenset()
    disguised: frozenset[str] = frozenset()


@dataclass(eq=False)
class Frame:
    """One call of one module's forward.

    Attributes:
        cls: The module's class.
        path: The module's first qualified name.
        parent: The frame that made the call; None for the model's own.
        args: Positional arguments, with a :class:`Spec` for each tensor.
        kwargs: Keyword arguments, likewise.
        start: The number of nodes when the call began.
        lines: The lines of the parent's methods that make the call.
        result: The node that made the returned value, if that is a single tensor.
        calls: The number of calls so far of each child and each function in this frame.
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
    """What is known about one node.

    Attributes:
        frame: The forward that made it.
        method: The innermost method of the frame's module that was running.
        code: The innermost running function that is not torch's.
        offset: The position in that function's bytecode.
        lines: The running methods of the frame's module.
        label: The qualified name of the called module, or the name of the function.
        number: The number of this call among those of the same label in the frame, from 1.
        settings: A module's Python module, class name and ``extra_repr`` (``repr`` if it has children).
        form: The arguments with ``TENSOR`` in the place of each tensor; hashable.
        reads: The tensors among the arguments, in order.
        context: The result of :func:`nmconv.recording.current_context` at the call.
        shapes: Shapes of the returned tensors; for an input or an attribute, its own.
        previous_writers: The previous writer of each memory that the node wrote to.
        passes: Whether the node returned an input tensor itself, unchanged.
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
    previous_writers: tuple[Node | None, ...] = ()
    passes: bool = False


@dataclass(eq=False)
class Recording:
    """One run of a model or of a part of it.

    Attributes:
        call: How the model was called.
        path: The qualified name of the part that was called; "" is the model itself.
        graph: Leaf modules, functions, methods and attributes in the order of execution.
        facts: The facts about each node of the graph.
        output: The form of the returned value, and the tensors in it.
        written: The final value of each parameter, buffer, other tensor and input that was written to, by name.
        stored: The tensor that each attribute holds at the end, if it is not the one from the beginning.
        hook_nodes: For each call of a user's hook, the node that reads what the hook was given.
        frames: All calls of forwards, in order; the first is the model's.
        helper_arguments: The arguments of each method besides forward in which anything was recorded, by frame and
            method name.
        comparisons: For each place in the code that compared sizes, their sources, if ``call.track_sizes``.
        lost_sizes: For each size that became a plain number, the number of nodes at that time and the size's sources.
        sizes_read: Nodes whose sizes the model's code has read.
        codes: The functions that were running when nodes were recorded, without torch's.
        data_dependent_calls: The calls whose results depended on data: the label and the calling module's path.
        answers: The results of those calls.
        names: The first name of each module that is registered more than once, by its other names.
    """

    call: Call
    path: str
    graph: Graph
    facts: dict[Node, Fact]
    output: tuple[Any, tuple[Read, ...]] = ((), ())
    written: dict[str, Read] = field(default_factory=dict)
    stored: dict[str, Read] = field(default_factory=dict)
    hook_nodes: list[Node] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    helper_arguments: dict[tuple[Frame, str], tuple[Any, ...]] = field(default_factory=dict)
    comparisons: dict[CodeLocation, list[Sources]] = field(default_factory=dict)
    lost_sizes: list[tuple[int, Sources]] = field(default_factory=list)
    sizes_read: set[Node] = field(default_factory=set)
    codes: set[CodeType] = field(default_factory=set)
    data_dependent_calls: list[tuple[str, str]] = field(default_factory=list)
    answers: Answers = field(default_factory=Answers)
    names: dict[str, str] = field(default_factory=dict)
