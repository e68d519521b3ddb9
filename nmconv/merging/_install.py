"""Putting merged convolutions into a model: everything prepared first, then put in place in one go, or undone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from nmconv.errors import RewriteError
from nmconv.graph import Element, Join, is_norm_act, steps_of
from nmconv.merging._brackets import Node, Segment
from nmconv.merging._records import Merge, Sum
from nmconv.surgery import Edit, rewrite, rewritten

__all__ = ["MERGES", "AfterNorm", "Undo", "check_calls", "install", "record", "write_methods"]

MERGES = "_nmconv_merges"
Undo = list[Callable[[], object]]
Methods = Mapping[str, Any]


class AfterNorm(nn.Module):
    """What is left of timm's norm + act when the norm is folded away: ``drop``, then ``act``."""

    def __init__(self, norm_act: Any) -> None:
        super().__init__()
        self.drop = norm_act.drop if isinstance(getattr(norm_act, "drop", None), nn.Module) else nn.Identity()
        self.act = norm_act.act
        self.training = norm_act.training

    def forward(self, x: Any) -> Any:
        """The activation of ``x``, any shape."""
        return self.act(self.drop(x))


def record(segment: Segment, trainable: bool) -> Merge:
    """The segment as plain data."""
    state = _Places()
    state.walk(segment.nodes)
    assert state.head
    return Merge(state.head, segment.convs, segment.geometry, tuple(state.removed), tuple(state.sums), trainable)


class _Places:
    """Which module takes the merged convolution, and what happens to the others."""

    def __init__(self) -> None:
        self.head = ""
        self.removed: list[str] = []
        self.sums: list[Sum] = []

    def walk(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            element = node.element
            if isinstance(element, Join):
                self._join(element, node)
            elif element.kind == "conv" and not self.head:
                self.head = element.name
            elif element.kind != "pass":
                self.removed.append(element.name)

    def _join(self, join: Join, node: Node) -> None:
        has_conv = [any(step.kind == "conv" for step in steps_of(branch)) for branch in join.branches]
        if self.head:  # the value is there already: the shortest way through, the identity where there is one
            keep = min((0, 1), key=lambda at: len(join.branches[at]))
        else:
            keep = has_conv.index(True)
        self.walk(node.branches[keep])
        self.removed += [step.name for step in steps_of(join.branches[1 - keep]) if step.kind != "pass"]
        self.sums.append(Sum(join.owner, join.takes, join.label, join.number, keep))


def write_methods(model: nn.Module, merges: Sequence[Merge]) -> tuple[dict[str, Any], dict[str, RewriteError]]:
    """The forwards that the merges' additions are taken out of, by owner; and why others cannot be written."""
    edits: dict[str, Edit] = {}
    for merge in merges:
        for addition in merge.sums:
            edit = edits.setdefault(addition.owner, Edit(addition.takes))
            edit.sums.append((addition.label, addition.number, addition.keep))
    made: dict[str, Any] = {}
    failed: dict[str, RewriteError] = {}
    for owner, edit in edits.items():
        try:
            made[owner] = rewrite(model, owner, "forward", edit, ())
        except RewriteError as error:
            failed[owner] = error
    return made, failed


def install(
    model: nn.Module, merges: Sequence[Merge], convs: Mapping[str, nn.Module], methods: Methods, undo: Undo
) -> None:
    """Make the changes; each appends to ``undo`` what takes it back.

    Args:
        model: Changed.
        merges: What to do.
        convs: The merged convolutions by :attr:`Merge.head`.
        methods: From :func:`write_methods`.
        undo: To be run backwards if something fails.
    """
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            slots.setdefault(id(child), []).append((parent, name))
    for merge in merges:
        changes = {name: _left_of(model.get_submodule(name)) for name in merge.removed}
        changes[merge.head] = convs[merge.head]
        for name, module in changes.items():
            for parent, slot in slots[id(model.get_submodule(name))]:
                undo.append(_restoring(parent, slot))
                parent._modules[slot] = module
    for owner, method in methods.items():
        module = model.get_submodule(owner)
        cls = rewritten(type(module), (method,))
        undo.append(_restoring_class(module))
        module.__class__ = cls
    undo.append(_restoring_mark(model))
    model.__dict__[MERGES] = (*model.__dict__.get(MERGES, ()), tuple(merges))


def _left_of(module: nn.Module) -> nn.Module:
    """What stays of a module that is folded away."""
    if is_norm_act(module):
        left = AfterNorm(module)
        if not (isinstance(left.act, nn.Identity) and isinstance(left.drop, nn.Identity)):
            return left
    identity = nn.Identity()
    identity.training = module.training
    return identity


def _restoring(parent: nn.Module, slot: str) -> Callable[[], object]:
    before = parent._modules[slot]
    return lambda: parent._modules.__setitem__(slot, before)


def _restoring_class(module: nn.Module) -> Callable[[], object]:
    before = type(module)
    return lambda: object.__setattr__(module, "__class__", before)


def _restoring_mark(model: nn.Module) -> Callable[[], object]:
    before = copy.copy(model.__dict__.get(MERGES))
    return lambda: model.__dict__.pop(MERGES, None) if before is None else model.__dict__.__setitem__(MERGES, before)


def check_calls(before: Counter[str], after: Counter[str], segments: Sequence[Segment]) -> None:
    """Hold the calls of the merged model, traced anew, against those of the original.

    Args:
        before: From :func:`nmconv.graph.calls_by_kind`.
        after: The same of the result.
        segments: What was merged.

    Raises:
        RewriteError: If a call is still made that was merged away, or another one is not made any more.
    """
    expected = Counter(before)
    for segment in segments:
        expected.subtract(_gone(node.element for node in segment.nodes))
        expected[record(segment, False).head] += 1
    expected = +expected
    if expected != after:
        wrong = sorted(name for name in expected.keys() | after.keys() if expected[name] != after[name])
        raise RewriteError(
            f"after merging these are not called as they should be: {', '.join(wrong[:5])}; the model is as it was: "
            "its forward reaches modules by a way that tracing does not see"
        )


def _gone(elements: Iterable[Element]) -> Iterator[str]:
    """All calls in the elements, as :func:`nmconv.graph.calls_by_kind` names them."""
    for element in elements:
        if isinstance(element, Join):
            for branch in element.branches:
                yield from _gone(branch)
            yield f"{element.owner}:{element.label}"
        elif element.kind != "pass":
            yield element.name
