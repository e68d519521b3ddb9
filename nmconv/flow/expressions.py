"""Activations written out as expressions in one value, such as ``x * torch.sigmoid(x)``."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from nmconv.flow.ops import AFFINE, NONLINEAR, is_inplace
from nmconv.flow.probed_modules import is_plain
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

EXPRESSION = "expression"  # the kind of an expression that equals no known activation


@dataclass(frozen=True, eq=False)
class Expression:
    """One activation that is written out.

    Attributes:
        kind: The known function that it equals, or :data:`EXPRESSION`.
        base: The value that it is computed from.
        inner: The calls between that value and the result; nothing else reads what they return.
        overwrites: Whether the result is written to the memory of ``base``.
    """

    kind: str
    base: Read
    inner: frozenset[Node]
    overwrites: bool


@dataclass(frozen=True, eq=False)
class Operation:
    """An elementwise operation on one or several values.

    Attributes:
        label: The name of the function.
        scope: The frame, method and context of the call; all operations of an expression have the same.
        reads: The values.
        function: The function itself.
        arguments: Its positional and keyword arguments, with nodes in place of tensors.
        inplace: Whether it overwrites the first value.
    """

    label: str
    scope: Hashable
    reads: tuple[Read, ...]
    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    inplace: bool


# The calls that may end an expression: they combine two values.
_JOINS = frozenset(("mul", "mul_", "multiply", "div", "div_", "divide", "maximum", "minimum"))
_SCALINGS = frozenset(("mul", "mul_", "div", "div_"))
# The calls inside an expression. "clone" and "contiguous" may share memory with their operand.
_INNER = (AFFINE | NONLINEAR | _JOINS | {"rdiv"}) - {"clone", "contiguous"}
_KINDS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("silu", F.silu),
    ("hardswish", F.hardswish),
    ("mish", F.mish),
    ("gelu", F.gelu),
    ("gelu", lambda x: F.gelu(x, approximate="tanh")),
)
# Parameterless modules with default settings, by what a recording stores as a module's settings.
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
_INPLACE = "inplace=True"  # the ``repr`` of their in-place variants


def expressions_of(recording: Recording) -> dict[Node, Expression]:
    """Return the expressions in a recording, by their last calls."""
    stored = {node for node, _ in recording.stored.values()}
    return expressions_in({node: _operation(node, fact) for node, fact in recording.facts.items()}, stored)


def expressions_in(operations: Mapping[Node, Operation | None], kept: Container[Node] = ()) -> dict[Node, Expression]:
    """Return the expressions among operations, by their last calls; of nested ones, only the outermost.

    Args:
        operations: For each node, in the order of execution, its operation; None for nodes that cannot be part of an
            expression.
        kept: Nodes that are read by something besides their users.
    """
    search = _Search(operations, kept)
    expressions: dict[Node, Expression] = {}
    covered: set[Node] = set()
    for node, operation in reversed(list(operations.items())):
        match = None
        if operation is not None and operation.label in _JOINS and node not in covered:
            match = search.ending_in(node, operation)
        if match is not None:
            last, expression = match
            expressions[last] = expression
            covered |= expression.inner
    return expressions


def is_elementwise(label: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of a function may be part of an expression."""
    return label in _INNER and "out" not in kwargs and is_plain((args, tuple(kwargs.values())))


def operation_of_module(
    node: Node, settings: tuple[str, ...], scope: Hashable, reads: tuple[Read, ...]
) -> Operation | None:
    """Return the operation of a call of a module, by its class and its ``repr``; None for unknown modules."""
    inplace = settings[-1:] == (_INPLACE,)
    known = _MODULES.get((*settings[:2], "") if inplace else settings)
    if known is None:
        return None
    label, function = known
    return Operation(label, scope, reads, function, (node.args, {}), inplace)


def _operation(node: Node, fact: Fact) -> Operation | None:
    scope = (fact.frame, fact.method, fact.context)
    if node.op == "call_module":
        return operation_of_module(node, fact.settings, scope, fact.reads)
    if node.op != "call_function" or not is_elementwise(fact.label, node.args, node.kwargs):
        return None
    inplace = is_inplace(node, None, fact.label)
    target: Any = node.target
    return Operation(fact.label, scope, fact.reads, target, (node.args, node.kwargs), inplace)


class _Search:
    """Searches operations for expressions."""

    def __init__(self, operations: Mapping[Node, Operation | None], kept: Container[Node]) -> None:
        self._operations = operations
        self._kept = kept
        self._order = {node: position for position, node in enumerate(operations)}

    def ending_in(self, join: Node, operation: Operation) -> tuple[Node, Expression] | None:
        """Return the expression that ends in a call, or in a scaling of its result, and its last call."""
        body = self._body(join, operation)
        if body is None:
            return None
        base, parts = body
        if not any(part.label in NONLINEAR for part in (operation, *parts.values())):
            return None
        inner = frozenset(parts)
        overwrites = operation.inplace and operation.reads[0] == base
        kind = _kind(base, [*parts.items(), (join, operation)])
        if kind == EXPRESSION and not overwrites:
            tail: dict[Node, Operation] = {join: operation}
            for node, scaling in self._scalings(join, operation.scope):
                tail[node] = scaling
                kind = _kind(base, [*parts.items(), *tail.items()])
                if kind != EXPRESSION:
                    return node, Expression(kind, base, inner | (tail.keys() - {node}), False)
        return join, Expression(kind, base, inner, overwrites)

    def _body(self, join: Node, operation: Operation) -> tuple[Read, dict[Node, Operation]] | None:
        """Return the last value that all operands are computed from, and the operations in between, in order."""
        parts: dict[Node, Operation] = {}
        todo = set(operation.reads)
        while len(todo) > 1:
            read = max(todo, key=self._position)
            part = self._operations.get(read[0])
            if part is None or part.scope != operation.scope or read[1] is not None or read[0] in self._kept:
                return None
            todo.remove(read)
            todo |= set(part.reads)
            parts[read[0]] = part
        if not todo or not parts:
            return None
        (base,) = todo
        if any(part.inplace and part.reads[0] == base for part in parts.values()):
            return None  # the base's value is lost
        if not all(parts.keys() | {join} >= set(node.users) for node in parts):
            return None
        return base, dict(sorted(parts.items(), key=lambda pair: self._order[pair[0]]))

    def _position(self, read: Read) -> int:
        return max(self._order[node] for node in read if node is not None)

    def _scalings(self, node: Node, scope: Hashable) -> Iterator[tuple[Node, Operation]]:
        """Yield the products with constants that follow a call, as long as each is the only reader of the last."""
        while len(node.users) == 1 and node not in self._kept:
            (reader,) = node.users
            operation = self._operations.get(reader)
            if operation is None or operation.label not in _SCALINGS or operation.scope != scope:
                return
            if operation.reads != ((node, None),):
                return
            yield reader, operation
            node = reader


def _kind(base: Read, operations: Iterable[tuple[Node, Operation]]) -> str:
    """Return the known function that a sequence of operations equals, by evaluating both on a grid."""
    grid = torch.linspace(-8, 8, 129, dtype=torch.float64, device="cpu")
    values: dict[Node, Any] = {base[0]: grid.clone()}
    result: Any = None
    with torch.no_grad():
        for node, operation in operations:
            args, kwargs = map_arg(operation.arguments, values.__getitem__)
            values[node] = result = operation.function(*args, **kwargs)
        return next(
            (kind for kind, function in _KINDS if torch.allclose(result, function(grid), atol=1e-6)), EXPRESSION
        )
