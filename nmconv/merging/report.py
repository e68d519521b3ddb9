"""What was merged and what could be merged, as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from nmconv.algebra import Geometry, Refusal
from nmconv.errors import ModelTypeError
from nmconv.finding import conv_names, steps_of
from nmconv.merging.nodes import RunNode, geometry_of_nodes
from nmconv.merging.partitioning import Price, Segment, partition
from nmconv.planning import ReplacedSum
from nmconv.surgery import MERGED

__all__ = ["Guard", "Merge", "Run", "describe_run", "get_merges", "parameters_of"]


@dataclass(frozen=True)
class Guard:
    """An argument or attribute that must keep the value it had when the model was merged.

    Attributes:
        owner: Qualified name of the module whose forward takes the argument or reads the attribute.
        argument: Name of the argument; ``self.scaled`` for an attribute ``scaled`` (bool, number or text).
        value: The value as JSON: null, text, a number or a bool.
    """

    owner: str
    argument: str
    value: str


@dataclass(frozen=True)
class Merge:
    """One convolution in place of several modules. :func:`nmconv.load` replays it as it is.

    Attributes:
        head: Qualified name of the convolution whose place the merged one takes.
        convs: Qualified names of all merged convolutions, in order of execution.
        geometry: Geometry of the merged convolution.
        removed: Qualified names of the other modules, which become identities.
        sums: Additions that are removed from forwards, innermost first.
        trainable: Whether the parameters of the merged convolution require gradients.
        live: Whether the factors stay parameters and the kernel is computed from them in each call.
        factors: For a live merge the factors that the kernel is computed from, as JSON.
        norm: Qualified name of the norm of the run that stays after the merged convolution, or "".
        guards: Arguments and attributes by which forwards choose what happens inside the run.
        closed: Methods of the model that read values inside the run and now raise.
    """

    head: str
    convs: tuple[str, ...]
    geometry: Geometry
    removed: tuple[str, ...]
    sums: tuple[ReplacedSum, ...] = ()
    trainable: bool = True
    live: bool = False
    factors: str = ""
    norm: str = ""
    guards: tuple[Guard, ...] = ()
    closed: tuple[str, ...] = ()

    def __str__(self) -> str:
        live = ", live" if self.live else ""
        return f"{self.head}: one convolution{live} for {', '.join(self.convs)}"


@dataclass(frozen=True)
class Run:
    """A linear run, and what merging would make of it.

    Multiply-adds are those of one input without a batch, of spatial extents ``size`` (256 along each axis where neither
    the model nor ``example_inputs`` determine them). A convolution whose padding was hoisted counts as before.

    Attributes:
        convs: Qualified names of its convolutions, in order of execution.
        norms: Qualified names of its norms, in order of execution.
        exact: Whether the whole run is one convolution, equal everywhere and at every input size.
        why: Why it is not merged, or not as a whole, or "".
        merges: What the multiply-adds gate would merge: the names of the convolutions of each merged one.
        size: Spatial extents of its input.
        multiply_adds: Multiply-adds of the run as it is.
        merged_multiply_adds: Multiply-adds with ``merges`` carried out.
        parameters: Number of parameters of the run as it is, those of norms included.
        merged_parameters: Number of parameters with ``merges`` carried out.
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
        """Multiply-adds before over after, which predicts the speed-up (docs/merging.md)."""
        return self.multiply_adds / self.merged_multiply_adds

    def __str__(self) -> str:
        merged = "; ".join(" + ".join(convs) for convs in self.merges)
        what = f"merges {merged}, gain {self.gain:.2f}" if merged else "merges nothing"
        return f"{', '.join(self.convs)}: {what}" + (f" ({self.why})" if self.why else "")


def get_merges(model: nn.Module) -> tuple[tuple[Merge, ...], ...]:
    """Return what was merged in a model.

    Args:
        model: Any module.

    Returns:
        One tuple for each call of :func:`nmconv.merge` or :func:`nmconv.fold_norms`, in order. A convolution that
        absorbed a norm is a merge of a single convolution. Empty for a model in which nothing was merged.

    Raises:
        ModelTypeError: If ``model`` is not an ``nn.Module``.

    Example:
        >>> import torch.nn as nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)).eval()
        >>> ((merge,),) = nmconv.get_merges(nmconv.merge(model))
        >>> merge.convs, merge.geometry.kernel
        (('0', '1'), (3, 3))
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"{type(model).__name__} is no nn.Module: give the model itself")
    rounds: tuple[tuple[Merge, ...], ...] = model.__dict__.get(MERGED, ())
    return rounds


def describe_run(get_module: Callable[[str], nn.Module], nodes: tuple[RunNode, ...], price: Price) -> Run:
    """Return a run as plain data.

    Args:
        get_module: Returns the model's module of a qualified name.
        nodes: The run's nodes.
        price: The gate's price function.
    """
    steps = list(steps_of(node.element for node in nodes))
    choice = partition(nodes, price, fold=True)
    merges = tuple(segment.convs for segment in choice.segments if not segment.is_fold)
    why, exact = "", True
    try:
        whole = Segment(nodes, geometry_of_nodes(nodes, 0, 0))
        if merges != (whole.convs,):
            why = f"as one convolution it would take {whole.merged_cost / max(whole.cost, 1):.2f} times the work"
    except Refusal as refusal:
        why, exact = str(refusal), False
    counts = {name: sum(p.numel() for p in parameters_of(get_module, name)) for name in {step.name for step in steps}}
    replaced = {step.name for segment in choice.segments for step in steps_of(node.element for node in segment.nodes)}
    merged_parameters = sum(_parameter_count(segment.geometry) for segment in choice.segments)
    merged_parameters += sum(count for name, count in counts.items() if name not in replaced)
    return Run(
        convs=conv_names(node.element for node in nodes),
        norms=tuple(step.name for step in steps if step.kind == "norm"),
        exact=exact,
        why=why,
        merges=merges,
        size=nodes[0].input_sizes,
        multiply_adds=sum(node.cost for node in nodes),
        merged_multiply_adds=int(choice.cost),
        parameters=sum(counts.values()),
        merged_parameters=merged_parameters,
    )


def parameters_of(get_module: Callable[[str], nn.Module], name: str) -> list[Tensor]:
    """Return the parameters of a step's module without those of its children; none for a function."""
    return [] if ":" in name else list(get_module(name).parameters(recurse=False))


def _parameter_count(geometry: Geometry) -> int:
    border = geometry.out_channels * math.prod(geometry.border_kernel) if geometry.bounded else 0
    return geometry.weights + (geometry.out_channels if geometry.bias else 0) + border
