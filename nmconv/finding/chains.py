"""Assign each activation to the convolution that owns it, and link convolutions to chains (see ``docs/words.md``).

A convolution owns at most one activation: the one after it, or, in a chain that begins with an activation and whose
last convolution has none, the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nmconv.flow import Dominators, Flow, Op, summands

__all__ = ["ConvChain", "Link", "Ownership", "find_chains"]

_WITHIN_CHAIN = {Op.NORM, Op.DROP, Op.PASS, Op.PAD, Op.SCALE}
_BEFORE_CHAIN = _WITHIN_CHAIN | {Op.LAYOUT}
_NORMS = {Op.NORM, Op.SCALE}


@dataclass
class Link:
    """One convolution of a chain.

    Attributes:
        conv: Index of the convolution.
        act: Index of the activation that it owns, or None.
        role: How the activation is reached, as in :class:`nmconv.Site`.
    """

    conv: int
    act: int | None = None
    role: str = ""


@dataclass
class ConvChain:
    """A chain: its links in order, and whether activations precede their convolutions."""

    links: list[Link]
    pre: bool = False


@dataclass
class Ownership:
    """Which convolution owns which activation in one flow.

    Attributes:
        chains: All chains, in order of execution.
        leading: Activations that precede convolutions but belong to none.
        skipped: For each of the other activations without an owner, the reason.
    """

    chains: list[ConvChain]
    leading: list[int]
    skipped: dict[int, str]


@dataclass
class _Route:
    """How an activation is reached from the convolution before it.

    Attributes:
        conv: Index of the convolution.
        role: ``post``, ``residual`` or ``gated``.
        gated: Whether a gate's product lies on the way.
    """

    conv: int
    role: str
    gated: bool = False


def find_chains(flow: Flow) -> Ownership:
    """Find the chains of a flow whose gates are resolved and whose parallel branches are folded."""
    return _ChainFinder(flow).run()


@dataclass
class _ChainFinder:
    flow: Flow
    owner: dict[int, int] = field(default_factory=dict)  # activation → convolution before it
    owned: dict[int, tuple[int, str]] = field(default_factory=dict)  # convolution → activation after it, role

    def run(self) -> Ownership:
        flow = self.flow
        self.paths = Dominators(flow)
        acts = [node.index for node in flow.nodes if node.op is Op.ACT and flow.main[node.index] and not node.why]
        convs = [node.index for node in flow.nodes if node.op is Op.CONV and flow.main[node.index]]
        indirect = []
        for act in acts:
            route = self._route_to(act)
            if route is not None and route.role == "post":
                self._assign(act, route)
            else:
                indirect.append(act)
        self._link(convs)
        self._assign_indirect(indirect)
        for chain in self.chains:
            self._fill_links(chain)
        in_chain = {link.act for chain in self.chains for link in chain.links}
        leading = [act for act in acts if act not in in_chain and self.convs_after.get(act)]
        skipped = {
            node.index: self._skip_reason(node.index)
            for node in flow.nodes
            if node.op is Op.ACT and node.index not in in_chain and node.index not in leading
        }
        return Ownership(self.chains, leading, skipped)

    # -- from an activation to the convolution before it --------------------------------------------------------------

    def _assign(self, act: int, route: _Route) -> None:
        self.owner[act] = route.conv
        parallel = route.role == "post" and bool(self.flow.nodes[route.conv].members)
        self.owned[route.conv] = (act, "parallel" if parallel else route.role)

    def _assign_indirect(self, acts: list[int]) -> None:
        """Assign activations after sums and gates, in order: an earlier assignment limits the later ones."""
        for act in acts:
            route = self._route_to(act)
            if route is None or route.conv in self.owned:
                continue
            if route.gated and self._leading_act(self.chain_of[route.conv]) is not None:
                continue  # in a pre-activation chain, it belongs to the convolution after it
            self._assign(act, route)

    def _route_to(self, act: int) -> _Route | None:
        """Return the route from the convolution before an activation, or None if its value has another reader."""
        return self._route_up(self.flow.nodes[act].inputs[0], joined=False)

    def _route_up(self, index: int, *, joined: bool) -> _Route | None:
        flow, normed, gated = self.flow, False, False
        while flow.single(index):
            node = flow.nodes[index]
            if node.op is Op.CONV:
                role = "residual" if joined else "gated" if gated else "post"
                return _Route(index, role, gated)
            if node.op is Op.ADD and not normed and not joined:
                return self._route_from_longest_branch(index, gated)
            if node.op in _NORMS:
                normed = True
            elif node.op is Op.GATED:
                gated = True
                normed = False
            elif node.op not in (Op.DROP, Op.PASS, Op.PAD, Op.LAYOUT):
                return None
            index = node.inputs[0]
        return None

    def _route_from_longest_branch(self, add: int, gated: bool) -> _Route | None:
        """Return the route through the longest of a sum's branches that end in a convolution without activation."""
        operands = summands(self.flow, add)
        fork = self.paths.fork(operands)
        best: tuple[int, int, _Route] | None = None
        for operand in operands:
            route = self._route_up(operand, joined=True)
            if route is None or route.conv in self.owned:
                continue
            rank = (self.paths.convs_above(operand, fork), -route.conv)
            if best is None or rank > best[:2]:
                best = (*rank, route)
        if best is None:
            return None
        best[2].gated |= gated
        return best[2]

    # -- from a convolution to the next one ---------------------------------------------------------------------------

    def _link(self, convs: list[int]) -> None:
        """Link convolutions to chains."""
        next_conv: dict[int, int] = {}
        for conv in convs:
            previous = self._previous_conv(conv)
            if previous is not None:
                next_conv[previous] = conv
        not_first = set(next_conv.values())
        self.chains: list[ConvChain] = []
        for conv in convs:
            if conv not in not_first:
                links = [Link(conv)]
                while links[-1].conv in next_conv:
                    links.append(Link(next_conv[links[-1].conv]))
                self.chains.append(ConvChain(links))
        self.chain_of = {link.conv: chain for chain in self.chains for link in chain.links}
        self.convs_after: dict[int, list[int]] = {}
        for conv in self.chain_of:
            for act in self._acts_before(conv):
                self.convs_after.setdefault(act, []).append(conv)

    def _previous_conv(self, conv: int) -> int | None:
        """Return the preceding convolution if it owns the activation between the two and there is no fork."""
        first_act = None
        index = self.flow.nodes[conv].inputs[0]
        while self.flow.single(index):
            node = self.flow.nodes[index]
            if node.op is Op.CONV:
                return index if first_act is not None and self.owner.get(first_act) == index else None
            if node.op is Op.ACT:
                first_act = index
            elif node.op not in _WITHIN_CHAIN:
                return None
            index = node.inputs[0]
        return None

    # -- the activation before a chain --------------------------------------------------------------------------------

    def _acts_before(self, conv: int) -> Iterator[int]:
        """Yield the activations before a convolution, nearest first, up to another layer."""
        index = self.flow.nodes[conv].inputs[0]
        while True:
            node = self.flow.nodes[index]
            if node.op is Op.ACT:
                yield index
            elif node.op not in _BEFORE_CHAIN:
                return
            index = node.inputs[0]

    def _leading_act(self, chain: ConvChain) -> int | None:
        """Return the unowned activation that a chain begins with, unless a longer branch begins with it, too."""
        head = chain.links[0].conv
        act = next(self._acts_before(head), None)
        if act is None or act in self.owner or self.flow.nodes[act].why:
            return None
        rivals = [conv for conv in self.convs_after[act] if next(self._acts_before(conv), None) == act]
        if len(rivals) == 1:
            return act
        join = self.paths.meeting(rivals)
        longest = max(rivals, key=lambda conv: (self.paths.convs_below(conv, join), -conv))
        return act if longest == head else None

    def _fill_links(self, chain: ConvChain) -> None:
        """Enter the activation that each convolution of a chain owns."""
        after = [self.owned.get(link.conv) for link in chain.links]
        lead = self._leading_act(chain)
        chain.pre = lead is not None and after[-1] is None
        if chain.pre:
            before = [lead, *(pair[0] for pair in after[:-1] if pair is not None)]
            for link, act in zip(chain.links, before, strict=True):
                link.act, link.role = act, "pre"
            return
        for link, pair in zip(chain.links, after, strict=True):
            if pair is not None:
                link.act, link.role = pair

    # -- activations without an owner ---------------------------------------------------------------------------------

    def _skip_reason(self, act: int) -> str:
        flow = self.flow
        if flow.nodes[act].why:
            return flow.nodes[act].why
        if not flow.main[act] and not flow.gating[act]:
            return "nothing that is returned depends on it"
        if not flow.main[act]:
            return "gate: it reaches the main path only as a factor (squeeze-excite, attention)"
        index = flow.nodes[act].inputs[0]
        while flow.nodes[index].op in _BEFORE_CHAIN:
            index = flow.nodes[index].inputs[0]
        source = flow.nodes[index]
        if source.op is Op.LINEAR:
            return "it activates a linear layer, which counts only with linear=True"
        if source.op in (Op.CONV, Op.ADD, Op.GATED):
            return "the value before it has another reader, or its convolution an activation already, and none follows"
        return "no convolution next to it"
