"""What could become linear: every segment of every linear run that dropping all activations would leave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nmconv.algebra import Geometry, Refusal, shrunk
from nmconv.copying import copy_of
from nmconv.errors import NoSitesError, RewriteError
from nmconv.finding import DefUse, Element, Join, Residual, linear_runs, residuals, shapes_of, steps_of
from nmconv.fitting import FitTask, sizes_asked
from nmconv.flow import PLAIN_ACTS, recordings_of
from nmconv.merging import Node, interior_geometry, nodes_of
from nmconv.planning import Branch, Kernel, Plan, Site
from nmconv.surgery import change, make_plan, outline_of, resolve_plan

__all__ = ["Block", "CandidateSegment", "SearchSpace"]


@dataclass(frozen=True, eq=False)
class Block:
    """One convolution, or one sum of branches, with its norms, and the activation behind it.

    Attributes:
        elements: Of a run.
        nodes: The same with their numbers.
        convs: Qualified names of its convolutions, in order.
        inner: Ids of the activations inside its branches, and between its convolution and its norms.
        behind: Id of the activation between this block and the next of its run, or "".
        cut: How the block ends a segment where an activation stands before its norms: in front of that; or None.
    """

    elements: tuple[Element, ...]
    nodes: tuple[Node, ...]
    convs: tuple[str, ...]
    inner: tuple[str, ...]
    behind: str
    cut: Block | None = None


@dataclass(frozen=True, eq=False)
class CandidateSegment:
    """Blocks that follow one another, made linear; or a residual branch that goes.

    Attributes:
        convs: Qualified names of its convolutions, in order of execution.
        sites: Ids of the activations that go.
        blocks: Of a run; none for a branch that goes.
        residual: The branch that goes, or None.
        unit: Where its input and its output are.
        geometry: Of the one convolution that it would be away from the border, or why there is none.
        first, last: Of its convolutions, in the order of execution.
        multiply_adds: Of one image, as it is.
        parameters: Of its convolutions, and of the norms behind them one number a channel.
        activations: How many of the activations that go own a convolution.
        elements: Of one image: outputs of the activations that go.
        positions: Of its output, for one image.
    """

    convs: tuple[str, ...]
    sites: tuple[str, ...]
    blocks: tuple[Block, ...]
    residual: Residual | None
    unit: FitTask | None
    geometry: Geometry | str
    first: int
    last: int
    multiply_adds: int
    parameters: int
    activations: int
    elements: int
    positions: int

    @property
    def is_sum(self) -> bool:
        """Whether a sum of branches is all of it."""
        return len(self.blocks) == 1

    def sizes(self) -> list[tuple[int, ...]]:
        """Kernel sizes that it could have, smallest first."""
        return [] if isinstance(self.geometry, str) else sizes_asked(Kernel(self.convs, "auto"), self.geometry)

    def shape(self, size: tuple[int, ...]) -> Geometry:
        """The one convolution that replaces it."""
        assert isinstance(self.geometry, Geometry)
        return shrunk(self.geometry, size)

    def multiply_adds_as(self, size: tuple[int, ...]) -> int:
        """Of the one convolution that replaces it."""
        return self.shape(size).weights * self.positions


class SearchSpace:
    """A network in eval mode, and what of it could become linear.

    Args:
        model: Read only.
        example_inputs: One batch; only structure and shapes are used.
        max_convs: Longest segment, in convolutions.

    Attributes:
        plan: In which everything stays.
        linear: The modules alone, all activations that can be dropped dropped; parameters are the model's own.
        elements: Of all its activations, for one image.
        order: From convolutions to their places in the order of execution.
        segments: All that could become linear.

    Raises:
        NoSitesError: If no activation of it belongs to a convolution.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, max_convs: int) -> None:
        self.model = model
        self.plan = make_plan(model, "1:1", example_inputs=example_inputs)
        self.max_convs = max_convs
        self._ways = DefUse(model, example_inputs)
        self._sites: dict[Any, Site] = {
            ((site.owner, site.name, site.function), site.call): site
            for site in self.plan.sites
            if site.modes != "train"
        }
        free: dict[str | Site, str] = {
            site.id: "drop" for site in self.plan.sites if site.action == "keep" and not site.locked
        }
        if not free:
            raise NoSitesError(f"no activation of this {type(model).__name__} can be dropped")
        self._recordings = recordings_of(model, example_inputs, both_sizes=False)
        self.linear = outline_of(model)
        self._change(self.linear, self.plan.edit(free))
        runs = linear_runs(self.linear, example_inputs=example_inputs)
        shapes = shapes_of(model, example_inputs)
        self.order = {name: at for at, name in enumerate(shapes.convs)}
        self._costs = {name: _multiply_adds(model, name, shape) for name, shape in shapes.convs.items()}
        self._elements: dict[str, int] = {
            site.id: math.prod(shapes.acts[act]) for act, site in self._sites.items() if act in shapes.acts
        }
        self.elements = sum(self._elements.get(site.id, 0) for site in self.plan.sites if site.is_real)
        self._blocks: dict[tuple[str, ...], Block] = {}
        found = list(self._segments(runs, residuals(model, example_inputs)))
        # A plan names a kernel by its convolutions: where a sum can be folded in, it is.
        whole = {segment.convs for segment in found if segment.is_sum and not isinstance(segment.geometry, str)}
        self.segments: tuple[CandidateSegment, ...] = tuple(
            segment
            for segment in found
            if segment.residual or segment.is_sum is (segment.convs in whole) or segment.convs not in whole
        )

    def plan_of(self, segments: Iterable[tuple[CandidateSegment, str]]) -> Plan:
        """The plan that makes some segments linear.

        Args:
            segments: Segments that share no convolution, and of each the kernel's size, or "" for none.
        """
        sites: dict[str, str] = {}
        kernels: list[Kernel] = []
        branches: list[Branch] = []
        for segment, size in segments:
            action = "gone" if segment.residual else "drop"
            sites.update(dict.fromkeys(segment.sites, action))
            if segment.residual:
                branches.append(segment.residual.branch)
            elif size:
                kernels.append(Kernel(segment.convs, size))
        changed = tuple(
            replace(site, action=sites[site.id], reason="chosen by search") if site.id in sites else site
            for site in self.plan.sites
        )
        return replace(self.plan, sites=changed, kernels=tuple(kernels), branches=tuple(branches))

    def converted(self, plan: Plan) -> nn.Module:
        """A copy of the model, converted by one of its plans, unchecked."""
        made = copy_of(self.model)
        self._change(made, plan)
        return made

    def _change(self, made: nn.Module, plan: Plan) -> None:
        change(made, plan, resolve_plan(self.model, plan, self._recordings))

    def activation_behind(self, element: Element) -> nn.Module | None:
        """The droppable activation right behind an element of a run, as a module."""
        name = self._behind(element)
        site = next((site for site in self.plan.sites if site.id == name), None)
        if site is None:
            return None
        if site.function:  # one without settings stands for those that are no module without
            return PLAIN_ACTS.get(site.kind, nn.SiLU)()
        return self.model.get_submodule(site.name)

    def nodes_behind(self, convs: Iterable[str]) -> list[Node]:
        """Some convolutions with what follows each; nothing if one is in no linear run."""
        blocks = [self._blocks.get((conv,)) for conv in convs]
        return [node for block in blocks if block for node in block.nodes] if all(blocks) else []

    # -- finding ------------------------------------------------------------------------------------------------------

    def _segments(self, runs: Iterable[Any], branches: Iterable[Residual]) -> Iterator[CandidateSegment]:
        for run in runs:
            sizes = run.source[1:] if run.source else ()
            for line in self._lines(run.elements, tuple(sizes)):
                yield from self._of_line(line)
        for residual in branches:
            found = self._branch(residual)
            if found is not None:
                yield found

    def _lines(self, elements: tuple[Element, ...], sizes: tuple[int, ...]) -> Iterator[list[Block]]:
        """The blocks of a run, and those of its branches."""
        nodes = nodes_of(
            self.linear.get_submodule, elements, None, sizes or (256,) * 2, lambda name, geometry: geometry, {}
        )
        yield from self._of_nodes(nodes)

    def _of_nodes(self, nodes: tuple[Node, ...]) -> Iterator[list[Block]]:
        line: list[Block] = []
        held: list[Node] = []
        for node in nodes:
            if node.convs and any(other.convs for other in held):
                line.append(self._block(held))
                held = []
            if isinstance(node.element, Join) and not self._is_known(node.element):
                yield self._remembered(line)
                line, held = [], []
                continue
            if not node.convs and not held:
                continue  # norms and so on before the first convolution stay as they are
            held.append(node)
        if held:
            line.append(self._block(held))
        yield self._remembered(line)
        for node in nodes:
            for branch in node.branches:
                yield from self._of_nodes(branch)

    def _remembered(self, line: list[Block]) -> list[Block]:
        self._blocks.update({block.convs: block for block in line})
        return line

    def _is_known(self, join: Join) -> bool:
        """Whether it begins with no activation: one that a branch alone reads the fork through is behind no element."""
        try:
            acts = self._ways.inside(join)
        except KeyError:
            return False
        return {site.id for act in acts if (site := self._sites.get(act))} <= set(self._inside(join))

    def _block(self, nodes: list[Node]) -> Block:
        while nodes[-1].element.quiet:
            nodes = nodes[:-1]
        elements = tuple(node.element for node in nodes)
        inner = [site for element in elements if isinstance(element, Join) for site in self._inside(element)]
        cut: Block | None = None
        for at, element in enumerate(elements[:-1]):
            behind = "" if element.quiet else self._behind(element)
            if behind:
                cut = cut or Block(elements[: at + 1], tuple(nodes[: at + 1]), _convs(elements), tuple(inner), behind)
                inner.append(behind)
        return Block(elements, tuple(nodes), _convs(elements), tuple(inner), self._behind(elements[-1]), cut)

    def _inside(self, join: Join) -> Iterator[str]:
        for branch in join.branches:
            for element in branch:
                if isinstance(element, Join):
                    yield from self._inside(element)
                if not element.quiet:
                    found = self._behind(element)
                    if found:
                        yield found

    def _behind(self, element: Element) -> str:
        """The droppable activation right behind an element, or ""."""
        for hop in self._ways.after(element):
            site = self._sites.get(hop.act) if hop.kind == "act" else None
            return site.id if site is not None and site.action == "keep" and not site.locked else ""
        return ""

    def _of_line(self, line: list[Block]) -> Iterator[CandidateSegment]:
        for start in range(len(line)):
            for end in range(start + 1, len(line) + 1):
                blocks = (*line[start : end - 1], line[end - 1].cut or line[end - 1])
                convs = tuple(name for block in blocks for name in block.convs)
                if len(convs) > self.max_convs or any(":" in name for name in convs):
                    break  # calls of functions are no modules to put something else in the place of
                sites = [site for block in blocks for site in block.inner]
                sites += [block.behind for block in blocks[:-1] if block.behind]
                if sites and len(convs) > 1 and all(conv in self.order for conv in convs):
                    yield self._segment(blocks, convs, tuple(dict.fromkeys(sites)))

    def _segment(self, blocks: tuple[Block, ...], convs: tuple[str, ...], sites: tuple[str, ...]) -> CandidateSegment:
        elements = tuple(element for block in blocks for element in block.elements)
        nodes = [node for block in blocks for node in block.nodes]
        spot = self._ways.spot(elements[-1])
        head = next(step.name for step in steps_of(elements))
        unit = FitTask(elements, convs, head, spot, None, spot, Kernel(convs, "auto"))
        places = [self.order[conv] for conv in convs]
        channels = getattr(self.model.get_submodule(convs[0]), "in_channels", 0)
        try:
            geometry: Geometry | str = interior_geometry(nodes, channels, len(nodes[0].sizes))
        except Refusal as refusal:
            geometry = str(refusal)
        return CandidateSegment(
            convs, sites, blocks, None, unit, geometry, min(places), max(places),
            *self._counts(convs, sites), math.prod(nodes[-1].result),
        )  # fmt: skip

    def _branch(self, residual: Residual) -> CandidateSegment | None:
        known = [self._sites.get(act) for act in residual.acts]
        if any(site is None or site.action not in ("keep", "skip") for site in known):
            return None
        convs = residual.branch.convs
        if not all(conv in self.order for conv in convs):
            return None
        places = [self.order[conv] for conv in convs]
        if max(places) - min(places) != len(places) - 1:
            return None  # something else runs in between
        sites = tuple(site.id for site in known if site is not None)
        found = CandidateSegment(
            convs, sites, (), residual, None, "a branch that goes", min(places), max(places),
            *self._counts(convs, sites), 0,
        )  # fmt: skip
        try:
            self._change(outline_of(self.model), self.plan_of([(found, "")]))
        except RewriteError:
            return None
        return found

    def _counts(self, convs: tuple[str, ...], sites: tuple[str, ...]) -> tuple[int, int, int, int]:
        """Multiply-adds, parameters, activations and their elements."""
        weights: list[Any] = [self.model.get_submodule(conv).weight for conv in convs if ":" not in conv]
        real = {site.id for site in self.plan.sites if site.is_real}
        return (
            sum(self._costs[conv] for conv in convs),
            sum(weight.numel() + len(weight) for weight in weights),
            sum(site in real for site in sites),
            sum(self._elements.get(site, 0) for site in sites),
        )


def _convs(elements: Iterable[Element]) -> tuple[str, ...]:
    return tuple(step.name for step in steps_of(elements) if step.kind == "conv")


def _multiply_adds(model: nn.Module, name: str, shape: tuple[int, ...]) -> int:
    """Of one convolution for one image; 0 where that cannot be known."""
    conv: Any = None if ":" in name else model.get_submodule(name)
    weight = getattr(conv, "weight", None)
    return 0 if weight is None or not shape else weight.numel() * math.prod(shape[1:])
