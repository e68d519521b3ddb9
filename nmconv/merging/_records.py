"""What could merge and what was merged, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from nmconv.planning import Geometry, Sum

__all__ = ["Guard", "Merge", "Run"]


@dataclass(frozen=True)
class Guard:
    """An argument or a flag that must be as it was when a model was merged.

    Attributes:
        owner: Qualified name of the module whose forward takes or reads it.
        argument: Its name; ``self.scaled`` for a bool, number or text on the module.
        value: What it must be, as JSON: None, text, a number or a truth value.
    """

    owner: str
    argument: str
    value: str


@dataclass(frozen=True)
class Merge:
    """One convolution in the place of several modules. Replayed by :func:`nmconv.load` as it stands.

    Attributes:
        head: Qualified name of the convolution whose place the merged one takes.
        convs: Of all convolutions in it, in order of execution.
        geometry: Of the merged one.
        removed: Qualified names of the other modules, which become identities.
        sums: Additions that go, innermost first.
        trainable: Whether its parameters require gradients.
        live: Whether the factors stay parameters and the kernel is computed from them on the fly.
        factors: Where it is live, what the kernel is computed from, as JSON.
        norm: Qualified name of the norm of the run that stays behind it, or "".
        guards: Arguments and flags by which forwards choose what happens inside the run.
        closed: Methods of the model that read values inside the run, and raise now.
    """

    head: str
    convs: tuple[str, ...]
    geometry: Geometry
    removed: tuple[str, ...]
    sums: tuple[Sum, ...] = ()
    trainable: bool = True
    live: bool = False
    factors: str = ""
    norm: str = ""
    guards: tuple[Guard, ...] = ()
    closed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A linear run, and what merging would make of it.

    Multiply-adds are those of one input (no batch): of ``size`` where the model tells its size or ``example_inputs``
    do, else of an input of 256 along each axis. A convolution whose padding was hoisted counts as it was before.

    Attributes:
        convs: Qualified names of its convolutions, in order of execution.
        norms: Of its norms.
        exact: Whether the whole run is one convolution, equal everywhere and at every size.
        why: Why it is not merged, or not as a whole, or "".
        merges: What the multiply-adds gate would make of it: (its convolutions' names) for each merged one.
        size: Spatial extents of its input.
        multiply_adds: Of the run as it is.
        merged_multiply_adds: With the ``merges`` made.
        parameters: Of the run as it is, norms' included.
        merged_parameters: With the ``merges`` made.
    """

    convs: tuple[str, ...]
    norms: tuple[str, ...]
    exact: bool
    why: str
    merges: tuple[tuple[str, ...], ...]
    size: tuple[int, ...]
    multiply_adds: int
    merged_multiply_adds: int
    parameters: int
    merged_parameters: int

    @property
    def gain(self) -> float:
        """Multiply-adds before over after: what predicts the speed-up (docs/merging.md)."""
        return self.multiply_adds / self.merged_multiply_adds
