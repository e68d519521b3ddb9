"""What a plan holds besides sites: hoisted padding, kernels, removed residual branches, and totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Branch", "Counts", "Hoist", "Kernel", "ReplacedSum", "check_branches", "check_kernels", "is_kernel_size"]


@dataclass(frozen=True)
class Hoist:
    """A linear run whose padding moves to its first convolution.

    Attributes:
        convs: Qualified names of its convolutions, in order.
        why: Why the padding cannot move, or "".
    """

    convs: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class Kernel:
    """Consecutive convolutions that :func:`nmconv.fit` replaces by one, with all activations between them dropped.

    A plan with kernels leaves the convolutions in the model; only ``fit`` replaces them.

    Attributes:
        convs: Qualified names of the convolutions, in order of execution.
        size: Kernel size of the one that replaces them: ``"exact"`` for the size that merging gives, a smaller one
            (``"3"`` or ``"3x1"``), or ``"auto"``.
        dense: Whether it has no groups even if the exact merge has some.
    """

    convs: tuple[str, ...]
    size: str = "exact"
    dense: bool = False


@dataclass(frozen=True)
class ReplacedSum:
    """An addition that is replaced by one of its operands.

    Attributes:
        owner: Qualified name of the module whose forward adds.
        label: The addition's label in that forward.
        number: Which call of that label it is, from 1.
        keep: Position of the operand that stays, 0 or 1.
    """

    owner: str
    label: str
    number: int
    keep: int


@dataclass(frozen=True)
class Branch:
    """A residual branch that is no longer computed; its modules and parameters stay in the model, unused.

    Attributes:
        sum: The addition that ends it.
        convs: Qualified names of its convolutions.
    """

    sum: ReplacedSum
    convs: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """Totals in eval mode.

    Attributes:
        convs: Convolutions on the main path, parallel ones counted once.
        activations_before: Sites of the original model.
        activations_after: Sites of the converted model.
        ratio_asked: The ratio asked for, as text.
        ratio_reached: Convolutions to activations after, as text.
    """

    convs: int
    activations_before: int
    activations_after: int
    ratio_asked: str
    ratio_reached: str


def check_kernels(kernels: Sequence[Kernel]) -> None:
    """Raise ValueError if a plan cannot have these kernels."""
    all_convs = [conv for kernel in kernels for conv in kernel.convs]
    for kernel in kernels:
        if not is_kernel_size(kernel.size):
            raise ValueError(f"a kernel of size {kernel.size!r}: give 'exact', 'auto', a number such as 3, or '3x1'")
        if not kernel.convs or any(all_convs.count(conv) > 1 for conv in kernel.convs):
            raise ValueError(f"a kernel for {', '.join(kernel.convs) or 'nothing'}: name each convolution once")


def is_kernel_size(size: str) -> bool:
    """Return whether ``size`` is ``"exact"``, ``"auto"``, a number such as ``"3"``, or numbers such as ``"3x1"``."""
    extents = size.split("x")
    return size in ("exact", "auto") or all(
        extent.isascii() and extent.isdecimal() and extent.strip("0") for extent in extents
    )


def check_branches(branches: Sequence[Branch]) -> None:
    """Raise ValueError if a plan cannot have these branches."""
    for branch in branches:
        if branch.sum.keep not in (0, 1) or branch.sum.number < 1:
            raise ValueError(
                f"{branch.sum.owner}: operand {branch.sum.keep} of sum {branch.sum.number}: operands are 0 and 1, and "
                "sums are counted from 1"
            )
