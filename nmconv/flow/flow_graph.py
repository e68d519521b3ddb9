"""The flow graph: what a recording says about data, with modules, functions and methods all alike."""

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
        parent: The frame it was called from, None for the root's.
        label: What it is called in the parent: its name relative to the parent's module.
        number: Which call of that label in the parent it is, from 1.
        result: Index of the value it returned, where it returned just one.
        lines: Of the parent's methods, where the call is made.
        args: Positional arguments, with a :class:`nmconv.recording.Spec` for each tensor.
        kwargs: Arguments by name.
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
    """The frame, and those that it was called from, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.parent


@dataclass(frozen=True)
class ActCall:
    """What identifies one activation call: see :class:`nmconv.Site`, whose attributes these are."""

    frame: ModuleCall
    method: str
    module: nn.Module | None
    name: str
    function: str | None
    call: int
    step: int


@dataclass(eq=False)
class FlowNode:
    """One value.

    Attributes:
        index: Position in the order of execution.
        op: What makes it.
        inputs: Indices of the values it is made from, on the main path.
        sides: Indices of values that only modulate it (gates); filled in by gate resolution.
        origin: The recording's node.
        name: For a convolution its qualified name, else what describes it.
        frame: The module call that makes it.
        module: The module that was called for it, if it was one.
        method: The method of the frame's module that makes it.
        lines: Of the methods of the frame's module, where it is made.
        label: What it is called there: a child's relative name or a function's name.
        number: Which call of that label it is in the frame, from 1.
        act: The activation call, for an activation.
        kind: The activation's name.
        shape: Its shape; None for what is more than one tensor.
        inplace: Whether it overwrites its first input.
        view: Whether it may share memory with its first input.
        partial: Whether it is a part of its first input only (a slice).
        learned: For a PARAM, whether a parameter is in it.
        exposed: Whether its shape is asked for, or an attribute keeps it.
        members: Names of the convolutions folded into it.
        why: For an activation, why it is no site; for a product, what could not be known.
    """

    index: int
    op: Op
    inputs: list[int]
    origin: Node
    name: str = ""
    sides: list[int] = field(default_factory=list)
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
    members: tuple[str, ...] = ()
    why: str = ""


@dataclass(eq=False)
class Flow:
    """All values of one recording in order of execution, and who reads whom.

    ``readers`` counts main-path readers only and is set by :meth:`link`, once gates are known. ``odd`` has the names of
    modules of which a child returned something else than one tensor.
    """

    nodes: list[FlowNode]
    frames: list[ModuleCall]
    recording: Recording
    odd: frozenset[str]
    readers: list[list[int]] = field(default_factory=list)
    main: list[bool] = field(default_factory=list)
    gating: list[bool] = field(default_factory=list)

    def link(self) -> None:
        """(Re)compute which nodes are on the main path (reach an output) and their readers there."""
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
                for source in node.sides if self.main[node.index] else (*node.inputs, *node.sides):
                    self.gating[source] = True
        self.readers = [[] for _ in self.nodes]
        for node in self.nodes:
            if self.main[node.index] and node.op is not Op.DEAD:
                for source in dict.fromkeys(node.inputs):
                    self.readers[source].append(node.index)

    def single(self, index: int) -> bool:
        """Whether the value has exactly one reader on the main path."""
        return len(self.readers[index]) == 1

    def all_readers(self) -> list[list[int]]:
        """Of each value, who reads it in any way."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in {*node.inputs, *node.sides}:
                readers[source].append(node.index)
        return readers
