"""The flow graph: the data flow of a recording, with modules, functions and methods treated alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from nmconv.flow.ops import Op
from nmconv.recording import Lines, Recording

__all__ = ["ActCall", "Flow", "FlowNode", "ModuleCall", "ancestors"]


@dataclass(eq=False)
class ModuleCall:
    """One call of one module's forward.

    Attributes:
        module: The module.
        path: Its qualified name, the first it is registered under.
        parent: The module call it was made from; None for the root's.
        label: The module's name relative to the parent's module.
        number: Which call of that label in the parent it is, from 1.
        result: Index of the returned value; None unless it returned exactly one tensor.
        lines: The lines of the parent's methods where the call is made.
        args: Positional arguments, with a :class:`nmconv.recording.Spec` for each tensor.
        kwargs: Keyword arguments, likewise.
    """

    module: nn.Module
    path: str
    parent: ModuleCall | None = None
    label: str = ""
    number: int = 0
    result: int | None = None
    lines: Lines = ()
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def ancestors(frame: ModuleCall | None) -> Iterator[ModuleCall]:
    """Yield the module call and those it was made from, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.parent


@dataclass(frozen=True)
class ActCall:
    """What identifies one activation call.

    Attributes:
        frame: The module call that makes it.
        method: The method that makes it.
        module: The activation module; None for a function.
        name: As in :class:`nmconv.planning.Activation`.
        function: As there.
        call: As there, in the recording's mode.
        step: As there, in the recording's mode.
    """

    frame: ModuleCall
    method: str
    module: nn.Module | None
    name: str
    function: str | None
    call: int
    step: int


@dataclass(eq=False)
class FlowNode:
    """One value, and the operation that produces it.

    Attributes:
        index: Position in the order of execution.
        op: The kind of operation.
        inputs: Indices of its operands on the main path.
        side_inputs: Indices of operands that only modulate it (gates); filled in by gate resolution.
        origin: The recording's node.
        name: For a convolution its qualified name, otherwise a description.
        frame: The module call in which it runs.
        module: The module that is called, if one is.
        method: The method of the frame's module in which it runs.
        lines: The lines of the methods of the frame's module where it runs.
        label: A child's name relative to the frame's module, or a function's name.
        number: Which call of that label in the frame it is, from 1.
        act: The activation call, for an activation.
        kind: The activation's name.
        shape: The value's shape; None for more than one tensor.
        inplace: Whether it overwrites its first input.
        view: Whether the value may share memory with the first input.
        partial: Whether the value is only a part of the first input (a slice).
        learned: For a PARAM, whether it depends on a parameter.
        exposed: Whether the model reads the value's shape, or keeps the value in an attribute.
        hooked: Whether a user's hook is given the value, and may keep it.
        members: Names of the convolutions folded into it.
        why: For an activation or a part of one, why it is not a site.
    """

    index: int
    op: Op
    inputs: list[int]
    origin: Node
    name: str = ""
    side_inputs: list[int] = field(default_factory=list)
    frame: ModuleCall | None = None
    module: nn.Module | None = None
    method: str = "forward"
    lines: Lines = ()
    label: str = ""
    number: int = 0
    act: ActCall | None = None
    kind: str = ""
    shape: tuple[int, ...] | None = None
    inplace: bool = False
    view: bool = False
    partial: bool = False
    learned: bool = False
    exposed: bool = False
    hooked: bool = False
    members: tuple[str, ...] = ()
    why: str = ""


@dataclass(eq=False)
class Flow:
    """All values of one recording in the order of execution.

    Attributes:
        nodes: The values.
        frames: All calls of modules that are not leaves.
        recording: The recording.
        non_tensor_parents: Names of the modules with a child that returned something other than one tensor.
        readers: For each value, its readers on the main path; set by :meth:`link` after gate resolution.
        main: For each value, whether it is on the main path; set by :meth:`link`.
        gating: For each value, whether it reaches the main path through a gate; set by :meth:`link`.
    """

    nodes: list[FlowNode]
    frames: list[ModuleCall]
    recording: Recording
    non_tensor_parents: frozenset[str]
    readers: list[list[int]] = field(default_factory=list)
    main: list[bool] = field(default_factory=list)
    gating: list[bool] = field(default_factory=list)

    def link(self) -> None:
        """Compute anew which values are on the main path (reach an output), and their readers there."""
        self.main = [False] * len(self.nodes)
        for node in reversed(self.nodes):
            if node.op is Op.OUTPUT:
                self.main[node.index] = True
            if self.main[node.index] and node.op is not Op.DEAD:
                for source in node.inputs:
                    self.main[source] = True
        self.gating = [False] * len(self.nodes)
        for node in reversed(self.nodes):
            if self.main[node.index] or self.gating[node.index]:
                for source in node.side_inputs if self.main[node.index] else (*node.inputs, *node.side_inputs):
                    self.gating[source] = True
        self.readers = [[] for _ in self.nodes]
        for node in self.nodes:
            if self.main[node.index] and node.op is not Op.DEAD:
                for source in dict.fromkeys(node.inputs):
                    self.readers[source].append(node.index)

    def single(self, index: int) -> bool:
        """Return whether the value has exactly one reader on the main path."""
        return len(self.readers[index]) == 1

    def all_readers(self) -> list[list[int]]:
        """Return the readers of each value, including those off the main path."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in {*node.inputs, *node.side_inputs}:
                readers[source].append(node.index)
        return readers
