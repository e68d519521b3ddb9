"""Activations that a forward works out by hand, such as ``x * torch.sigmoid(x)``: expressions in one value."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from nmconv.flow.handwritten import is_plain
from nmconv.flow.ops import AFFINE, BENDING, is_inplace
from nmconv.recording import Fact, Read, Recording

__all__ = [
    "EXPRESSION",
    "Expression",
    "Operation",
    "expressions_in",
    "expressions_of",
    "is_elementwise",
    "operation_of_module",
]

EXPRESSION = "expression"  # what is called so is none of the known kinds


@dataclass(frozen=True, eq=False)
class Expression:
    """One activation.

    Attributes:
        kind: The function that does the same, or :data:`EXPRESSION`.
        base: What it is an expression in.
        inner: The calls on the way; nobody else reads what they give.
        overwrites: Whether its result is written to the memory of what it is an expression in.
    """

    kind: str
    base: Read
    inner: frozenset[Node]
    overwrites: bool


@dataclass(frozen=True, eq=False)
class Operation:
    """What is done to each element of one or several values.

    Attributes:
        label: What it is called.
        place: Where; an expression lies in one place.
        reads: The values.
        function: What does it to tensors.
        arguments: What that is given, with nodes in the place of tensors.
        inplace: Whether it overwrites the first value.
    """

    label: str
    place: Hashable
    reads: tuple[Read, ...]
    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    inplace: bool


# What an expression may end in: calls on two values, of which one is bent.
_JOINS = frozenset(("mul", "mul_", "multiply", "div", "div_", "divide", "maximum", "minimum"))
_SCALES = frozenset(("mul", "mul_", "div", "div_"))
# And what it may consist of: "clone" and "contiguous" may share memory with what they are given.
_INNER = (AFFINE | BENDING | _JOINS | {"rdiv"}) - {"clone", "contiguous"}
_KINDS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("silu", F.silu),
    ("hardswish", F.hardswish),
    ("mish", F.mish),
    ("gelu", F.gelu),
    ("gelu", lambda x: F.gelu(x, approximate="tanh")),
)
# Modules without parameters, as they are when made without arguments.
_MODULES: dict[tuple[str, ...], tuple[str, Callable[..., Any]]] = {
    (cls.__module__, cls.__qualname__, cls().extra_repr()): (function.__name__, function)
    for cls, function in (
        (nn.Sigmoid, torch.sigmoid),
        (nn.Tanh, torch.tanh),
        (nn.Softplus, F.softplus),
        (nn.Hardsigmoid, F.hardsigmoid),
        (nn.ReLU, F.relu),
        (nn.ReLU6, F.relu6),
        (nn.Softsign, F.softsign),
    )
}
_INPLACE = "inplace=True"  # what modules say that are


def expressions_of(recording: Recording) -> dict[Node, Expression]:
    """From the last calls of expressions in a recording to these."""
    kept = {node for node, _ in recording.stored.values()}
    return expressions_in({node: _operation(node, fact) for node, fact in recording.facts.items()}, kept)


def _operation(node: Node, fact: Fact) -> Operation | None:
    place = (fact.frame, fact.method, fact.context)
    if node.op == "call_module":
        return operation_of_module(node, fact.settings, place, fact.reads)
    if node.op != "call_function" or not is_elementwise(fact.label, node.args, node.kwargs):
        return None
    inplace = is_inplace(node, None, fact.label)
    target: Any = node.target
    return Operation(fact.label, place, fact.reads, target, (node.args, node.kwargs), inplace)


def is_elementwise(label: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a function may be a part of an expression."""
    return label in _INNER and "out" not in kwargs and is_plain((args, tuple(kwargs.values())))


def operation_of_module(
    node: Node, settings: tuple[str, ...], place: Hashable, reads: tuple[Read, ...]
) -> Operation | None:
    """The operation of a call of a module, by its class and what its ``repr`` says."""
    inplace = settings[-1:] == (_INPLACE,)
    found = _MODULES.get((*settings[:2], "") if inplace else settings)
    if found is None:
        return None
    return Operation(found[0], place, reads, found[1], (node.args, {}), inplace)


