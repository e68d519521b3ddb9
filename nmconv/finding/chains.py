"""Who owns which activation, and which convolutions follow one another: the words of the documentation, as code.

A convolution owns at most one activation: the one after it, or, in a chain that begins with an activation and whose
last convolution has none, the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nmconv.flow import Dominators, Flow, Op, summands

__all__ = ["ChainFound", "Link", "Ownership", "own"]

_BETWEEN = {Op.NORM, Op.DROP, Op.PASS, Op.PAD, Op.SCALE}
_NORMS = {Op.NORM, Op.SCALE}


@dataclass
class Link:
    """A convolution of a chain, the activation it owns, and how that is reached."""

    conv: int
    act: int | None = None
    role: str = ""


@dataclass
class ChainFound:
    """A chain: its links in order, and whether activations stand before their convolutions."""

    links: list[Link]
    pre: bool = False


@dataclass
class Ownership:
    """All chains of a flow in order of execution, leading activations that belong to nobody, and why others skip."""

    chains: list[ChainFound]
    leading: list[int]
    skipped: dict[int, str]


@dataclass
class _Route:
    """What lies between a convolution and an activation after it."""

    conv: int
    role: str
    gated: bool = False


def own(flow: Flow) -> Ownership:
    """Find ownership and chains on a flow whose gates are resolved and parallel branches folded."""
    return _Finder(flow).run()


@dataclass
class _Finder:
    flow: Flow
    owner: dict[int, int] = field(default_factory=dict)  # activation → convolution before it
    owned: dict[int, tuple[int, str]] = field(default_factory=dict)  # convolution → activation after it, role

    def run(self) -> Ownership:
        flow = self.flow
        self.paths = Dominators(flow)
        self.acts = [node.index for node in flow.nodes if node.op is Op.ACT and flow.main[node.index] and not node.why]
        convs = [node.index for node in flow.nodes if node.op is Op.CONV and flow.main[node.index]]
        indirect = []
        for act in self.acts:
            route = self._back(act)
            if route is not None and route.role == "post":
                self._give(act, route)
            else:
                indirect.append(act)
        self._chain(convs)
        self.heads = {chain.links[0].conv: chain for chain in self.chains}
        self.chain_of = {link.conv: chain for chain in self.chains for link in chain.links}
        self.fed = self._fed()
        for act in indirect:  # in order: what an earlier one belongs to decides what a later one can
            route = self._back(act)
            if route is None or route.conv in self.owned:
                continue
            if route.gated and self._lead(self.chain_of[route.conv]) is not None:
                continue  # a pre-activation chain: it belongs to the convolution after it
            self._give(act, route)
        for chain in self.chains:
            self._settle(chain)
        taken = {link.act for chain in self.chains for link in chain.links}
        leading = [act for act in self.acts if act not in taken and self.fed.get(act)]
        skipped = {
            node.index: self._why(node.index)
            for node in flow.nodes
            if node.op is Op.ACT and node.index not in taken and node.index not in leading
        }
        return Ownership(self.chains, leading, skipped)

    # -- activation → convolution before it ---------------------------------------------------------------------------

    def _give(self, act: int, route: _Route) -> None:
        self.owner[act] = route.conv
        parallel = route.role == "post" and bool(self.flow.nodes[route.conv].members)
        self.owned[route.conv] = (act, "parallel" if parallel else route.role)

    def _back(self, act: int) -> _Route | None:
        """The convolution whose value the activation activates, if nobody else reads that value."""
        return self._back_from(self.flow.nodes[act].inputs[0], joined=False)

    def _back_from(self, at: int, *, joined: bool) -> _Route | None:
        flow, normed, gated = self.flow, False, False
        while flow.single(at):
            node = flow.nodes[at]
            if node.op is Op.CONV:
                role = "residual" if joined else "gated" if gated else "post"
                return _Route(at, role, gated)
            if node.op is Op.ADD and not normed and not joined:
                return self._longest(at, gated)
            if node.op in _NORMS:
                normed = True
            elif node.op is Op.GATED:
                gated = True
                normed = False
            elif node.op not in (Op.DROP, Op.PASS, Op.PAD, Op.LAYOUT):
                return None
            at = node.inputs[0]
        return None

    def _longest(self, add: int, gated: bool) -> _Route | None:
        """The branch of a join with the most convolutions, of those that end in a convolution without activation."""
        operands = summands(self.flow, add)
        fork = self.paths.fork(operands)
        best: tuple[int, int, _Route] | None = None
        for operand in operands:
            route = self._back_from(operand, joined=True)
            if route is None or route.conv in self.owned:
                continue
            rank = (self.paths.convs_above(operand, fork), -route.conv)
            if best is None or rank > best[:2]:
                best = (*rank, route)
        if best is None:
            return None
        best[2].gated |= gated
        return best[2]

    # -- convolution → convolution ------------------------------------------------------------------------------------

    def _chain(self, convs: list[int]) -> None:
        following: dict[int, int] = {}
        for conv in convs:
            before = self._previous(conv)
            if before is not None:
                following[before] = conv
        inner = set(following.values())
        self.chains: list[ChainFound] = []
        for conv in convs:
            if conv not in inner:
                links = [Link(conv)]
                while links[-1].conv in following:
                    links.append(Link(following[links[-1].conv]))
                self.chains.append(ChainFound(links))

    def _previous(self, conv: int) -> int | None:
        """The convolution right before, with an activation of its own between, and no fork."""
        first = None
        at = self.flow.nodes[conv].inputs[0]
        while self.flow.single(at):
            node = self.flow.nodes[at]
            if node.op is Op.CONV:
                return at if first is not None and self.owner.get(first) == at else None
            if node.op is Op.ACT:
                first = at
            elif node.op not in _BETWEEN:
                return None
            at = node.inputs[0]
        return None

    # -- activation before a chain ------------------------------------------------------------------------------------

    def _feeding(self, conv: int) -> Iterator[int]:
        """Activations before a convolution with nothing but norms, layout and the like between."""
        at = self.flow.nodes[conv].inputs[0]
        while True:
            node = self.flow.nodes[at]
            if node.op is Op.ACT:
                yield at
            elif node.op not in _BETWEEN | {Op.LAYOUT}:
                return
            at = node.inputs[0]

    def _fed(self) -> dict[int, list[int]]:
        """From each activation to the convolutions right after it."""
        fed: dict[int, list[int]] = {}
        for conv in self.chain_of:
            for act in self._feeding(conv):
                fed.setdefault(act, []).append(conv)
        return fed

    def _lead(self, chain: ChainFound) -> int | None:
        """The activation that a chain begins with: nobody else's, and no longer branch's."""
        head = chain.links[0].conv
        act = next(self._feeding(head), None)
        if act is None or act in self.owner or self.flow.nodes[act].why:
            return None
        rivals = [conv for conv in self.fed[act] if next(self._feeding(conv), None) == act]
        if len(rivals) == 1:
            return act
        join = self.paths.meeting(rivals)
        best = max(rivals, key=lambda conv: (self.paths.convs_below(conv, join), -conv))
        return act if best == head else None

    def _settle(self, chain: ChainFound) -> None:
        """Write down what each convolution owns."""
        after = [self.owned.get(link.conv) for link in chain.links]
        lead = self._lead(chain)
        chain.pre = lead is not None and after[-1] is None
        if chain.pre:
            before = [lead, *(pair[0] for pair in after[:-1] if pair is not None)]
            for link, act in zip(chain.links, before, strict=True):
                link.act, link.role = act, "pre"
            return
        for link, pair in zip(chain.links, after, strict=True):
            if pair is not None:
                link.act, link.role = pair

    # -- and the rest -------------------------------------------------------------------------------------------------

    def _why(self, act: int) -> str:
        """Why an activation is no site."""
        flow = self.flow
        if flow.nodes[act].why:
            return flow.nodes[act].why
        if not flow.main[act] and not flow.gating[act]:
            return "nothing that is returned depends on it"
        if not flow.main[act]:
            return "gate: it reaches the main path only as a factor (squeeze-excite, attention)"
        at = flow.nodes[act].inputs[0]
        while flow.nodes[at].op in _BETWEEN | {Op.LAYOUT}:
            at = flow.nodes[at].inputs[0]
        source = flow.nodes[at]
        if source.op is Op.LINEAR:
            return "it activates a linear layer, which counts only with linear=True"
        if source.op in (Op.CONV, Op.ADD, Op.GATED):
            return "the value before it has another reader, or its convolution an activation already, and none follows"
        return "no convolution next to it"
