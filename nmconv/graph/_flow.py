"""The flow graph: what a trace says about data, with modules, functions and methods all alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from nmconv.graph._ops import Op
from nmconv.graph._records import ActCall, Frame

__all__ = ["Flow", "FlowNode"]


@dataclass(eq=False)
class FlowNode:
    """One value.

    Attributes:
        index: Position in the order of execution.
        op: What makes it.
        inputs: Indices of the values it is made from, on the main path.
        sides: Indices of values that only modulate it (gates); filled in by gate resolution.
        origin: The fx node.
        name: For a convolution its qualified name, else what describes it.
        frame: The module call that makes it.
        label: What it is called there: a child's relative name or a function's name.
        number: Which call of that label it is in the frame, from 1.
        act: The activation call, for an activation.
        kind: The activation's name.
        inplace: Whether it overwrites its first input.
        view: Whether it may share memory with its first input.
        partial: Whether it is a part of its first input only (a slice).
        learned: For a PARAM, whether a parameter is in it.
        opaque: Whether it is a module that could not be traced.
        members: Names of the convolutions folded into it.
        why: For an activation, why it is no site; for a product, what could not be known.
    """

    index: int
    op: Op
    inputs: list[int]
    origin: Node
    name: str = ""
    sides: list[int] = field(default_factory=list)
    frame: Frame | None = None
    label: str = ""
    number: int = 0
    act: ActCall | None = None
    kind: str = ""
    inplace: bool = False
    view: bool = False
    partial: bool = False
    learned: bool = False
    opaque: bool = False
    members: tuple[str, ...] = ()
    why: str = ""


@dataclass(eq=False)
class Flow:
    """All values of one trace in order of execution, and who reads whom.

    ``readers`` counts main-path readers only and is set by :meth:`link`, once gates are known.
    """

    nodes: list[FlowNode]
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
