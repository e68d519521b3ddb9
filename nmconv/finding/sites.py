"""Both modes' analyses in one: which calls are the same, what every activation is, all as plain data for planning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from nmconv.finding.analysis import AnalyzedRecording, flows_of, understood
from nmconv.finding.insertion_points import InsertionPoints
from nmconv.finding.mode_matching import local_hashes
from nmconv.finding.module_users import Holders
from nmconv.flow import (
    PLAIN_ACTS,
    Arguments,
    Flow,
    FlowNode,
    ModuleCall,
    Op,
    act_kind,
    is_activation,
    is_conv,
    is_sequential,
    leaf_op,
    takes_of,
    zoo,
)
from nmconv.planning import Activation, Chain, Item, Place, Structure, Untraced
from nmconv.recording import Failure, Recordings

__all__ = ["alike", "read"]

_MODES = (False, True)
_STEPS = {Op.CONV, Op.NORM, Op.ACT, Op.ADD, Op.MUL, Op.GATED}
_Callee = str | tuple[str, str]
_Key = tuple[str, str, str, "str | None", int]


@dataclass
class _Seen:
    """What is known of one activation call."""

    activation: Activation
    place: int  # order of execution
    module: nn.Module | None
    skip: str = ""


@dataclass
class _Builder:
    model: nn.Module
    recordings: Recordings
    linear: bool
    seen: dict[_Key, _Seen] = field(default_factory=dict)
    chains: list[tuple[list[tuple[Item, _Key | None]], bool, str]] = field(default_factory=list)
    leading: dict[_Key, str] = field(default_factory=dict)
    convs: set[tuple[str, ...]] = field(default_factory=set)
    mixed: set[_Key] = field(default_factory=set)
    owned: set[_Key] = field(default_factory=set)
    constant: set[_Key] = field(default_factory=set)  # calls on parameters
    local: dict[_Key, tuple[int, int]] = field(default_factory=dict)
    callers: dict[int, set[tuple[str, int]]] = field(default_factory=lambda: defaultdict(set))
    arguments: dict[_Callee, list[ModuleCall | Arguments]] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)
    odd: frozenset[str] = frozenset()
    stages: dict[str, int] = field(default_factory=dict)
    order: int = 0  # of execution: what was recorded before counts on

    def build(self) -> Structure:
        flows = [flows_of(self.model, self.recordings, training=training, linear=self.linear) for training in _MODES]
        differing = _differing(*flows)
        same = alike(*flows)  # what is understood of a flow changes it
        self._take([understood(flow) for flow in flows[0]], "eval", differing)
        if flows[1] and not same:
            self._take([understood(flow) for flow in flows[1]], "train", differing)
        elif flows[1]:
            for seen in self.seen.values():
                seen.activation = replace(
                    seen.activation,
                    modes="both",
                    train_call=seen.activation.call,
                    train_step=seen.activation.step,
                )
            self.chains = [(items, pre, "both") for items, pre, _ in self.chains]
        return self._finish([flow for found in flows for flow in found])

    # -- one mode -----------------------------------------------------------------------------------------------------

    def _take(self, parts: list[AnalyzedRecording], mode: str, differing: set[str]) -> None:
        for part in parts:
            flow, ownership = part.flow, part.ownership
            ends = InsertionPoints(flow, differing)
            keys: dict[int, _Key] = {}
            far, near = local_hashes(flow), local_hashes(flow, near=True)
            for node in flow.nodes:
                if node.op in (Op.ACT, Op.PARAM, Op.DEAD) and node.act is not None:
                    key = self._key(node, mode, (far.get(node.index, 0), near.get(node.index, 0)))
                    keys[node.index] = key
                    self._see(key, node, node.index in part.copies, mode)
                    if node.op is Op.PARAM:
                        self.constant.add(key)
                    elif node.op is Op.DEAD:
                        self.seen[key].skip = node.why
            self._take_chains(part, keys, mode, ends)
            if mode == "eval":
                self._note_stages(flow)
                self.steps += [
                    (node.op.name, "" if node.module is None else node.name)
                    for node in flow.nodes
                    if node.op in _STEPS and flow.main[node.index]
                ]
            for act in ownership.leading:
                self.leading.setdefault(keys[act], "stands before a chain and belongs to no convolution")
            for act, reason in ownership.skipped.items():
                if mode == "eval" or self.seen[keys[act]].activation.modes == "train":
                    self.seen[keys[act]].skip = self.seen[keys[act]].skip or reason
            self.order += len(flow.nodes)
        if mode == "eval":
            for name in self._lone_convs(parts):
                self._lone(name)

    def _lone_convs(self, parts: list[AnalyzedRecording]) -> Iterator[str]:
        """Convolutions in parts that do not run in eval mode."""
        called = {node.name for part in parts for node in part.flow.nodes if node.module is not None}
        for failure in self.recordings.failures:
            if failure.mode == "eval":
                part = self.model.get_submodule(failure.path)
                names = [f"{failure.path}.{name}".strip(".") for name, conv in part.named_modules() if is_conv(conv)]
                yield from (name for name in names if name not in called)

    def _note_stages(self, flow: Flow) -> None:
        """When the last of each of ``feature_info``'s modules runs."""
        for stage in zoo.stage_names(self.model):
            self.stages.setdefault(stage, -1)
            for node in flow.nodes:
                paths = (node.name, node.frame.path if node.frame is not None else "")
                if any(path == stage or path.startswith((f"{stage}.", f"{stage}:")) for path in paths):
                    self.stages[stage] = self.order + node.index

    def _key(self, node: FlowNode, mode: str, local: tuple[int, int]) -> _Key:
        """What identifies the call in both modes: in train mode, the eval-mode call that does the same."""
        call = node.act
        assert call is not None
        base = (call.frame.path, call.method, call.name, call.function)
        key = (*base, call.call)
        if mode == "eval":
            self.local.setdefault(key, local)
            return key
        calls = [other for other in self.local if other[:4] == base]
        for kind in (0, 1):  # the same from the forward's start on, else the same since the last layer
            alike = [other for other in calls if self.local[other][kind] == local[kind]]
            if key in alike:
                return key
            if alike:
                return alike[0]
        return (*base, -call.call) if key in calls else key

    def _see(self, key: _Key, node: FlowNode, copy: bool, mode: str) -> None:
        """Note the call."""
        call = node.act
        assert call is not None
        if call.module is not None:
            self.callers[id(call.module)].add((call.frame.path, call.call))
        known = self.seen.get(key)
        if known is not None:
            old = known.activation
            if mode == "train" and old.modes == "eval":
                old = replace(old, modes="both", train_call=call.call, train_step=call.step)
            known.activation = replace(old, copy=old.copy or copy)
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
            takes="",
            modes=mode,
            kind=node.kind,
            inplace=node.inplace,
            copy=copy,
            how="rewrite",
            movable=node.kind in PLAIN_ACTS if call.module is None else not call.module.state_dict(),
        )
        self.seen[key] = _Seen(activation, self.order + node.index, call.module)

    def _take_chains(self, part: AnalyzedRecording, keys: dict[int, _Key], mode: str, ends: InsertionPoints) -> None:
        flow = part.flow
        for chain in part.ownership.chains:
            items: list[tuple[Item, _Key | None]] = []
            for link in chain.links:
                node = flow.nodes[link.conv]
                names = node.members or (node.name,)
                key = None if link.act is None else keys[link.act]
                place, reason = (None, "")
                if key is None and link is chain.links[-1] and len(chain.links) > 1 and not chain.pre:
                    place, reason = ends.place(link.conv)
                items.append((Item(names, self.order + link.conv, None, link.role, place, reason), key))
            self._add(items, chain.pre, mode)

    def _add(self, items: list[tuple[Item, _Key | None]], pre: bool, mode: str) -> None:
        fresh = [item.convs not in self.convs for item, _ in items]
        used = [key for _, key in items if key is not None]
        if not any(fresh):
            if mode == "train" and all(self.seen[key].activation.modes == "both" for key in used):
                return  # eval mode has decided
            self.mixed.update(key for key in self._other_surroundings(items) if mode == "eval" or key not in self.owned)
            return
        if mode == "train" and not all(fresh):
            # Convolutions that eval mode has decided on keep their decision; the others make the chain.
            items = [pair for pair, new in zip(items, fresh, strict=True) if new]
        elif not all(fresh):
            self.mixed.update(used)
            items = [(item, None) for (item, _), new in zip(items, fresh, strict=True) if new]
        again = {key for _, key in items if key in self.owned}
        if again:
            if mode == "eval":
                self.mixed |= again
            items = [(item, None if key in again else key) for item, key in items]
        self.convs.update(item.convs for item, _ in items)
        self.owned.update(key for _, key in items if key is not None)
        self.chains.append((items, pre, mode))

    def _other_surroundings(self, items: list[tuple[Item, _Key | None]]) -> set[_Key]:
        """Activations that a chain, of convolutions that are all known already, has otherwise than before."""
        convs, keys = zip(*((item.convs, key) for item, key in items), strict=True)
        for other, _, _ in self.chains:
            if tuple(item.convs for item, _ in other) == convs:
                before = [key for _, key in other]
                return {key for pair in zip(keys, before, strict=True) if pair[0] != pair[1] for key in pair if key}
        return {key for key in keys if key}

    def _lone(self, name: str) -> None:
        if (name,) not in self.convs and not any(name in convs for convs in self.convs):
            self.order += 1
            self._add([(Item((name,), self.order), None)], False, "eval")

    # -- both ---------------------------------------------------------------------------------------------------------

    def _finish(self, flows: list[Flow]) -> Structure:
        self.holders = Holders(self.model)
        ordered = sorted(self.seen, key=lambda key: self.seen[key].place)
        index = {key: at for at, key in enumerate(ordered)}
        modes = {key: seen.activation.modes for key, seen in self.seen.items()}
        unpaired = {key[:4] for key in modes if modes[key] == "eval"} & {
            key[:4] for key in modes if modes[key] == "train"
        }
        for key in modes:
            if key[:4] in unpaired and modes[key] != "both":
                self.mixed.add(key)
        self.mixed |= self.constant & self.owned
        for key in self.constant:
            self.seen[key].skip = self.seen[key].skip or "it activates a parameter, not what a convolution makes"
        for key in sorted(self.mixed, key=index.__getitem__):  # a set has another order in each process
            self.leading[key] = "its module is called in surroundings that differ, and one decision must serve all"
        stays = {key: reason for key, reason in self.leading.items() if key not in self.owned or key in self.mixed}
        self.arguments = _calls(flows)
        self.odd = frozenset[str]().union(
            *(flow.odd for flow in flows)
        )  # whose children return other things than one tensor: a single call of a child would not show it
        chains = []
        for items, pre, mode in self.chains:
            kept = tuple(
                replace(
                    item,
                    act=None if key is None or key in stays else index[key],
                    end=None if item.end is None else self._with_arguments(item.end),
                )
                for item, key in items
            )
            chains.append(Chain(kept, pre, mode))
        activations = [self._described(key) for key in ordered]
        activations += self._unseen()
        return Structure(
            model=type(self.model).__name__,
            activations=tuple(activations),
            chains=tuple(chains),
            leading=tuple((index[key], reason) for key, reason in stays.items()),
            stages=tuple(self.stages.values()),
            classifier=zoo.classifier_names(self.model),
            steps=tuple(self.steps),
            untraced=tuple(map(_untraced, self.recordings.failures)),
        )

    def _described(self, key: _Key) -> Activation:
        seen = self.seen[key]
        skip = "" if key in self.owned else seen.skip
        how = self._how(seen, self.holders)
        takes = ""
        if how == "rewrite":
            method = seen.activation.method
            of = seen.activation.owner if method == "forward" else (seen.activation.owner, method)
            takes = "" if seen.activation.owner in self.odd else takes_of(self.arguments.get(of, ()))
        return replace(seen.activation, how=how, takes=takes, skip=skip)

    def _with_arguments(self, place: Place) -> Place:
        if place.how != "rewrite" or place.owner in self.odd:
            return place
        return replace(place, takes=takes_of(self.arguments.get(place.owner, ())))

    def _how(self, seen: _Seen, holders: Holders) -> str:
        """``swap`` where replacing one slot changes this call and no other."""
        if seen.module is None or holders.is_kept_elsewhere(seen.module):
            return "rewrite"
        callers = self.callers[id(seen.module)]
        owner = seen.activation.owner
        inside = seen.activation.name.rpartition(".")[0] == owner and is_sequential(self.model.get_submodule(owner))
        if inside and all(path == owner or holders.slots(path, seen.module) == 1 for path, _ in callers):
            return "swap"  # a Sequential calls each slot once
        if len(callers) == 1 and holders.count(seen.module) == 1:
            return "swap"
        # Several modules hold it: replacing this one's slot is enough if everybody calls what is in a slot of its own.
        mine = [path for path, _ in callers].count(seen.activation.owner) == 1
        own = all(holders.slots(path, seen.module) == 1 for path, _ in callers)
        return "swap" if mine and own else "rewrite"

    def _layer_around(self, name: str) -> str:
        """The name of the leaf that holds a module, or ""."""
        while "." in name:
            name = name.rpartition(".")[0]
            if leaf_op(self.model.get_submodule(name)) is not None:
                return name
        return ""

    def _unseen(self) -> Iterator[Activation]:
        """Activation modules that no recording has met."""
        broken = [failure.path for failure in self.recordings.failures]
        met = {id(seen.module) for seen in self.seen.values()}
        for name, module in self.model.named_modules():
            if is_activation(module) and id(module) not in met:
                parents = [path for path in broken if not path or name.startswith(f"{path}.")]
                owner = max(parents, key=len, default="")
                layer = self._layer_around(name)
                reason = "the forward never calls it"
                if parents:
                    reason = f"{owner or 'the model'} calls it or not: it does not run"
                elif layer:
                    reason = f"a part of {layer}, which is one indivisible layer"
                yield Activation(
                    name=name,
                    function=None,
                    owner=name.rpartition(".")[0],
                    method="forward",
                    call=0,
                    train_call=0,
                    step=0,
                    train_step=0,
                    takes="",
                    modes="both",
                    kind=act_kind(module),
                    inplace=getattr(module, "inplace", False) is True,
                    copy=False,
                    how="swap",
                    movable=False,
                    skip=reason,
                )


