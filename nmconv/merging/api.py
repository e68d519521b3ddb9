"""The public calls: what could merge, and merging it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nmconv.algebra import (
    Affine,
    Refusal,
    affine_in_double,
    before_hoisting,
    conv_module,
    filled,
    is_channels_last,
    laid_out,
    like_of,
)
from nmconv.copying import copy_of
from nmconv.errors import MergeError, NoEffectWarning, OptionError
from nmconv.finding import Join, LinearRun, linear_runs, steps_of, takes_in
from nmconv.flow import Op, hooks_of, leaf_op
from nmconv.merging.call_guards import guarded, with_flags
from nmconv.merging.float64_check import check_model_outputs, check_segment
from nmconv.merging.latency_gate import LatencyGate, is_slower
from nmconv.merging.live_kernels import affine_of_nodes, why_not_live
from nmconv.merging.partitioning import Node, Price, Segment, nodes_of, partition
from nmconv.merging.placing import bake, install, record, trains, write_methods
from nmconv.merging.recorded_runs import RecordedRuns, groups_of
from nmconv.merging.report import (
    Merge,
    Run,
    check_made,
    check_mode,
    check_options,
    described,
    get_merges,
    outputs,
    parameters_of,
)
from nmconv.surgery import Witness, WorkingCopy, check_examples
from nmconv.witness import MergedGroup

__all__ = ["find_runs", "fold_norms", "merge"]

_SIZE = 256  # along each axis, where nothing tells the input's


def merge(
    model: nn.Module,
    *,
    gate: str = "flops",
    min_gain: float = 1.05,
    backend: str = "eager",
    live: bool = False,
    example_inputs: Any = None,
    methods: Mapping[str, Any] | None = None,
    inplace: bool = False,
    witness: bool = True,
) -> nn.Module:
    """Turn linear runs into single convolutions where that pays, with the outputs unchanged up to the border.

    A run is a sequence of convolutions with only norms, identities, dropout and padding between them, also across
    module boundaries; a residual identity or parallel branches around it are folded in (RepVGG, arXiv 2101.03697),
    and an average pool behind it: one after a 1x1 is taken before it, where the 1x1 then has less to do.
    Norms next to a convolution that stays alone are folded into it. Which parts of a run become one convolution each
    is chosen by dynamic programming over all of them. ``docs/merging.md`` has the algebra.

    Args:
        model: In eval mode, converted or not.
        gate: ``"flops"``: a merge must save multiply-adds, ``min_gain`` times; ``"latency"``: it must be that much
            faster on ``example_inputs``' shape, the model's device and dtype, and ``backend``, and all merges together
            must not make the model slower there (not looked at if ``live``, or where ``backend`` cannot run the whole);
            ``"always"``: every exact merge is made, as few convolutions as possible left.
        min_gain: Before over after; 1.05 is where the measured law breaks even.
        backend: What the latency gate times on: ``"eager"``, ``"compile"``, ``"frozen"`` or ``"onnxruntime"``
            (:func:`nmconv.timing.runner` tells what these are).
        live: Keep the factors as parameters, under their old keys, and compute merged kernels from them on the fly,
            for fine-tuning with frozen norms. The multiply-adds gate counts what that takes, shared by the batch, where
            ``example_inputs`` tell how large that is; the latency gate does not.
        example_inputs: What the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
            Where given, the whole model is run on them before and after.
        methods: Further methods that the merged model will be called by, each with example inputs of its own, such as
            ``{"forward_intermediates": images}``: what they read stays. Of methods not named here,
            ``forward_intermediates`` raises where it would read inside of what was merged.
        inplace: Change ``model`` itself instead of a copy.
        witness: Record the model's own run before and after, as :func:`nmconv.convert` does: what is no linear run in
            every recording is left out, and the result is held against the original. False skips that.

    Returns:
        The merged model: the same class. :func:`nmconv.get_merges` tells what was done.

    Raises:
        OptionError: For a gate, gain or backend that is none, or a latency gate without ``example_inputs``,
            or if these are none, or if the model cannot be called with them or, where there are none, with a guess.
        ModelTypeError: If ``model`` is no module, or wrapped, compiled or scripted, or has lazy modules that never ran.
        MergeError: If it, or a part of a run, is in train mode; if it is gradual and not finished; or if a merged run
            differs from its original.
        WitnessError: If the merged model would do anything else than the original; the model is as it was.

    Warns:
        NoEffectWarning: If no run pays; norms may have been folded all the same.
    """
    check_options(gate, min_gain, backend, example_inputs)
    check_mode(model, "merge")
    seen = Witness(model, example_inputs, choices=True, methods=methods) if witness else None
    work = None
    baking = [merge.head for merges in get_merges(model) for merge in merges if merge.live]
    if baking:
        work = WorkingCopy(model, inplace=inplace)
        bake(work.model)
    made = _Merging(model, example_inputs, live, seen, baked=None if work is None else (work.model, baking))
    if gate == "latency":
        price = made.latency(min_gain, backend, example_inputs)
    elif gate == "flops":
        price = _flops(min_gain, _batch(example_inputs) if live else None)
    else:
        price = _any
    made.choose(price, fold=not live, fewest=gate == "always")
    gains = "is one exact convolution" if gate == "always" else f"gains {min_gain}"
    why = made.why_not_live or made.why_unread or f"no linear run of it {gains}"
    if gate == "latency" and not live and made.merges_any():
        trial = made.carried_out(made.working_copy())
        if is_slower(_folded(model, seen).model, trial.model, example_inputs, backend):
            why = f"together, the runs that gain {min_gain} each make it slower on {backend}"
            made.choose(_nothing, fold=True, fewest=False)
        elif not inplace:
            return trial.finish()
    if not baking and not made.merges_any():
        warnings.warn(
            f"nothing to merge in this {type(model).__name__}: {why} (nmconv.find_runs tells what there is)",
            NoEffectWarning,
            stacklevel=2,
        )
    return made.carried_out(work or made.working_copy(inplace=inplace)).finish()


def fold_norms(
    model: nn.Module, *, example_inputs: Any = None, inplace: bool = False, witness: bool = True
) -> nn.Module:
    """Fold norms into the convolutions next to them, and do nothing else: what a fair baseline for merging is.

    Args:
        model: In eval mode.
        example_inputs: What the model is called with; only structure and shapes are used.
        inplace: Change ``model`` itself instead of a copy.
        witness: As for :func:`merge`.

    Raises: as :func:`merge` does.
    """
    check_mode(model, "fold norms")
    check_examples(example_inputs)
    seen = Witness(model, example_inputs, choices=True) if witness else None
    return _folded(model, seen, inplace, example_inputs).finish()


def _folded(
    model: nn.Module, witness: Witness | None, inplace: bool = False, example_inputs: Any = None
) -> WorkingCopy:
    made = _Merging(model, example_inputs, False, witness, runs=False)
    made.choose(_nothing, fold=True, fewest=False)
    return made.carried_out(made.working_copy(inplace=inplace))


def find_runs(
    model: nn.Module, *, min_gain: float = 1.05, example_inputs: Any = None, witness: bool = True
) -> tuple[Run, ...]:
    """What could merge: the linear runs of two convolutions or more, in order of execution. Touches nothing.

    Args:
        model: In any mode; read as if it were in eval mode.
        min_gain: Of the multiply-adds gate that ``Run.merges`` and ``Run.merged_multiply_adds`` go by.
        example_inputs: What the model is called with; only their structure and shapes are used.
        witness: Record the model in train mode, at other sizes and called otherwise, too, and divide runs where it does
            something else than in eval mode.

    Raises:
        OptionError: If ``example_inputs`` are none, or if the model cannot be called with them.
        ModelTypeError: If ``model`` is no module, or wrapped, compiled or scripted.
        MergeError: If it is gradual and not finished.

    Warns:
        NoEffectWarning: If none of the convolutions that the model calls could be followed.
    """
    check_made(model, "look at")
    check_examples(example_inputs)
    seen = Witness(model, example_inputs, choices=True) if witness else None
    made = _Merging(model, example_inputs, False, seen)
    made.settle(_flops(min_gain), fold=True, fewest=False)
    if made.why_unread:
        warnings.warn(f"no run of this {type(model).__name__}: {made.why_unread}", NoEffectWarning, stacklevel=2)
    runs = [nodes for nodes in made.runs if sum(len(node.convs) for node in nodes) > 1 or nodes[-1].element.pools]
    return tuple(described(model.get_submodule, nodes, _flops(min_gain)) for nodes in runs)


def _refuse(nodes: Sequence[Node], reason: Refusal) -> None:
    """Let none of the nodes become part of a convolution, those of branches neither."""
    for node in nodes:
        node.geometry = reason
        for branch in node.branches:
            _refuse(branch, reason)


def _flops(min_gain: float, batch: int | None = None) -> Price:
    """The price by multiply-adds of an image; those of making a live kernel are shared by the batch, where known."""

    def price(segment: Segment) -> float | None:
        merged = segment.merged_cost + (segment.composing / batch if batch else 0)
        return merged if segment.cost >= min_gain * merged else None

    return price


def _batch(example_inputs: Any) -> int | None:
    """Images in it, where anything is given."""
    tensors = [value for value in tree_leaves(example_inputs) if isinstance(value, Tensor)]
    return int(tensors[0].shape[0]) if tensors and tensors[0].dim() else None


def _any(segment: Segment) -> float | None:
    return segment.merged_cost


def _nothing(segment: Segment) -> float | None:
    return None


class _Merging:
    """One merge of one model: runs found, segments chosen, convolutions made, all put in place."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        live: bool,
        witness: Witness | None,
        *,
        runs: bool = True,
        baked: tuple[nn.Module, Sequence[str]] | None = None,
    ) -> None:
        self._original = model
        self._model, self._baked = baked or (model, ())  # heads of merges that were live when the model was recorded
        model = self._model
        self._witness = witness
        self._runs = runs  # whether example inputs run through the whole before and after
        self._named = dict(model.named_modules(remove_duplicate=False)).__getitem__
        self._examples = example_inputs
        self._live = live
        self.why_not_live = ""  # of the first module that cannot be a factor
        self._refused: dict[str, str] = {}  # owners of sums whose forward cannot be rewritten
        recordings = None if witness is None or baked else witness.recordings
        self._found = linear_runs(model, example_inputs=example_inputs, recordings=recordings, pools=True)
        self._takes = takes_in(element for run in self._found for element in run.elements)
        self._seen = RecordedRuns(witness)
        self._seen.look_at([self._nodes(run) for run in self._found])
        self.runs = [self._nodes(run) for run in self._found]
        self.segments: list[Segment] = []
        self._merges: list[Merge] = []  # the same as plain data

    def _nodes(self, run: LinearRun) -> tuple[Node, ...]:
        hooked = [name for name in run.crossed if hooks_of(self._named(name))]
        source = run.source
        rank = _rank(self._named, run)
        known = source is not None and len(source) in (rank, rank + 1) and all(isinstance(size, int) for size in source)
        sizes = source[-rank:] if source and known else (_SIZE,) * rank  # less one where there is no batch
        nodes = nodes_of(self._named, run.elements, None, sizes, before_hoisting(self._named), self._refused)
        if hooked:
            reason = Refusal(f"{hooked[0]} has a hook, which would see other values: remove it first")
            _refuse(nodes, reason)
        if self._live:
            self._refuse_factors(nodes)
        return self._seen.divided(nodes)

    def _refuse_factors(self, nodes: Sequence[Node]) -> None:
        """Refuse what cannot be a factor of a live kernel."""
        for node in nodes:
            if isinstance(node.element, Join):
                for branch in node.branches:
                    self._refuse_factors(branch)
                if any(isinstance(inner.geometry, Refusal) for branch in node.branches for inner in branch):
                    node.geometry = Refusal("a branch cannot be a factor of a live kernel")
            elif node.element.kind == "pool":
                node.geometry = Refusal(f"{node.element.name} is an average pool, no factor of a live kernel")
            elif node.element.kind != "pass" and ":" not in node.element.name:
                why = why_not_live(self._named(node.element.name))
                if why:
                    node.geometry = Refusal(f"{node.element.name}: {why}")
                    self.why_not_live = self.why_not_live or str(node.geometry)

    @property
    def why_unread(self) -> str:
        """Why no run was found where the model was seen to call convolutions, or ""."""
        runs = [] if self._witness is None else self._witness.recordings.runs
        if not runs or any(step.kind == "conv" for run in self._found for step in steps_of(run.elements)):
            return ""
        called = {fact.label for node, fact in runs[0].facts.items() if node.op == "call_module"}
        convs = [name for name in called if leaf_op(self._named(name)) is Op.CONV]
        if not convs:
            return ""
        return (
            f"it calls {len(convs)} convolutions ({min(convs)}, …), none of them in a run that eval and train mode "
            "share: nmconv.make_plan(model) names the parts that do not run in one of the modes"
        )

    # -- choosing -----------------------------------------------------------------------------------------------------

    def latency(self, min_gain: float, backend: str, example_inputs: Any) -> Price:
        """The price by measured time."""
        like = next(iter(self._model.parameters()), torch.empty(0))
        batch, last = _batch(example_inputs) or 1, is_channels_last(self._model)
        return LatencyGate(like, batch, backend, min_gain, before_hoisting(self._named), last).price

    def choose(self, price: Price, *, fold: bool, fewest: bool) -> None:
        """Decide on segments, all in eval mode."""
        self.settle(price, fold=fold, fewest=fewest)
        self._check_parts()

    def settle(self, price: Price, *, fold: bool, fewest: bool) -> None:
        """Decide on segments; what cannot be rewritten is refused and decided anew."""
        while True:
            chosen = [partition(nodes, price, fold=fold, fewest=fewest) for nodes in self.runs]
            self.segments = [segment for choice in chosen for segment in choice.segments]
            self._merges = [
                record(segment, trains(self._named, _names(segment)), self._live) for segment in self.segments
            ]
            self._methods, failed = write_methods(self._model, self._merges, self._takes)
            if not failed:
                return
            self._refused |= {owner: str(error) for owner, error in failed.items()}
            self.runs = [self._nodes(run) for run in self._found]

    def merges_any(self) -> bool:
        """Whether more than norms is to be folded."""
        return not all(segment.is_fold for segment in self.segments)

    def _check_parts(self) -> None:
        for segment in self.segments:
            for name in _names(segment):
                if self._named(name).__dict__["training"]:
                    raise MergeError(f"{name} is in train mode, though the model is not: call model.eval() first")

    # -- doing --------------------------------------------------------------------------------------------------------

    def working_copy(self, *, inplace: bool = False) -> WorkingCopy:
        """A copy to carry all of it out on."""
        return WorkingCopy(self._model, inplace=inplace, spare=() if inplace else self._spare())

    def carried_out(self, work: WorkingCopy) -> WorkingCopy:
        """Make the convolutions, put them into a copy, and check them."""
        if self.segments:
            with torch.inference_mode(False), torch.no_grad():  # or its parameters could never be trained
                self._carry_out(work)
        return work

    def _carry_out(self, work: WorkingCopy) -> None:
        convs: dict[str, nn.Module] = {}
        flags = (flag for run in self._found for flag in run.flags)
        self._merges = with_flags(self._model, guarded(self._model, self._witness, self._merges), flags)
        merges, last = self._merges, is_channels_last(self._model)
        for segment, merge in zip(self.segments, merges, strict=True):
            like = like_of(self._named(merge.head))
            if like.is_meta:
                made = laid_out(conv_module(merge.geometry, like), last)
                convs[merge.head] = made.requires_grad_(merge.trainable).train(False)
                continue
            affine = self._affine(segment)
            check_segment(self._model, segment, affine)
            if self._live:
                continue
            try:
                convs[merge.head] = laid_out(filled(affine, like, merge.trainable), last)
            except ValueError as error:
                raise MergeError(f"{segment.convs[0]} … {segment.convs[-1]}: {error}") from error
        before = self._outputs()
        install(work.model, merges, convs, self._methods)
        if self._witness is not None:
            closed = {name for merge in merges for name in merge.closed}
            groups = groups_of(merges)
            taken = {name for group in groups for name in group.members}
            groups += [MergedGroup(head, frozenset([head])) for head in self._baked if head not in taken]
            self._witness.check(work.model, None, groups, closed)
        if before is not None:
            exact = partial(_outputs_in_double, self._original, self._examples)
            after = outputs(copy_of(work.model), self._examples)
            check_model_outputs(before, after, exact, [merge.head for merge in merges])

    def _spare(self) -> Iterator[Tensor | nn.Module]:
        """What will not be in the merged model: whole modules, or where a part of one stays its parameters."""
        for merge in self._merges:
            for name in () if merge.live else (merge.head, *merge.removed):
                module = self._named(name)
                yield from parameters_of(self._named, name)
                if next(module.children(), None) is None:
                    yield module

    def _affine(self, segment: Segment) -> Affine:
        """The segment as one convolution, in float64."""
        nodes = segment.nodes[:-1] if segment.geometry.pooled else segment.nodes
        like = torch.empty(0, dtype=torch.float64, device=self._device())
        return replace(affine_of_nodes(nodes, self._named, affine_in_double, like), geometry=segment.geometry)

    def _device(self) -> str:
        first = next(iter(self._model.parameters()), None)
        return "meta" if first is not None and first.is_meta else "cpu"

    def _outputs(self) -> Any:
        if self._examples is None or not self._runs or self._device() == "meta":
            return None
        try:
            return outputs(copy_of(self._model), self._examples)  # what it keeps for itself stays as it is
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            given = [
                tuple(value.shape) if isinstance(value, Tensor) else value for value in tree_leaves(self._examples)
            ]
            raise OptionError(
                f"example_inputs of {given!r:.80}: this {type(self._model).__name__} cannot be called with them "
                f"({error})"
            ) from error


def _outputs_in_double(model: nn.Module, examples: Any) -> Any:
    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return outputs(copy_of(model).double(), tree_map(double, examples))


def _names(segment: Segment) -> list[str]:
    """Of all modules that it stands for."""
    return [step.name for step in steps_of(node.element for node in segment.nodes)]


def _rank(named: Callable[[str], nn.Module], run: LinearRun) -> int:
    for step in steps_of(run.elements):
        size = getattr(named(step.name.partition(":")[0]), "kernel_size", None)
        if step.kind == "conv" and isinstance(size, tuple):
            return len(size)
    return 2
