"""One merge of one model: find runs, choose segments, build convolutions, put them in place, check the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra import (
    Affine,
    Refusal,
    affine_in_double,
    before_hoisting,
    conv_from_affine,
    conv_module,
    in_memory_format,
    is_channels_last,
    reference_tensor,
)
from nmconv.copying import copy_model
from nmconv.errors import MergeError
from nmconv.finding import LinearRun, ParallelSum, argument_structures, conv_names, linear_runs, steps_of
from nmconv.flow import Op, hooks_of, leaf_op
from nmconv.merging.call_guards import guarded, with_attribute_guards
from nmconv.merging.example_outputs import batch_size, outputs_in_float64, outputs_of, outputs_of_copy
from nmconv.merging.latency_gate import LatencyGate
from nmconv.merging.live_kernels import why_not_live
from nmconv.merging.merge_records import any_requires_grad, merge_of_segment
from nmconv.merging.node_affines import affine_of_nodes
from nmconv.merging.nodes import RunNode, nodes_of, refuse_all
from nmconv.merging.numeric_checks import check_model_outputs, check_segment
from nmconv.merging.partitioning import Price, Segment, partition
from nmconv.merging.placing import install, rewrite_forwards
from nmconv.merging.recorded_runs import RunDivider, merged_groups
from nmconv.merging.report import Merge, parameters_of
from nmconv.surgery import Witness, WorkingCopy
from nmconv.witness import MergedGroup

__all__ = ["Merger"]

_DEFAULT_SIZE = 256  # along each axis, where the input size is unknown


class Merger:
    """One merge of one model.

    Args:
        model: The model, only read.
        example_inputs: What it is called with, or None.
        live: Whether kernels are to be computed from their factors in each call.
        witness: Recordings of ``model``, or None.
        compare_outputs: Whether to compare the outputs of the whole model before and after, if there are example
            inputs.
        baked: If the model has live kernels: a copy with plain convolutions in their place, from which to merge, and
            the qualified names of these convolutions.

    Attributes:
        runs: The nodes of each linear run.
        segments: The segments chosen.
        why_not_live: The first reason why a module cannot be a factor of a live kernel, or "".
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        live: bool,
        witness: Witness | None,
        *,
        compare_outputs: bool = True,
        baked: tuple[nn.Module, Sequence[str]] | None = None,
    ) -> None:
        self._original = model
        self._model, self._baked_heads = baked or (model, ())
        model = self._model
        self._witness = witness
        self._compare_outputs = compare_outputs
        self._get_module = dict(model.named_modules(remove_duplicate=False)).__getitem__
        self._examples = example_inputs
        self._live = live
        self._unhoisted = before_hoisting(self._get_module)
        self.why_not_live = ""
        self._unwritable: dict[str, str] = {}  # by owner of a sum, the reason why its forward cannot be rewritten
        recordings = None if witness is None or baked else witness.recordings
        self._linear_runs = linear_runs(model, example_inputs=example_inputs, recordings=recordings, pools=True)
        self._argument_structures = argument_structures(
            element for run in self._linear_runs for element in run.elements
        )
        self._divider = RunDivider(witness)
        self._divider.compare([self._nodes(run) for run in self._linear_runs])
        self.runs = [self._nodes(run) for run in self._linear_runs]
        self.segments: list[Segment] = []
        self._merges: list[Merge] = []  # of the segments
        self._methods: dict[str, Any] = {}  # rewritten forwards by owner

    def _nodes(self, run: LinearRun) -> tuple[RunNode, ...]:
        rank = _rank(self._get_module, run)
        sizes = _input_sizes(run, rank)
        nodes = nodes_of(self._get_module, run.elements, None, sizes, self._unhoisted, self._unwritable)
        hooked = [name for name in run.crossed if hooks_of(self._get_module(name))]
        if hooked:
            refuse_all(nodes, Refusal(f"{hooked[0]} has a hook, which would see other values: remove the hook first"))
        if self._live:
            self._refuse_non_factors(nodes)
        return self._divider.divided(nodes)

    def _refuse_non_factors(self, nodes: Sequence[RunNode]) -> None:
        """Refuse what cannot be a factor of a live kernel."""
        for node in nodes:
            if isinstance(node.element, ParallelSum):
                for branch in node.branches:
                    self._refuse_non_factors(branch)
                if any(isinstance(inner.geometry, Refusal) for branch in node.branches for inner in branch):
                    node.geometry = Refusal("a branch cannot be a factor of a live kernel")
            elif node.element.kind == "pool":
                node.geometry = Refusal(
                    f"{node.element.name} is an average pool, which cannot be a factor of a live kernel"
                )
            elif node.element.kind != "pass" and ":" not in node.element.name:
                why = why_not_live(self._get_module(node.element.name))
                if why:
                    node.geometry = Refusal(f"{node.element.name}: {why}")
                    self.why_not_live = self.why_not_live or str(node.geometry)

    @property
    def why_no_convs(self) -> str:
        """Why no run has a convolution although the recordings show calls of convolutions, or ""."""
        recorded = [] if self._witness is None else self._witness.recordings.runs
        if not recorded or any(conv_names(run.elements) for run in self._linear_runs):
            return ""
        called = {fact.label for node, fact in recorded[0].facts.items() if node.op == "call_module"}
        convs = [name for name in called if leaf_op(self._get_module(name)) is Op.CONV]
        if not convs:
            return ""
        return (
            f"it calls {len(convs)} convolutions ({min(convs)}, …), none of them in a run that eval and train mode "
            "share: nmconv.make_plan(model) names the parts that do not run in one of the modes"
        )

    # -- choosing segments --------------------------------------------------------------------------------------------

    def latency_price(self, min_gain: float, backend: str) -> Price:
        """Return the price by measured time."""
        like = next(iter(self._model.parameters()), torch.empty(0))
        batch, channels_last = batch_size(self._examples) or 1, is_channels_last(self._model)
        return LatencyGate(like, batch, backend, min_gain, self._unhoisted, channels_last).price

    def choose(self, price: Price, *, fold: bool, fewest: bool) -> None:
        """Choose segments, and choose again without sums whose forwards cannot be rewritten.

        Args:
            price: As for :func:`nmconv.merging.partitioning.partition`.
            fold: As for ``partition``.
            fewest: As for ``partition``.
        """
        while True:
            choices = [partition(nodes, price, fold=fold, fewest=fewest) for nodes in self.runs]
            self.segments = [segment for choice in choices for segment in choice.segments]
            self._merges = [
                merge_of_segment(segment, any_requires_grad(self._get_module, _module_names(segment)), self._live)
                for segment in self.segments
            ]
            self._methods, failed = rewrite_forwards(self._model, self._merges, self._argument_structures)
            if not failed:
                return
            self._unwritable |= {owner: str(error) for owner, error in failed.items()}
            self.runs = [self._nodes(run) for run in self._linear_runs]

    def check_eval_mode(self) -> None:
        """Raise MergeError if a module of a chosen segment is in train mode."""
        for segment in self.segments:
            for name in _module_names(segment):
                if self._get_module(name).__dict__["training"]:
                    raise MergeError(f"{name} is in train mode, though the model is not: call model.eval() first")

    def merges_any(self) -> bool:
        """Return whether any chosen segment does more than fold norms."""
        return not all(segment.is_fold for segment in self.segments)

    # -- carrying them out --------------------------------------------------------------------------------------------

    def working_copy(self, *, inplace: bool = False) -> WorkingCopy:
        """Return a copy of the model to carry out the merges on."""
        return WorkingCopy(self._model, inplace=inplace, shared=() if inplace else self._replaced())

    def _replaced(self) -> Iterator[Tensor | nn.Module]:
        """Yield what the merged model will not contain: modules, and parameters of modules whose children stay."""
        for merge in self._merges:
            for name in () if merge.live else (merge.head, *merge.removed):
                module = self._get_module(name)
                yield from parameters_of(self._get_module, name)
                if next(module.children(), None) is None:
                    yield module

    def carry_out(self, work: WorkingCopy) -> WorkingCopy:
        """Merge a working copy and check the result.

        Raises:
            MergeError: If a merged run or the merged model differs from the original.
            OptionError: If the model cannot be called with the example inputs.
            WitnessError: If recordings of the merged model differ.
        """
        if self.segments:
            with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode cannot be trained
                self._merges = with_attribute_guards(
                    self._model,
                    guarded(self._model, self._witness, self._merges),
                    (flag for run in self._linear_runs for flag in run.flags),
                )
                convs = self._merged_convs()
                compares = self._compare_outputs and self._examples is not None and self._device != "meta"
                before = outputs_of_copy(self._model, self._examples) if compares else None
                install(work.model, self._merges, convs, self._methods)
                self._check_recordings(work.model)
                if before is not None:
                    exact = partial(outputs_in_float64, self._original, self._examples)
                    after = outputs_of(copy_model(work.model), self._examples)
                    check_model_outputs(before, after, exact, [merge.head for merge in self._merges])
        return work

    def _merged_convs(self) -> dict[str, nn.Module]:
        """Return the merged convolutions by head, each checked against its segment; live ones are checked only."""
        convs: dict[str, nn.Module] = {}
        channels_last = is_channels_last(self._model)
        for segment, merge in zip(self.segments, self._merges, strict=True):
            like = reference_tensor(self._get_module(merge.head))
            if like.is_meta:
                conv = in_memory_format(conv_module(merge.geometry, like), channels_last)
                convs[merge.head] = conv.requires_grad_(merge.trainable).train(False)
                continue
            affine = self._affine(segment)
            check_segment(self._model, segment, affine)
            if self._live:
                continue
            try:
                convs[merge.head] = in_memory_format(conv_from_affine(affine, like, merge.trainable), channels_last)
            except ValueError as error:
                raise MergeError(f"{segment.convs[0]} … {segment.convs[-1]}: {error}") from error
        return convs

    def _affine(self, segment: Segment) -> Affine:
        """Return the segment as one convolution in float64."""
        geometry = segment.geometry
        nodes = segment.nodes[:-1] if geometry.pooled else segment.nodes
        like = torch.empty(0, dtype=torch.float64, device=self._device)
        affine = affine_of_nodes(nodes, self._get_module, affine_in_double, like, geometry.in_channels, geometry.rank)
        return replace(affine, geometry=geometry)

    def _check_recordings(self, merged: nn.Module) -> None:
        if self._witness is None:
            return
        closed = {name for merge in self._merges for name in merge.closed}
        groups = merged_groups(self._merges)
        grouped = {name for group in groups for name in group.members}
        groups += [MergedGroup(head, frozenset([head])) for head in self._baked_heads if head not in grouped]
        self._witness.check(merged, None, groups, closed)

    @property
    def _device(self) -> str:
        first = next(iter(self._model.parameters()), None)
        return "meta" if first is not None and first.is_meta else "cpu"


def _module_names(segment: Segment) -> list[str]:
    return [step.name for step in steps_of(node.element for node in segment.nodes)]


def _rank(get_module: Callable[[str], nn.Module], run: LinearRun) -> int:
    """Return the number of spatial axes of the first convolution."""
    for step in steps_of(run.elements):
        size = getattr(get_module(step.name.partition(":")[0]), "kernel_size", None)
        if step.kind == "conv" and isinstance(size, tuple):
            return len(size)
    return 2


def _input_sizes(run: LinearRun, rank: int) -> tuple[int, ...]:
    shape = run.source
    if shape and len(shape) in (rank, rank + 1) and all(isinstance(size, int) for size in shape):
        return shape[-rank:]  # the shape has no channels where the input has no batch
    return (_DEFAULT_SIZE,) * rank
