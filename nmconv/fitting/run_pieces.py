"""Cut linear runs into the pieces that are fitted one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nmconv.finding import DefUse, Element, ParallelSum, conv_names, without_trailing_identities
from nmconv.planning import Kernel

__all__ = ["pieces_of", "without_last_sum"]

Piece = tuple[tuple[Element, ...], Kernel | None]


def pieces_of(
    elements: tuple[Element, ...], kernels: Mapping[tuple[str, ...], Kernel], reference_uses: DefUse
) -> Iterator[Piece]:
    """Cut a run where named kernels begin and end, and where the reference has no activation either.

    The more places have a target in the reference, the less error each fit has to compensate for.

    Args:
        elements: The run, its sums numbered as in the reference.
        kernels: The plan's kernels, by their convolutions.
        reference_uses: The reference's data flow.
    """
    blocks = list(_blocks(elements))
    pending: list[Element] = []
    at = 0
    while at < len(blocks):
        end = _end_of_kernel(blocks, at, kernels)
        branches = [] if end else _branches_with_kernels(blocks[at], kernels)
        if end:
            yield from _trimmed(pending, None)
            pending = []
            covered = [element for block in blocks[at:end] for element in block]
            yield from _trimmed(covered, kernels[conv_names(covered)])
            at = end
            continue
        if branches:
            yield from _trimmed(pending, None)
            pending = []
            for branch in branches:
                yield from pieces_of(branch, kernels, reference_uses)
        else:
            pending += blocks[at]
            if not _precedes_activation(pending, reference_uses):
                yield from _trimmed(pending, None)
                pending = []
        at += 1
    yield from _trimmed(pending, None)


def without_last_sum(elements: tuple[Element, ...]) -> tuple[Element, ...]:
    """Replace a final sum of which only one branch has convolutions by that branch."""
    while isinstance(elements[-1], ParallelSum):
        branches = [branch for branch in elements[-1].branches if conv_names(branch)]
        if len(branches) != 1:
            return elements
        elements = tuple(without_trailing_identities((*elements[:-1], *branches[0])))
    return elements


def _blocks(elements: tuple[Element, ...]) -> Iterator[list[Element]]:
    """Yield each convolution or sum with the norms and other steps after it."""
    block: list[Element] = []
    for element in elements:
        if conv_names([element]) and conv_names(block):
            yield block
            block = []
        block.append(element)
    yield block


def _end_of_kernel(blocks: list[list[Element]], start: int, kernels: Mapping[tuple[str, ...], Kernel]) -> int | None:
    """Return the end of the blocks, from ``start`` on, for which a kernel is named, or None."""
    convs: tuple[str, ...] = ()
    for end in range(start, len(blocks)):
        convs += conv_names(blocks[end])
        if convs in kernels:
            return end + 1
    return None


def _branches_with_kernels(
    block: list[Element], kernels: Mapping[tuple[str, ...], Kernel]
) -> list[tuple[Element, ...]]:
    """Return the branches of the block's sums if a kernel is named for a part of one."""
    branches = [branch for element in block if isinstance(element, ParallelSum) for branch in element.branches]
    named = any(set(convs) <= set(conv_names(branch)) for convs in kernels for branch in branches)
    return branches if named else []


def _precedes_activation(elements: list[Element], reference_uses: DefUse) -> bool:
    """Return whether the reference has an activation in or after the last block, possibly after sums."""
    *_, block = _blocks(tuple(elements))
    try:
        return any(
            use.kind == "act"
            for element in block
            if not element.is_identity
            for use in reference_uses.uses_after(element)
        )
    except KeyError:
        return True


def _trimmed(elements: list[Element], kernel: Kernel | None) -> Iterator[Piece]:
    """Yield the piece from its first convolution on, without trailing identities and dropout, if anything is left."""
    while elements and not conv_names(elements[:1]):
        elements = elements[1:]
    kept = tuple(without_trailing_identities(elements))
    if kept:
        yield kept, kernel