def expressions_in(operations: Mapping[Node, Operation | None], kept: Container[Node] = ()) -> dict[Node, Expression]:
    """From the last calls of expressions to these; where one lies within another, only the outer one counts.

    Args:
        operations: Of each node in the order of execution; None for what is no part of an expression.
        kept: Nodes that somebody reads besides their users.
    """
    search = _Search(operations, kept)
    found: dict[Node, Expression] = {}
    taken: set[Node] = set()
    for node, operation in reversed(list(operations.items())):
        met = None
        if operation is not None and operation.label in _JOINS and node not in taken:
            met = search.ending_in(node, operation)
        if met is not None:
            found[met[0]] = met[1]
            taken |= met[1].inner
    return found


class _Search:
    """Looks for expressions among operations."""

    def __init__(self, operations: Mapping[Node, Operation | None], kept: Container[Node]) -> None:
        self._operations = operations
        self._kept = kept
        self._order = {node: at for at, node in enumerate(operations)}

    def ending_in(self, join: Node, operation: Operation) -> tuple[Node, Expression] | None:
        """The expression that a call makes, alone or with scalings behind it, and the last call of it."""
        met = self._inside(join, operation)
        if met is None:
            return None
        base, parts = met
        inner = frozenset(parts)
        if not any(part.label in BENDING for part in (operation, *parts.values())):
            return None
        overwrites = operation.inplace and operation.reads[0] == base
        kind = _kind(base, [*parts.items(), (join, operation)])
        if kind == EXPRESSION and not overwrites:
            behind: dict[Node, Operation] = {join: operation}
            for node, scaling in self._scalings(join, operation.place):
                behind[node] = scaling
                kind = _kind(base, [*parts.items(), *behind.items()])
                if kind != EXPRESSION:
                    return node, Expression(kind, base, inner | (behind.keys() - {node}), False)
        return join, Expression(kind, base, inner, overwrites)

    def _inside(self, join: Node, operation: Operation) -> tuple[Read, dict[Node, Operation]] | None:
        """The last value that all the operands are made from, and what is done to it until they are."""
        parts: dict[Node, Operation] = {}
        todo = set(operation.reads)
        while len(todo) > 1:
            read = max(todo, key=self._made_at)
            part = self._operations.get(read[0])
            if part is None or part.place != operation.place or read[1] is not None or read[0] in self._kept:
                return None
            todo.remove(read)
            todo |= set(part.reads)
            parts[read[0]] = part
        if not todo or not parts:
            return None
        (base,) = todo
        if any(part.inplace and part.reads[0] == base for part in parts.values()):
            return None  # nothing has what it was any more
        if not all(parts.keys() | {join} >= set(node.users) for node in parts):
            return None
        return base, dict(sorted(parts.items(), key=lambda pair: self._order[pair[0]]))

    def _made_at(self, read: Read) -> int:
        return max(self._order[node] for node in read if node is not None)

    def _scalings(self, node: Node, place: Hashable) -> Iterator[tuple[Node, Operation]]:
        """Products with numbers right behind a call, while nobody else reads what they are made of."""
        while len(node.users) == 1 and node not in self._kept:
            (reader,) = node.users
            operation = self._operations.get(reader)
            if operation is None or operation.label not in _SCALES or operation.place != place:
                return
            if operation.reads != ((node, None),):
                return
            yield reader, operation
            node = reader


def _kind(base: Read, operations: Iterable[tuple[Node, Operation]]) -> str:
    """The function that does the same as operations do one after another."""
    grid = torch.linspace(-8, 8, 129, dtype=torch.float64, device="cpu")
    values: dict[Node, Any] = {base[0]: grid.clone()}
    made: Any = None
    with torch.no_grad():
        for node, operation in operations:
            args, kwargs = map_arg(operation.arguments, values.__getitem__)
            values[node] = made = operation.function(*args, **kwargs)
        return next((kind for kind, function in _KINDS if torch.allclose(made, function(grid), atol=1e-6)), EXPRESSION)
