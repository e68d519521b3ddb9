"""Collect activation calls and chains from the flows of eval and train mode, with one entry for each call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import nn

from nmconv.finding.flow_analysis import AnalyzedFlow
from nmconv.finding.insertion_points import InsertionPoints
from nmconv.finding.mode_matching import local_hashes
from nmconv.flow import PLAIN_ACTS, ActCall, Flow, FlowNode, Op, is_conv, zoo
from nmconv.planning import Activation, Item
from nmconv.recording import Failure

__all__ = ["CollectedCall", "CollectedChain", "SiteCollector", "SiteKey"]

_STEPS = {Op.CONV, Op.NORM, Op.ACT, Op.ADD, Op.MUL, Op.GATED}

# An activation call in both modes: owner, method, name, kind of function, and number of the call (in eval mode if it is
# made there; negative for a train-mode call whose number another eval-mode call has).
SiteKey: TypeAlias = "tuple[str, str, str, str | None, int]"
_ChainLinks: TypeAlias = "list[tuple[Item, SiteKey | None]]"


@dataclass
class CollectedCall:
    """One activation call.

    Attributes:
        activation: The facts that planning needs.
        order: Its position in the order of execution.
        module: The module that is called; None for a functional call.
        skip: Why it is not a site, or "".
    """

    activation: Activation
    order: int
    module: nn.Module | None
    skip: str = ""


@dataclass
class CollectedChain:
    """One chain: its convolutions, each with the activation that it owns; see :class:`nmconv.planning.Chain`."""

    links: _ChainLinks
    pre: bool
    modes: str


class SiteCollector:
    """Collects activation calls and chains, first from the flows of eval mode, then from those of train mode.

    Args:
        model: Not modified.
        failures: Parts of it that do not run.

    Attributes:
        calls: All activation calls.
        chains: All chains; no convolution is in two of them, and no activation is owned twice.
        leading: Activations that precede a chain and belong to no convolution, each with the reason to keep it.
        owned: Activations that belong to a convolution.
        ambiguous: Activations whose chains differ from one run of their module to the next.
        on_parameters: Activations of parameters.
        callers: For each activation module, by ``id``, the path of each caller and the number of the call there.
        stages: For each module of timm's ``feature_info``, when the last of it runs; -1 if it never does.
        steps: Operations and modules of the main path in eval mode.
    """

    def __init__(self, model: nn.Module, failures: Sequence[Failure]) -> None:
        self.calls: dict[SiteKey, CollectedCall] = {}
        self.chains: list[CollectedChain] = []
        self.leading: dict[SiteKey, str] = {}
        self.owned: set[SiteKey] = set()
        self.ambiguous: set[SiteKey] = set()
        self.on_parameters: set[SiteKey] = set()
        self.callers: dict[int, set[tuple[str, int]]] = defaultdict(set)
        self.stages: dict[str, int] = {}
        self.steps: list[tuple[str, str]] = []
        self._model = model
        self._failures = failures
        self._convs: set[tuple[str, ...]] = set()  # in a chain
        self._hashes: dict[SiteKey, tuple[int, int]] = {}  # of eval mode: whole forward, near
        self._order = 0  # number of nodes in the flows that were added

    def add_flows(self, parts: Sequence[AnalyzedFlow], mode: str, differing: set[str]) -> None:
        """Add the flows of one mode.

        Args:
            parts: The flows; eval mode's come first.
            mode: ``eval`` or ``train``.
            differing: Names of modules whose forward makes other calls in train mode than in eval mode.
        """
        for part in parts:
            keys = self._add_calls(part, mode)
            self._add_chains(part, keys, mode, InsertionPoints(part.flow, differing))
            if mode == "eval":
                self._note_stages(part.flow)
                self.steps += _steps_of(part.flow)
            for act in part.ownership.leading:
                self.leading.setdefault(keys[act], "stands before a chain and belongs to no convolution")
            for act, reason in part.ownership.skipped.items():
                call = self.calls[keys[act]]
                if mode == "eval" or call.activation.modes == "train":
                    call.skip = call.skip or reason
            self._order += len(part.flow.nodes)
        if mode == "eval":
            for name in self._convs_not_run(parts):
                self._add_single_conv(name)

    def share_with_train(self) -> None:
        """Mark everything found in eval mode as found in both modes."""
        for call in self.calls.values():
            act = call.activation
            call.activation = replace(act, modes="both", train_call=act.call, train_step=act.step)
        for chain in self.chains:
            chain.modes = "both"

    # -- activation calls ---------------------------------------------------------------------------------------------

    def _add_calls(self, part: AnalyzedFlow, mode: str) -> dict[int, SiteKey]:
        """Add the activation calls of a flow, and return their keys by the index of the node."""
        far, near = local_hashes(part.flow), local_hashes(part.flow, near=True)
        keys: dict[int, SiteKey] = {}
        for node in part.flow.nodes:
            if node.act is None or node.op not in (Op.ACT, Op.PARAM, Op.DEAD):
                continue
            key = self._key_of(node.act, mode, (far.get(node.index, 0), near.get(node.index, 0)))
            keys[node.index] = key
            self._add_call(key, node, node.act, mode, copy=node.index in part.copies)
            if node.op is Op.PARAM:
                self.on_parameters.add(key)
            elif node.op is Op.DEAD:
                self.calls[key].skip = node.why
        return keys

    def _key_of(self, call: ActCall, mode: str, hashes: tuple[int, int]) -> SiteKey:
        """Return a call's key; in train mode, that of the eval-mode call that does the same."""
        callee = (call.frame.path, call.method, call.name, call.function)
        key = (*callee, call.call)
        if mode == "eval":
            self._hashes.setdefault(key, hashes)
            return key
        eval_calls = [other for other in self._hashes if other[:4] == callee]
        for kind in (0, 1):  # the same from the forward's start on, else the same since the last layer
            same = [other for other in eval_calls if self._hashes[other][kind] == hashes[kind]]
            if key in same:
                return key
            if same:
                return same[0]
        return (*callee, -call.call) if key in eval_calls else key

    def _add_call(self, key: SiteKey, node: FlowNode, call: ActCall, mode: str, *, copy: bool) -> None:
        if call.module is not None:
            self.callers[id(call.module)].add((call.frame.path, call.call))
        known = self.calls.get(key)
        if known is not None:
            act = known.activation
            if mode == "train" and act.modes == "eval":
                act = replace(act, modes="both", train_call=call.call, train_step=call.step)
            known.activation = replace(act, copy=act.copy or copy)
            return
        activation = Activation(
            name=call.name,
            function=call.function,
            owner=call.frame.path,
            method=call.method,
            call=call.call,
            train_call=None if mode == "eval" else call.call,
            step=call.step,
            train_step=None if mode == "eval" else call.step,
            argument_structure="",
            modes=mode,
            kind=node.kind,
            inplace=node.inplace,
            copy=copy,
            how="rewrite",
            movable=node.kind in PLAIN_ACTS if call.module is None else not call.module.state_dict(),
        )
        self.calls[key] = CollectedCall(activation, self._order + node.index, call.module)

    # -- chains -------------------------------------------------------------------------------------------------------

    def _add_chains(self, part: AnalyzedFlow, keys: dict[int, SiteKey], mode: str, ends: InsertionPoints) -> None:
        for chain in part.ownership.chains:
            links: _ChainLinks = []
            for link in chain.links:
                node = part.flow.nodes[link.conv]
                names = node.members or (node.name,)
                key = None if link.act is None else keys[link.act]
                place, reason = None, ""
                if key is None and link is chain.links[-1] and len(chain.links) > 1 and not chain.pre:
                    place, reason = ends.place(link.conv)
                links.append((Item(names, self._order + link.conv, None, link.role, place, reason), key))
            self._add_chain(links, chain.pre, mode)

    def _add_chain(self, links: _ChainLinks, pre: bool, mode: str) -> None:
        """Add a chain without the convolutions that are in another chain; owned activations keep their owner."""
        is_new = [item.convs not in self._convs for item, _ in links]
        keys = [key for _, key in links if key is not None]
        if not any(is_new):
            if mode == "train" and all(self.calls[key].activation.modes == "both" for key in keys):
                return  # the decision made for eval mode holds
            differing = self._owned_differently(links)
            self.ambiguous.update(key for key in differing if mode == "eval" or key not in self.owned)
            return
        if not all(is_new):
            links = [link for link, new in zip(links, is_new, strict=True) if new]
            if mode == "eval":
                self.ambiguous.update(keys)
                links = [(item, None) for item, _ in links]
        owned_already = {key for _, key in links if key in self.owned}
        if owned_already:
            if mode == "eval":
                self.ambiguous |= owned_already
            links = [(item, None if key in owned_already else key) for item, key in links]
        self._convs.update(item.convs for item, _ in links)
        self.owned.update(key for _, key in links if key is not None)
        self.chains.append(CollectedChain(links, pre, mode))

    def _owned_differently(self, links: _ChainLinks) -> set[SiteKey]:
        """Return the activations in which a chain differs from the known chain of the same convolutions."""
        convs, keys = zip(*((item.convs, key) for item, key in links), strict=True)
        for other in self.chains:
            if tuple(item.convs for item, _ in other.links) == convs:
                pairs = zip(keys, (key for _, key in other.links), strict=True)
                return {key for pair in pairs if pair[0] != pair[1] for key in pair if key}
        return {key for key in keys if key}

    def _add_single_conv(self, name: str) -> None:
        if not any(name in convs for convs in self._convs):
            self._order += 1
            self._add_chain([(Item((name,), self._order), None)], False, "eval")

    def _convs_not_run(self, parts: Sequence[AnalyzedFlow]) -> Iterator[str]:
        """Yield the names of convolutions in parts that do not run in eval mode."""
        called = {node.name for part in parts for node in part.flow.nodes if node.module is not None}
        for failure in self._failures:
            if failure.mode == "eval":
                part = self._model.get_submodule(failure.path)
                names = [f"{failure.path}.{name}".strip(".") for name, conv in part.named_modules() if is_conv(conv)]
                yield from (name for name in names if name not in called)

    # -- further facts ------------------------------------------------------------------------------------------------

    def _note_stages(self, flow: Flow) -> None:
        for stage in zoo.stage_names(self._model):
            self.stages.setdefault(stage, -1)
            for node in flow.nodes:
                paths = (node.name, node.frame.path if node.frame is not None else "")
                if any(path == stage or path.startswith((f"{stage}.", f"{stage}:")) for path in paths):
                    self.stages[stage] = self._order + node.index


def _steps_of(flow: Flow) -> Iterator[tuple[str, str]]:
    """Yield the operation and the module's name, or "", of each node that counts for the fingerprint."""
    for node in flow.nodes:
        if node.op in _STEPS and flow.main[node.index]:
            yield node.op.name, "" if node.module is None else node.name
