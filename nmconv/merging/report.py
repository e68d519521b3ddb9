"""What could merge and what was merged, as plain data; and what is asked of the user's arguments before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nmconv.algebra import Geometry, Refusal
from nmconv.errors import MergeError, ModelTypeError, OptionError
from nmconv.finding import steps_of
from nmconv.merging.partitioning import Node, Partition, Price, Segment, geometry_of_nodes, partition
from nmconv.planning import Sum
from nmconv.recording import rng_restored
from nmconv.surgery import MERGED, check_examples, check_finished, check_has_run, check_plain
from nmconv.timing import BACKENDS

__all__ = [
    "Guard",
    "Merge",
    "Run",
    "called",
    "check_made",
    "check_mode",
    "check_options",
    "described",
    "get_merges",
    "outputs",
    "parameters_of",
]


def get_merges(model: nn.Module) -> tuple[tuple[Merge, ...], ...]:
    """What was merged in a model: one tuple for each call of :func:`nmconv.merge` or :func:`nmconv.fold_norms`.

    Folded norms are merges of a single convolution. Empty for a model in which nothing was merged.

    Raises:
        ModelTypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"{type(model).__name__} is no nn.Module: give the model itself")
    rounds: tuple[tuple[Merge, ...], ...] = model.__dict__.get(MERGED, ())
    return rounds


def outputs(model: nn.Module, examples: Any) -> Any:
    """As :func:`called`; what the model draws at random, a second call draws too (dropout in train mode, say)."""
    with rng_restored(model):
        return called(model, examples)


def called(model: nn.Module, examples: Any) -> Any:
    """What a model returns for copies of example inputs, into which it may write; without gradients."""
    examples = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, examples)
    with torch.no_grad():
        if isinstance(examples, dict):
            return model(**examples)
        return model(*examples) if isinstance(examples, tuple) else model(examples)


_GATES = ("flops", "latency", "always")


def check_options(gate: str, min_gain: float, backend: str, example_inputs: Any) -> None:
    """Refuse what is none, with OptionError."""
    if gate not in _GATES:
        raise OptionError(f"gate={gate!r}: give one of {', '.join(_GATES)}")
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r}: give one of {', '.join(BACKENDS)}")
    if isinstance(min_gain, bool) or not isinstance(min_gain, (int, float)) or not 0 < min_gain < math.inf:
        raise OptionError(f"min_gain={min_gain!r}: give a positive number, such as 1.05")
    if gate == "latency" and example_inputs is None:
        raise OptionError('gate="latency" times on example_inputs: give what the model is called with')
    check_examples(example_inputs)


def check_made(model: nn.Module, todo: str) -> None:
    """Refuse what is no plain model, or has lazy modules that never ran, with ModelTypeError.

    And what is gradual, with MergeError.
    """
    check_plain(model, todo)
    check_has_run(model)
    check_finished(model, MergeError)


def check_mode(model: nn.Module, todo: str) -> None:
    """The same, and refuse train mode, with MergeError."""
    check_made(model, todo)
    if model.training:
        raise MergeError(
            f"this {type(model).__name__} is in train mode, where norms depend on the batch: call model.eval() first"
        )


def described(named: Callable[[str], nn.Module], nodes: tuple[Node, ...], price: Price) -> Run:
    """A run as plain data.

    Args:
        named: From a name to the model's module.
        nodes: Of the run.
        price: Of the gate.
    """
    steps = list(steps_of(node.element for node in nodes))
    choice: Partition = partition(nodes, price, fold=True, fewest=False)
    real = [segment for segment in choice.segments if not segment.is_fold]
    why, exact = "", True
    try:
        whole = Segment(nodes, geometry_of_nodes(nodes, 0, 0))
        if [segment.convs for segment in real] != [whole.convs]:
            why = f"as one convolution it would take {whole.merged_cost / max(whole.cost, 1):.2f} times the work"
    except Refusal as refusal:
        why, exact = str(refusal), False
    convs = tuple(step.name for step in steps if step.kind == "conv")
    before = {name: sum(p.numel() for p in parameters_of(named, name)) for name in {step.name for step in steps}}
    taken = {step.name for part in choice.segments for step in steps_of(node.element for node in part.nodes)}
    after = sum(_numbers(part.geometry) for part in choice.segments)
    after += sum(count for name, count in before.items() if name not in taken)
    return Run(
        convs=convs,
        norms=tuple(step.name for step in steps if step.kind == "norm"),
        exact=exact,
        why=why,
        merges=tuple(segment.convs for segment in real),
        size=nodes[0].sizes,
        multiply_adds=sum(node.cost for node in nodes),
        merged_multiply_adds=int(choice.cost),
        parameters=sum(before.values()),
        merged_parameters=after,
    )


def parameters_of(named: Callable[[str], nn.Module], name: str) -> list[Tensor]:
    """Of a step's own module, none of its children's; a function has none."""
    return [] if ":" in name else list(named(name).parameters(recurse=False))


def _numbers(geometry: Geometry) -> int:
    border = geometry.out_channels * math.prod(geometry.border_kernel) if geometry.bounded else 0
    return geometry.weights + (geometry.out_channels if geometry.bias else 0) + border


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
