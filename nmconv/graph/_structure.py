"""Both modes' analyses in one: which calls are the same, what every activation is, all as plain data for planning."""

from __future__ import annotations

import linecache
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.fx.proxy import TraceError

from nmconv.graph import _zoo
from nmconv.graph._agree import disagreement
from nmconv.graph._analysis import Analysis, Called, Traced, analyse, counted
from nmconv.graph._flow import Flow, FlowNode
from nmconv.graph._holders import Holders
from nmconv.graph._lower import lower
from nmconv.graph._modules import act_kind, is_activation, is_sequential, leaf_op
from nmconv.graph._ops import PLAIN_ACTS, Op
from nmconv.graph._places import Ends
from nmconv.graph._records import Arguments
from nmconv.graph._same import local_hashes
from nmconv.graph._takes import takes_of
from nmconv.graph._values import Unknown
from nmconv.planning import Activation, Chain, Item, Place, Structure, Untraced
from nmconv.recording import Recording

__all__ = ["Reading", "read"]

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
    arguments: dict[_Callee, list[Arguments]] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)
    odd: set[str] = field(default_factory=set)
    stages: dict[str, int] = field(default_factory=dict)
    order: int = 0  # of execution: what was traced before counts on

    def build(self, example_inputs: Any) -> Reading:
        first = analyse(self.model, training=False, linear=self.linear, example_inputs=example_inputs)
        self._take(first, "eval")
        analyses = [first]
        if first.mode_readers:
            second = analyse(self.model, training=True, linear=self.linear, example_inputs=example_inputs, before=first)
            analyses.append(second)
            self._take(second, "train")
        else:
            for seen in self.seen.values():
                seen.activation = replace(
                    seen.activation,
                    modes="both",
                    train_call=seen.activation.call,
                    train_step=seen.activation.step,
                )
            self.chains = [(items, pre, "both") for items, pre, _ in self.chains]
        calls = {bool(training): counted(analysis) for training, analysis in enumerate(analyses)}
        traces = {bool(training): analysis for training, analysis in enumerate(analyses) if not analysis.broken}
        return Reading(self._finish(analyses, example_inputs is not None), calls, self.model, traces)

    # -- one mode -----------------------------------------------------------------------------------------------------

    def _take(self, analysis: Analysis, mode: str) -> None:
        for traced in analysis.traced:
            ends = Ends(traced.flow, analysis.mode_readers, traced.tracer.methods)
            keys: dict[int, _Key] = {}
            far, near = local_hashes(traced.flow), local_hashes(traced.flow, near=True)
            repeated: set[_Key] = set()
            for node in traced.flow.nodes:
                if node.op in (Op.ACT, Op.PARAM) and node.act is not None:
                    key = self._key(node, mode, (far.get(node.index, 0), near.get(node.index, 0)))
                    keys[node.index] = key
                    if self._see(key, node, traced, mode):
                        repeated.add(key)
                    if node.op is Op.PARAM:
                        self.constant.add(key)
            self._take_chains(traced, keys, mode, ends)
            if mode == "eval":
                self._note_stages(traced.flow)
                self.steps += [
                    (node.op.name, node.name)
                    for node in traced.flow.nodes
                    if node.op in _STEPS and traced.flow.main[node.index]
                ]
            for act in traced.ownership.leading:
                self.leading.setdefault(keys[act], "stands before a chain and belongs to no convolution")
            for act, reason in traced.ownership.skipped.items():
                if mode == "eval" or self.seen[keys[act]].activation.modes == "train":
                    self.seen[keys[act]].skip = self.seen[keys[act]].skip or reason
            self.order += len(traced.flow.nodes)
        if mode == "eval":
            for name in analysis.lone:
                self._lone(name)

    def _note_stages(self, flow: Flow) -> None:
        """When the last of each of ``feature_info``'s modules runs."""
        for stage in _zoo.stage_names(self.model):
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

    def _see(self, key: _Key, node: FlowNode, traced: Traced, mode: str) -> bool:
        """Note the call; True if it was there already in this mode (its owner is called several times)."""
        call = node.act
        assert call is not None
        if call.module is not None:
            self.callers[id(call.module)].add((call.frame.path, call.call))
        copy = node.index in traced.copies
        known = self.seen.get(key)
        if known is not None:
            old = known.activation
            again = mode == "eval" or old.modes != "eval"
            if mode == "train" and old.modes == "eval":
                old = replace(old, modes="both", train_call=call.call, train_step=call.step)
            known.activation = replace(old, copy=old.copy or copy)
            return again
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
        return False

    def _take_chains(self, traced: Traced, keys: dict[int, _Key], mode: str, ends: Ends) -> None:
        flow = traced.flow
        for chain in traced.ownership.chains:
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
            same = [[key for _, key in other] for other, _, _ in self.chains]
            if [key for _, key in items] not in same:  # the same convolutions in other surroundings
                self.mixed.update(key for key in used if mode == "eval" or key not in self.owned)
                known = {key for _, key in items if key in self.owned}
                if mode == "eval":
                    self.mixed |= known
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

    def _lone(self, name: str) -> None:
        if (name,) not in self.convs and not any(name in convs for convs in self.convs):
            self.order += 1
            self._add([(Item((name,), self.order), None)], False, "eval")

    # -- both ---------------------------------------------------------------------------------------------------------

    def _finish(self, analyses: Iterable[Analysis], examples: bool) -> Structure:
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
        for key in self.mixed:
            self.leading[key] = "its module is called in surroundings that differ, and one decision must serve all"
        stays = {key: reason for key, reason in self.leading.items() if key not in self.owned or key in self.mixed}
        self.arguments = _calls(analyses)
        self.odd = {
            path for analysis in analyses for traced in analysis.traced for path in traced.tracer.odd
        }  # whose children return other things than one tensor: a single call of a child would not show it
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
        broken: dict[str, tuple[BaseException, str]] = {}
        for analysis, mode in zip(analyses, ("", " (in train mode only)"), strict=False):
            for name, error in analysis.broken.items():
                broken.setdefault(name, (error, mode))
        activations += self._unseen(broken)
        return Structure(
            model=type(self.model).__name__,
            activations=tuple(activations),
            chains=tuple(chains),
            leading=tuple((index[key], reason) for key, reason in stays.items()),
            stages=tuple(self.stages.values()),
            classifier=_zoo.classifier_names(self.model),
            steps=tuple(self.steps),
            untraced=tuple(_untraced(name, *why, examples) for name, why in broken.items()),
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

    def _unseen(self, broken: Iterable[str]) -> Iterator[Activation]:
        """Activation modules that no trace has met."""
        met = {id(seen.module) for seen in self.seen.values()}
        for name, module in self.model.named_modules():
            if is_activation(module) and id(module) not in met:
                parents = [path for path in broken if not path or name.startswith(f"{path}.")]
                owner = max(parents, key=len, default="")
                layer = self._layer_around(name)
                reason = "the forward never calls it"
                if parents:
                    reason = f"{owner or 'the model'} calls it or not: its forward cannot be traced"
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


def _calls(analyses: Iterable[Analysis]) -> dict[_Callee, list[Arguments]]:
    """From every traced module's qualified name, or that and a method's, to the arguments of all its calls."""
    calls: dict[_Callee, list[Arguments]] = {}
    for analysis in analyses:
        for traced in analysis.traced:
            for path, arguments in traced.tracer.completed.items():
                calls.setdefault(path, []).extend(arguments)
            for method, arguments in traced.tracer.helped.items():
                calls.setdefault(method, []).extend(arguments)
            calls.setdefault(traced.tracer.stack[0].path, []).append(traced.tracer.given)
    return calls


def _untraced(name: str, error: BaseException, mode: str, examples: bool) -> Untraced:
    text = str(error).strip().split("\n")[0][:200]
    hint = "What it does itself is left as it is"
    if isinstance(error, Unknown) and not examples:
        hint = "Pass example_inputs to reach it"
    elif not isinstance(error, (Unknown, TraceError)):
        hint = (
            "Forwards are read with stand-ins for tensors and sizes, which that line does not take: put the line into "
            "a submodule of its own, which then counts as one step, or let methods of tensors do it (x.new_zeros)"
        )
        hint += "" if examples else "; or pass example_inputs, if the model is not called with one image"
    reason = f"{type(error).__name__}: {text}{_line_of(error)}{mode}"
    return Untraced(name, reason, f"{hint}; its children were analysed one by one")


def _line_of(error: BaseException) -> str:
    """The innermost line of the model's own code that an error came from."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        home = str(frame.f_globals.get("__name__")).partition(".")[0]
        if home not in _NOT_THE_MODELS:
            text = linecache.getline(frame.f_code.co_filename, line, frame.f_globals).strip()
            return f", in {frame.f_code.co_name}, line {line}" + (f": {text[:120]}" if text else "")
    return ""


_NOT_THE_MODELS = ("torch", "numpy", __name__.partition(".")[0])


@dataclass(frozen=True)
class Reading:
    """What was read off a model.

    Attributes:
        structure: Its chains and activations, as plain data.
        calls: In eval mode (False), and where it differs in train mode (True): how often each activation is called
            by whom.
        model: What was read.
        traces: By mode, as ``calls``; without those of modes in which a part could not be traced.
    """

    structure: Structure
    calls: dict[bool, Counter[Called]]
    model: nn.Module
    traces: dict[bool, Analysis]

    def disagreement(self, recording: Recording) -> tuple[str, str]:
        """Where the model, called in earnest, goes another way than the trace did: the module, and what, in words."""
        training = recording.call.training and len(self.calls) > 1
        if training not in self.traces:
            return "", ""
        flows = [lower(traced.tracer, linear=False) for traced in self.traces[training].traced]
        named = list(self.model.named_modules())
        norm_acts = frozenset(name for name, part in named if _zoo.is_norm_act(part))
        quiet = frozenset(name for name, part in named if leaf_op(part) in (Op.PASS, Op.DROP))
        return disagreement(flows, recording, norm_acts, quiet)


def read(model: nn.Module, *, linear: bool = False, example_inputs: Any = None) -> Reading:
    """Analyse a model.

    Args:
        model: Any module; nothing of it changes.
        linear: Whether ``nn.Linear`` counts as a convolution.
        example_inputs: What the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
            Only shapes are taken from it.
    """
    return _Builder(model, linear).build(example_inputs)
