"""Assemble what both modes show of a model into the plain data that planning needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from nmconv.finding.attribute_uses import count_uses
from nmconv.finding.flow_analysis import analyze, flows_of
from nmconv.finding.mode_matching import differing_modules, same_flows
from nmconv.finding.module_users import Holders
from nmconv.finding.site_collection import CollectedCall, SiteCollector, SiteKey
from nmconv.flow import (
    Arguments,
    Flow,
    ModuleCall,
    act_kind,
    argument_structure,
    is_activation,
    is_sequential,
    leaf_op,
    zoo,
)
from nmconv.planning import Activation, Chain, Place, Structure, Untraced
from nmconv.recording import Failure, Recordings

__all__ = ["structure_of"]

_Method = str | tuple[str, str]  # a module's qualified name, for its forward; or that and a method's name
_ONE_DECISION = "its module is called in different surroundings, and one decision must fit all of them"


def structure_of(model: nn.Module, recordings: Recordings, *, linear: bool = False) -> Structure:
    """Return the structure of a model that was recorded.

    Args:
        model: Any module; not modified.
        recordings: Its recordings.
        linear: Whether ``nn.Linear`` counts as a convolution.
    """
    flows = partial(flows_of, model, recordings, linear=linear)
    eval_flows, train_flows = flows(training=False), flows(training=True)
    differing = differing_modules(eval_flows, train_flows)
    same = same_flows(eval_flows, train_flows)  # before they are analyzed, which modifies them
    sites = SiteCollector(model, recordings.failures)
    sites.add_flows(list(map(analyze, eval_flows)), "eval", differing)
    if train_flows and same:
        sites.share_with_train()
    else:
        sites.add_flows(list(map(analyze, train_flows)), "train", differing)
    return _Assembler(model, sites, [*eval_flows, *train_flows]).structure(recordings.failures)


class _Assembler:
    def __init__(self, model: nn.Module, sites: SiteCollector, flows: Sequence[Flow]) -> None:
        self._model = model
        self._sites = sites
        self._holders = Holders(model)
        self._arguments = _arguments_by_method(flows)
        # In all flows, since a single call of a child may not show it.
        self._non_tensor_parents = frozenset[str]().union(*(flow.non_tensor_parents for flow in flows))

    def structure(self, failures: Sequence[Failure]) -> Structure:
        sites = self._sites
        keys = sorted(sites.calls, key=lambda key: sites.calls[key].order)
        index = {key: position for position, key in enumerate(keys)}
        self._mark_ambiguous()
        for key in sites.on_parameters:
            call = sites.calls[key]
            call.skip = call.skip or "it activates a parameter, not what a convolution makes"
        reasons = sites.leading | dict.fromkeys(sorted(sites.ambiguous, key=index.__getitem__), _ONE_DECISION)
        kept = {key: why for key, why in reasons.items() if key not in sites.owned or key in sites.ambiguous}
        owned_index = {key: position for key, position in index.items() if key not in kept}
        return Structure(
            model=type(self._model).__name__,
            activations=(*map(self._activation, keys), *self._uncalled(failures)),
            chains=tuple(self._chains(owned_index)),
            leading=tuple((index[key], reason) for key, reason in kept.items()),
            stages=tuple(sites.stages.values()),
            classifier=zoo.classifier_names(self._model),
            steps=tuple(sites.steps),
            untraced=tuple(map(_untraced, failures)),
        )

    def _mark_ambiguous(self) -> None:
        """Mark calls of parameters that a convolution owns, and calls that could not be matched between the modes."""
        sites = self._sites
        modes = {key: call.activation.modes for key, call in sites.calls.items()}
        only_eval, only_train = ({key[:4] for key in modes if modes[key] == mode} for mode in ("eval", "train"))
        unmatched = only_eval & only_train
        sites.ambiguous |= {key for key in modes if key[:4] in unmatched and modes[key] != "both"}
        sites.ambiguous |= sites.on_parameters & sites.owned

    def _chains(self, index: dict[SiteKey, int]) -> Iterator[Chain]:
        for chain in self._sites.chains:
            items = tuple(
                replace(
                    item,
                    act=None if key is None else index.get(key),
                    end=None if item.end is None else self._with_arguments(item.end),
                )
                for item, key in chain.links
            )
            yield Chain(items, chain.pre, chain.modes)

    def _activation(self, key: SiteKey) -> Activation:
        call = self._sites.calls[key]
        how = self._how(call)
        argument_structure = (
            self._argument_structure(call.activation.owner, call.activation.method) if how == "rewrite" else ""
        )
        return replace(
            call.activation,
            how=how,
            argument_structure=argument_structure,
            skip="" if key in self._sites.owned else call.skip,
        )

    def _with_arguments(self, place: Place) -> Place:
        return (
            replace(place, argument_structure=self._argument_structure(place.owner, place.method))
            if place.how == "rewrite"
            else place
        )

    def _argument_structure(self, owner: str, method: str) -> str:
        """Return the structure of a method's arguments, or "" if its calls differ."""
        key: _Method = owner if method == "forward" else (owner, method)
        return "" if owner in self._non_tensor_parents else argument_structure(self._arguments.get(key, ()))

    def _how(self, call: CollectedCall) -> str:
        """Return ``swap`` if replacing one submodule changes this call and no other in its method, else ``rewrite``."""
        holders, module, owner = self._holders, call.module, call.activation.owner
        if module is None or holders.is_kept_elsewhere(module):
            return "rewrite"
        callers = self._sites.callers[id(module)]
        inside = call.activation.name.rpartition(".")[0] == owner and is_sequential(self._model.get_submodule(owner))
        if inside and all(path == owner or holders.slots(path, module) == 1 for path, _ in callers):
            return "swap"  # a Sequential calls each slot once
        if len(callers) == 1 and holders.count(module) == 1:
            method, slot = call.activation.method, call.activation.name.rpartition(".")[2]
            return "swap" if count_uses(self._model.get_submodule(owner), method, slot) <= 1 else "rewrite"
        # Several modules hold it: replacing one slot is enough if each caller calls the module in its own slot.
        called_once = [path for path, _ in callers].count(owner) == 1
        has_slots = all(holders.slots(path, module) == 1 for path, _ in callers)
        return "swap" if called_once and has_slots else "rewrite"

    # -- activation modules that are not called -----------------------------------------------------------------------

    def _uncalled(self, failures: Iterable[Failure]) -> Iterator[Activation]:
        """Yield the activation modules without a call in any recording."""
        called = {id(call.module) for call in self._sites.calls.values()}
        for name, module in self._model.named_modules():
            if is_activation(module) and id(module) not in called:
                yield Activation(
                    name=name,
                    function=None,
                    owner=name.rpartition(".")[0],
                    method="forward",
                    call=0,
                    train_call=0,
                    step=0,
                    train_step=0,
                    argument_structure="",
                    modes="both",
                    kind=act_kind(module),
                    inplace=getattr(module, "inplace", False) is True,
                    copy=False,
                    how="swap",
                    movable=False,
                    skip=self._why_uncalled(name, [failure.path for failure in failures]),
                )

    def _why_uncalled(self, name: str, not_run: Sequence[str]) -> str:
        parents = [path for path in not_run if not path or name.startswith(f"{path}.")]
        if parents:
            return f"{max(parents, key=len) or 'the model'}, which may call it, does not run"
        layer = self._enclosing_leaf(name)
        return f"a part of {layer}, which is one indivisible layer" if layer else "the forward never calls it"

    def _enclosing_leaf(self, name: str) -> str:
        """Return the name of the leaf that holds a module, or ""."""
        while "." in name:
            name = name.rpartition(".")[0]
            if leaf_op(self._model.get_submodule(name)) is not None:
                return name
        return ""


def _arguments_by_method(flows: Iterable[Flow]) -> dict[_Method, list[ModuleCall | Arguments]]:
    """Return the arguments of all calls of each forward, and of each method that a forward calls."""
    arguments: dict[_Method, list[ModuleCall | Arguments]] = defaultdict(list)
    for flow in flows:
        for frame in flow.frames:
            arguments[frame.path].append(frame)
        for (caller, method), args in flow.recording.helper_arguments.items():
            arguments[caller.path, method].append(Arguments(args, {}))
    return arguments


def _untraced(failure: Failure) -> Untraced:
    hint = f"Pass example_inputs that it can be called with in {failure.mode} mode, too"
    return Untraced(failure.path, f"it does not run in {failure.mode} mode ({failure.reason})", hint)
