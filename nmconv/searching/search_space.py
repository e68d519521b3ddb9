"""The search space: every segment of every linear run that dropping all activations would leave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from nmconv.algebra import Geometry, Refusal
from nmconv.copying import copy_model
from nmconv.errors import NoSitesError, RewriteError
from nmconv.finding import DefUse, Element, LinearRun, Residual, linear_runs, map_shapes, residuals, steps_of
from nmconv.fitting import FitTask
from nmconv.flow import PLAIN_ACTS, record_model
from nmconv.merging import RunNode, interior_geometry
from nmconv.planning import Branch, Kernel, Plan, Site
from nmconv.searching.blocks import Block, BlockFinder
from nmconv.searching.segments import CandidateSegment
from nmconv.surgery import make_changes, plan_to_keep_all, resolve_plan, structure_only_copy

__all__ = ["SearchSpace"]


class SearchSpace:
    """A model in eval mode, and the segments of it that could become linear.

    Args:
        model: Only read.
        example_inputs: One batch; only structure and shapes are used.
        max_convs: Longest segment, in convolutions.

    Attributes:
        plan: The plan that keeps everything.
        linear: The model's modules with all droppable activations dropped; parameters are the model's own.
        activation_elements: Number of elements of all activations, for one image.
        segments: Everything that could become linear.

    Raises:
        NoSitesError: If no activation of the model belongs to a convolution.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, max_convs: int) -> None:
        self.model = model
        self.plan = plan_to_keep_all(model, example_inputs)
        self.max_convs = max_convs
        droppable: dict[str | Site, str] = {
            site.id: "drop" for site in self.plan.sites if site.action == "keep" and not site.locked
        }
        if not droppable:
            raise NoSitesError(f"no activation of this {type(model).__name__} can be dropped")
        self._recordings = record_model(model, example_inputs, both_sizes=False)
        self.linear = structure_only_copy(model)
        self._apply(self.linear, self.plan.edit(droppable))
        self._sites: dict[Any, Site] = {
            ((site.owner, site.name, site.function), site.call): site
            for site in self.plan.sites
            if site.modes != "train"
        }
        shapes = map_shapes(model, example_inputs)
        self._position = {conv: at for at, conv in enumerate(shapes.convs)}  # in the order of execution
        self._multiply_adds = {conv: _multiply_adds(model, conv, shape) for conv, shape in shapes.convs.items()}
        self._elements: dict[str, int] = {
            site.id: math.prod(shapes.acts[act]) for act, site in self._sites.items() if act in shapes.acts
        }
        self._real_sites = {site.id for site in self.plan.sites if site.is_real}
        self.activation_elements = sum(self._elements.get(site.id, 0) for site in self.plan.sites if site.is_real)
        self._uses = DefUse(model, example_inputs)
        self._finder = BlockFinder(self.linear, self._uses, self._sites)
        runs = linear_runs(self.linear, example_inputs=example_inputs)
        self.segments = _without_duplicates([*self._in_runs(runs), *self._branches(residuals(model, example_inputs))])

    def plan_of(self, segments: Iterable[tuple[CandidateSegment, str]]) -> Plan:
        """Return the plan that makes some segments linear.

        Args:
            segments: Segments that share no convolution, each with its kernel's size, or "" for no kernel.
        """
        actions: dict[str, str] = {}
        kernels: list[Kernel] = []
        branches: list[Branch] = []
        for segment, size in segments:
            actions.update(dict.fromkeys(segment.sites, "gone" if segment.residual else "drop"))
            if segment.residual:
                branches.append(segment.residual.branch)
            elif size:
                kernels.append(Kernel(segment.convs, size))
        sites = tuple(
            replace(site, action=actions[site.id], reason="chosen by search") if site.id in actions else site
            for site in self.plan.sites
        )
        return replace(self.plan, sites=sites, kernels=tuple(kernels), branches=tuple(branches))

    def converted(self, plan: Plan) -> nn.Module:
        """Return a copy of the model converted by one of its plans, without a witness."""
        copy = copy_model(self.model)
        self._apply(copy, plan)
        return copy

    def activation_after(self, element: Element) -> nn.Module | None:
        """Return the droppable activation directly after an element of a run, as a module."""
        site = self._finder.droppable_after(element)
        if site is None:
            return None
        if site.function:  # return a module with default settings for a function
            return PLAIN_ACTS.get(site.kind, nn.SiLU)()
        return self.model.get_submodule(site.name)

    def nodes_of(self, convs: Iterable[str]) -> list[RunNode]:
        """Return convolutions, each with the norms after it; [] if one of them is in no linear run."""
        blocks = [self._finder.block_of(conv) for conv in convs]
        return [node for block in blocks if block for node in block.nodes] if all(blocks) else []

    def _apply(self, model: nn.Module, plan: Plan) -> None:
        make_changes(model, plan, resolve_plan(self.model, plan, self._recordings))

    # -- segments of runs ---------------------------------------------------------------------------------------------

    def _in_runs(self, runs: Iterable[LinearRun]) -> Iterator[CandidateSegment]:
        for run in runs:
            sizes = tuple(run.source[1:]) if run.source else ()
            for blocks in self._finder.block_lists(run.elements, sizes):
                yield from self._in_blocks(blocks)

    def _in_blocks(self, all_blocks: list[Block]) -> Iterator[CandidateSegment]:
        """Yield every segment of consecutive blocks that has an activation to drop."""
        for start in range(len(all_blocks)):
            for end in range(start + 1, len(all_blocks) + 1):
                last = all_blocks[end - 1]
                blocks = (*all_blocks[start : end - 1], last.cut or last)
                convs = tuple(conv for block in blocks for conv in block.convs)
                if len(convs) > self.max_convs or any(":" in conv for conv in convs):
                    break  # functional convolutions are not modules, and cannot be replaced
                sites = [site for block in blocks for site in block.inner]
                sites += [block.after for block in blocks[:-1] if block.after]
                if sites and len(convs) > 1 and all(conv in self._position for conv in convs):
                    yield self._segment(blocks, convs, tuple(dict.fromkeys(sites)))

    def _segment(self, blocks: tuple[Block, ...], convs: tuple[str, ...], sites: tuple[str, ...]) -> CandidateSegment:
        nodes = [node for block in blocks for node in block.nodes]
        elements = tuple(node.element for node in nodes)
        output = self._uses.location(elements[-1])
        first_module = next(step.name for step in steps_of(elements))
        positions = [self._position[conv] for conv in convs]
        channels = getattr(self.model.get_submodule(convs[0]), "in_channels", 0)
        try:
            geometry: Geometry | str = interior_geometry(nodes, channels, len(nodes[0].input_sizes))
        except Refusal as refusal:
            geometry = str(refusal)
        return CandidateSegment(
            convs=convs,
            sites=sites,
            blocks=blocks,
            residual=None,
            task=FitTask(elements, convs, first_module, output, None, output, Kernel(convs, "auto")),
            geometry=geometry,
            first=min(positions),
            last=max(positions),
            positions=math.prod(nodes[-1].output_sizes),
            **self._costs(convs, sites),
        )

    # -- residual branches --------------------------------------------------------------------------------------------

    def _branches(self, branches: Iterable[Residual]) -> Iterator[CandidateSegment]:
        for residual in branches:
            segment = self._branch(residual)
            if segment is not None:
                yield segment

    def _branch(self, residual: Residual) -> CandidateSegment | None:
        """Return the residual branch as a segment, or None if it cannot be removed."""
        sites = [self._sites.get(act) for act in residual.acts]
        if any(site is None or site.action not in ("keep", "skip") for site in sites):
            return None
        convs = residual.branch.convs
        if not all(conv in self._position for conv in convs):
            return None
        positions = [self._position[conv] for conv in convs]
        if max(positions) - min(positions) != len(positions) - 1:
            return None  # another convolution runs in between
        ids = tuple(site.id for site in sites if site is not None)
        segment = CandidateSegment(
            convs=convs,
            sites=ids,
            blocks=(),
            residual=residual,
            task=None,
            geometry="a residual branch is removed",
            first=min(positions),
            last=max(positions),
            positions=0,
            **self._costs(convs, ids),
        )
        try:
            self._apply(structure_only_copy(self.model), self.plan_of([(segment, "")]))
        except RewriteError:
            return None
        return segment

    def _costs(self, convs: tuple[str, ...], sites: tuple[str, ...]) -> dict[str, int]:
        weights: list[Any] = [self.model.get_submodule(conv).weight for conv in convs if ":" not in conv]
        return {
            "multiply_adds": sum(self._multiply_adds[conv] for conv in convs),
            "parameters": sum(weight.numel() + len(weight) for weight in weights),
            "activations": sum(site in self._real_sites for site in sites),
            "activation_elements": sum(self._elements.get(site, 0) for site in sites),
        }


def _without_duplicates(segments: list[CandidateSegment]) -> tuple[CandidateSegment, ...]:
    """Return the segments without those that a plan cannot distinguish from others, as it names only convolutions.

    The convolutions of a branch and those of the whole sum can be the same: the sum is kept if it can be one
    convolution.
    """
    sums = {segment.convs for segment in segments if segment.is_sum and not isinstance(segment.geometry, str)}
    return tuple(
        segment
        for segment in segments
        if segment.residual or segment.is_sum is (segment.convs in sums) or segment.convs not in sums
    )


def _multiply_adds(model: nn.Module, name: str, shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of one convolution for one image; 0 where they cannot be known."""
    conv: Any = None if ":" in name else model.get_submodule(name)
    weight = getattr(conv, "weight", None)
    return 0 if weight is None or not shape else weight.numel() * math.prod(shape[1:])
