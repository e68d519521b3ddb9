"""Putting merged convolutions into a working copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from nmconv.algebra import Refusal, affine_in_double, filled, is_channels_last, laid_out, like_of
from nmconv.errors import RewriteError
from nmconv.finding import Element, Join, elements_from, steps_of, text_of
from nmconv.flow import THROUGH, is_norm_act
from nmconv.merging.call_guards import guard
from nmconv.merging.folded_norms import AfterNorm, FoldedDropout, FoldedNorm, Told, folded_kind, told_of
from nmconv.merging.live_kernels import LIVE, go_live
from nmconv.merging.partitioning import Node, Segment, geometry_of_nodes, nodes_of
from nmconv.merging.report import Merge, get_merges
from nmconv.planning import Sum
from nmconv.surgery import MERGED, Edit, rewrite, rewritten

__all__ = ["bake", "install", "norms_behind", "record", "trains", "write_methods"]

Methods = Mapping[str, Any]
Slots = dict[int, list[tuple[nn.Module, str]]]


def record(segment: Segment, trainable: bool, live: bool) -> Merge:
    """The segment as plain data."""
    state = _Places()
    state.walk(segment.nodes)
    assert state.head
    return Merge(
        head=state.head,
        convs=segment.convs,
        geometry=segment.geometry,
        removed=tuple(state.removed),
        sums=tuple(state.sums),
        trainable=trainable,
        live=live,
        factors=text_of(node.element for node in segment.nodes) if live else "",
    )


def trains(named: Callable[[str], nn.Module], names: Iterable[str]) -> bool:
    """Whether any parameter of these modules requires gradients: whether those of what replaces them are to."""
    parts = map(named, names)
    return any(value.requires_grad for part in parts for value in part.parameters(recurse=False))


def norms_behind(segment: Segment) -> tuple[str, ...]:
    """The norms that the merged convolution's output passes through on its way out, in order of execution."""
    state = _Places()
    state.walk(segment.nodes)
    return tuple(state.behind)


class _Places:
    """Which module takes the merged convolution, and what happens to the others."""

    def __init__(self) -> None:
        self.head = ""
        self.removed: list[str] = []
        self.behind: list[str] = []
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
                if element.kind == "norm" and self.head:
                    self.behind.append(element.name)

    def _join(self, join: Join, node: Node) -> None:
        has_conv = [any(step.kind == "conv" for step in steps_of(branch)) for branch in join.branches]
        if self.head:  # the value is there already: the shortest way through, the identity where there is one
            keep = min((0, 1), key=lambda at: len(join.branches[at]))
        else:
            keep = has_conv.index(True)
        self.walk(node.branches[keep])
        gone = join.branches[1 - keep]
        self.removed += [step.name for step in steps_of(gone) if step.kind != "pass"]
        self.sums += [Sum(inner.owner, inner.label, inner.number, 0) for inner in _sums_in(gone, join.owner)]
        self.sums.append(Sum(join.owner, join.label, join.number, keep))


def _sums_in(elements: Iterable[Element], owner: str) -> Iterator[Join]:
    """The sums that one forward makes for a branch, innermost first."""
    for element in elements:
        if isinstance(element, Join):
            for branch in element.branches:
                yield from _sums_in(branch, owner)
            if element.owner == owner:
                yield element


def write_methods(
    model: nn.Module, merges: Sequence[Merge], takes: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, RewriteError]]:
    """The forwards that the merges' additions are taken out of, by owner; and why others cannot be written.

    Args:
        model: Read only.
        merges: Of it.
        takes: Of each such owner, the structure of its forward's arguments.
    """
    edits: dict[tuple[str, str], Edit] = {}
    for merge in merges:
        for addition in merge.sums:
            edit = edits.setdefault((addition.owner, "forward"), Edit(takes.get(addition.owner, "")))
            edit.sums.append(addition)
    made: dict[str, Any] = {}
    failed: dict[str, RewriteError] = {}
    for (owner, _), written in rewrite(model, edits, ()).items():
        if isinstance(written, RewriteError):
            failed[owner] = written
        else:
            made[owner] = written
    return made, failed