def _calls(flows: Iterable[Flow]) -> dict[_Callee, list[ModuleCall | Arguments]]:
    """From every module's qualified name, or that and a method's, to the arguments of all its calls."""
    calls: dict[_Callee, list[ModuleCall | Arguments]] = defaultdict(list)
    for flow in flows:
        for frame in flow.frames:
            calls[frame.path].append(frame)
        for (ran, method), held in flow.recording.helped.items():
            calls[ran.path, method].append(Arguments(held, {}))
    return calls


def _differing(first: Iterable[Flow], second: Iterable[Flow]) -> set[str]:
    """Names of modules that run in both modes and make other calls in one than in the other."""
    calls: list[dict[str, list[tuple[str, int]]]] = []
    for flows in (first, second):
        made: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for flow in flows:
            for node in flow.nodes:
                if node.frame is not None and node.op is not Op.PARAM and not zoo.is_norm_act(node.frame.module):
                    made[node.frame.path].append((node.label, node.number))
        calls.append(made)
    return {path for path, made in calls[0].items() if path in calls[1] and calls[1][path] != made}


def alike(first: Sequence[Flow], second: Sequence[Flow]) -> bool:
    """Whether the flows of two modes are the same, call by call."""
    return len(first) == len(second) and all(
        list(map(_told, one.nodes)) == list(map(_told, other.nodes)) for one, other in zip(first, second, strict=True)
    )


def _told(node: FlowNode) -> tuple[Any, ...]:
    path = node.frame.path if node.frame is not None else ""
    made = node.op, node.name, node.kind, node.number, node.method, path, node.lines, node.shape
    return *made, node.inputs, node.sides, node.exposed, node.inplace, node.view, node.partial


def _untraced(failure: Failure) -> Untraced:
    hint = f"Pass example_inputs that it can be called with in {failure.mode} mode, too"
    return Untraced(failure.path, f"it does not run in {failure.mode} mode ({failure.reason})", hint)


def read(model: nn.Module, recordings: Recordings, *, linear: bool = False) -> Structure:
    """What a model's recordings show.

    Args:
        model: Any module; read only.
        recordings: Of it.
        linear: Whether ``nn.Linear`` counts as a convolution.
    """
    return _Builder(model, recordings, linear).build()
