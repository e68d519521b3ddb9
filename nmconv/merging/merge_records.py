"""A chosen segment as a record: which module takes the merged convolution, and what happens to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from nmconv.finding import Element, ParallelSum, conv_names, elements_to_json, steps_of
from nmconv.merging.nodes import RunNode
from nmconv.merging.partitioning import Segment
from nmconv.merging.report import Merge
from nmconv.planning import ReplacedSum

__all__ = ["any_requires_grad", "merge_of_segment", "norms_after"]


def merge_of_segment(segment: Segment, trainable: bool, live: bool) -> Merge:
    """Return the merge of a segment as plain data.

    Args:
        segment: What is merged.
        trainable: Whether the parameters of the merged convolution require gradients.
        live: Whether its kernel is computed from the factors in each call.
    """
    roles = _Roles(segment.nodes)
    assert roles.head
    return Merge(
        head=roles.head,
        convs=segment.convs,
        geometry=segment.geometry,
        removed=tuple(roles.removed),
        sums=tuple(roles.sums),
        trainable=trainable,
        live=live,
        factors=elements_to_json(node.element for node in segment.nodes) if live else "",
    )


def any_requires_grad(get_module: Callable[[str], nn.Module], names: Iterable[str]) -> bool:
    """Return whether any parameter of these modules requires gradients, without those of their children."""
    modules = map(get_module, names)
    return any(value.requires_grad for module in modules for value in module.parameters(recurse=False))


def norms_after(segment: Segment) -> tuple[str, ...]:
    """Return the norms that the merged convolution's output passes through, in order of execution."""
    return tuple(_Roles(segment.nodes).norms_after)


class _Roles:
    """The roles of a segment's modules and sums.

    Args:
        nodes: The segment's nodes.

    Attributes:
        head: The module whose place the merged convolution takes.
        removed: All other modules that are not identities.
        norms_after: The norms on the path from the head to the output.
        sums: The additions that are removed, innermost first.
    """

    def __init__(self, nodes: Sequence[RunNode]) -> None:
        self.head = ""
        self.removed: list[str] = []
        self.norms_after: list[str] = []
        self.sums: list[ReplacedSum] = []
        self._add(nodes)

    def _add(self, nodes: Sequence[RunNode]) -> None:
        for node in nodes:
            element = node.element
            if isinstance(element, ParallelSum):
                self._add_sum(element, node)
            elif element.kind == "conv" and not self.head:
                self.head = element.name
            elif element.kind != "pass":
                self.removed.append(element.name)
                if element.kind == "norm" and self.head:
                    self.norms_after.append(element.name)

    def _add_sum(self, parallel: ParallelSum, node: RunNode) -> None:
        if self.head:  # the sum reads the merged value: keep the shortest branch, the identity if there is one
            keep = min((0, 1), key=lambda index: len(parallel.branches[index]))
        else:  # the merged value is computed in the first branch with a convolution
            keep = [bool(conv_names(branch)) for branch in parallel.branches].index(True)
        self._add(node.branches[keep])
        dropped = parallel.branches[1 - keep]
        self.removed += [step.name for step in steps_of(dropped) if step.kind != "pass"]
        self.sums += [
            ReplacedSum(inner.owner, inner.label, inner.number, 0) for inner in _sums_in(dropped, parallel.owner)
        ]
        self.sums.append(ReplacedSum(parallel.owner, parallel.label, parallel.number, keep))


def _sums_in(elements: Iterable[Element], owner: str) -> Iterator[ParallelSum]:
    """Yield the sums in a branch that its owner's forward computes, innermost first."""
    for element in elements:
        if isinstance(element, ParallelSum):
            for branch in element.branches:
                yield from _sums_in(branch, owner)
            if element.owner == owner:
                yield element