def install(model: nn.Module, merges: Sequence[Merge], convs: Mapping[str, nn.Module], methods: Methods) -> None:
    """Make the changes.

    Args:
        model: Changed.
        merges: What to do.
        convs: The merged convolutions by :attr:`Merge.head`; none for live ones.
        methods: From :func:`write_methods`.
    """
    slots = _slots(model)
    told = told_of(model)
    for merge in merges:
        if merge.live:
            nodes = nodes_of_merge(model, merge)
            go_live(model, merge.head, merge.removed, nodes, merge.geometry, told)
            continue
        changes = {name: _left_of(model.get_submodule(name), told, bool(merge.norm)) for name in merge.removed}
        _put(model, slots, {**changes, merge.head: convs[merge.head]})
    for owner, method in methods.items():
        module = model.get_submodule(owner)
        module.__class__ = rewritten(type(module), (method,))
    rounds = (*get_merges(model), tuple(merges))
    guard(model, (merge for round in rounds for merge in round), methods)
    model.__dict__[MERGED] = rounds


def bake(model: nn.Module) -> None:
    """Put plain convolutions in the place of live ones, as if they had been merged so at once."""
    rounds = get_merges(model)
    if not any(merge.live for merges in rounds for merge in merges):
        return
    slots, last = _slots(model), is_channels_last(model)
    told = told_of(model)
    for merge in (merge for merges in rounds for merge in merges if merge.live):
        head: Any = model.get_submodule(merge.head)
        conv = laid_out(filled(head.__dict__[LIVE].affine(affine_in_double), like_of(head), merge.trainable), last)
        _put(model, slots, {name: _left_of(model.get_submodule(name), told, False) for name in merge.removed})
        _put(model, slots, {merge.head: conv})
    model.__dict__[MERGED] = tuple(
        tuple(replace(merge, live=False, factors="") for merge in merges) for merges in rounds
    )


def _slots(model: nn.Module) -> Slots:
    """From every module's id to where it is registered."""
    slots: Slots = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            slots.setdefault(id(child), []).append((parent, name))
    return slots


def _put(model: nn.Module, slots: Slots, changes: Mapping[str, nn.Module]) -> None:
    for name, module in changes.items():
        for parent, slot in slots[id(model.get_submodule(name))]:
            parent._modules[slot] = module


def nodes_of_merge(model: nn.Module, merge: Merge) -> tuple[Node, ...]:
    """What a live merge computes its kernel from, read off the model.

    Raises:
        ValueError: If the model's modules do not make the convolution that the merge says.
    """
    elements = elements_from(merge.factors)
    sizes = tuple(max(extent, 1) for extent in merge.geometry.extent)
    nodes = nodes_of(
        model.get_submodule, elements, merge.geometry.in_channels, sizes, lambda name, geometry: geometry, {}
    )
    try:
        found = geometry_of_nodes(nodes, merge.geometry.in_channels, merge.geometry.rank)
    except Refusal as refusal:
        raise ValueError(f"{merge.head}: {refusal}") from refusal
    if found != merge.geometry:
        raise ValueError(f"{merge.head}: its factors make another convolution than the one described")
    return nodes


def _left_of(module: nn.Module, told: Told, keeps_norm: bool) -> nn.Module:
    """What stays of a module that is folded away; where a norm stays behind the convolution there is one to train."""
    left: nn.Module = nn.Identity()
    of_norms = Told(norm=True) if keeps_norm else told
    kind = folded_kind(module)
    if is_norm_act(module) or module.__dict__.get(THROUGH) == "act":
        after = AfterNorm(module, of_norms)
        plain = isinstance(after.act, nn.Identity) and isinstance(after.drop, nn.Identity)
        left = FoldedNorm(of_norms) if plain else after
    elif kind:
        left = FoldedNorm(of_norms) if kind == "norm" else FoldedDropout(told)
    left.training = module.training
    return left
