"""Cut linear runs into blocks, with the droppable activations inside and between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nmconv.finding import DefUse, Element, ParallelSum, conv_names
from nmconv.merging import RunNode, nodes_of
from nmconv.planning import Site

__all__ = ["Block", "BlockFinder"]

_UNKNOWN_SIZES = (256, 256)  # spatial sizes of a run's input where they cannot be known


@dataclass(frozen=True, eq=False)
class Block:
    """One convolution, or one sum of branches, with its norms, and the activation after it.

    Attributes:
        nodes: The elements of a run, with their geometries.
        inner: Ids of the activations inside its branches, and between its convolution and its norms.
        after: Id of the activation between this block and the next of its run, or "".
        cut: If an activation precedes its norms: the part before that activation, which is what a segment that ends
            with this block contains of it; else None.
    """

    nodes: tuple[RunNode, ...]
    inner: tuple[str, ...]
    after: str
    cut: Block | None = None

    @property
    def elements(self) -> tuple[Element, ...]:
        """Its elements of the run."""
        return tuple(node.element for node in self.nodes)

    @property
    def convs(self) -> tuple[str, ...]:
        """Qualified names of its convolutions, in order."""
        return conv_names(self.elements)


class BlockFinder:
    """Finds the blocks of linear runs.

    Args:
        linear: The model's modules with all droppable activations dropped.
        uses: The original model's data flow.
        sites: The original model's sites, by their calls.
    """

    def __init__(self, linear: nn.Module, uses: DefUse, sites: Mapping[Any, Site]) -> None:
        self._linear = linear
        self._uses = uses
        self._sites = sites
        self._blocks: dict[tuple[str, ...], Block] = {}

    def block_lists(self, elements: tuple[Element, ...], sizes: tuple[int, ...]) -> Iterator[list[Block]]:
        """Yield the consecutive blocks of a run, then those of its branches.

        Args:
            elements: The run.
            sizes: Spatial sizes of its input; () where unknown.
        """
        nodes = nodes_of(self._linear.get_submodule, elements, None, sizes or _UNKNOWN_SIZES)
        for blocks in self._lists_of_nodes(nodes):
            self._blocks.update({block.convs: block for block in blocks})
            yield blocks

    def block_of(self, conv: str) -> Block | None:
        """Return the block found for a single convolution, or None."""
        return self._blocks.get((conv,))

    def droppable_after(self, element: Element) -> Site | None:
        """Return the droppable activation directly after an element, or None."""
        for use in self._uses.uses_after(element):
            site = self._sites.get(use.act) if use.kind == "act" else None
            return site if site is not None and site.action == "keep" and not site.locked else None
        return None

    def _lists_of_nodes(self, nodes: tuple[RunNode, ...]) -> Iterator[list[Block]]:
        blocks: list[Block] = []
        pending: list[RunNode] = []
        for node in nodes:
            if node.convs and any(other.convs for other in pending):
                blocks.append(self._block(pending))
                pending = []
            if isinstance(node.element, ParallelSum) and not self._contains_all_activations(node.element):
                yield blocks
                blocks, pending = [], []
                continue
            if node.convs or pending:  # what precedes the first convolution stays as it is
                pending.append(node)
        if pending:
            blocks.append(self._block(pending))
        yield blocks
        for node in nodes:
            for branch in node.branches:
                yield from self._lists_of_nodes(branch)

    def _contains_all_activations(self, parallel: ParallelSum) -> bool:
        """Return whether every activation in a sum's branches follows one of their elements.

        False if a branch begins with an activation: no element of the run precedes it.
        """
        try:
            acts = self._uses.activations_in(parallel)
        except KeyError:
            return False
        return {site.id for act in acts if (site := self._sites.get(act))} <= set(self._inside(parallel))

    def _block(self, nodes: list[RunNode]) -> Block:
        while nodes[-1].element.is_identity:
            nodes = nodes[:-1]
        inner = [site for node in nodes if isinstance(node.element, ParallelSum) for site in self._inside(node.element)]
        cut: Block | None = None
        for at, node in enumerate(nodes[:-1]):
            after = "" if node.element.is_identity else self._id_after(node.element)
            if after:
                cut = cut or Block(tuple(nodes[: at + 1]), tuple(inner), after)
                inner.append(after)
        return Block(tuple(nodes), tuple(inner), self._id_after(nodes[-1].element), cut)

    def _inside(self, parallel: ParallelSum) -> Iterator[str]:
        for branch in parallel.branches:
            for element in branch:
                if isinstance(element, ParallelSum):
                    yield from self._inside(element)
                if not element.is_identity:
                    after = self._id_after(element)
                    if after:
                        yield after

    def _id_after(self, element: Element) -> str:
        site = self.droppable_after(element)
        return "" if site is None else site.id
