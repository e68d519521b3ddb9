"""Find who calls, inspects and holds a module, and hence whether it can be replaced."""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from nmconv.flow import ATOMS, Flow, is_leaf
from nmconv.recording import Fact, ModelRaised, NeedsData, Recording, record_again

__all__ = ["CallsSeen", "Holders", "ModuleUsers", "inspected_modules"]

_MODULE_INTERNALS = frozenset(nn.Module().__dict__)  # of every module: children, tensors and hooks


@dataclass(frozen=True)
class CallsSeen:
    """The calls of modules in one flow.

    Attributes:
        calls: How often each module is called, by qualified name.
        read: Names of modules whose parameters or buffers other modules read.
    """

    calls: Counter[str]
    read: frozenset[str]

    @staticmethod
    def of(flow: Flow) -> CallsSeen:
        """Collect the calls in a flow."""
        facts = flow.recording.facts
        calls = Counter(fact.label for node, fact in facts.items() if node.op == "call_module")
        calls.update(frame.path for frame in flow.frames)
        return CallsSeen(calls, frozenset(_owners_of_shared_tensors(facts)))


def _owners_of_shared_tensors(facts: Mapping[Node, Fact]) -> Iterator[str]:
    """Yield the names of modules whose parameters or buffers other modules combine with their inputs."""
    constant: set[Node] = set()  # not computed from an input
    for node in facts:
        if node.op == "get_attr" or (node.op != "placeholder" and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    for node, fact in facts.items():
        owner = fact.label.rpartition(".")[0] if node.op == "get_attr" else ""
        todo = [node] if owner else []
        while todo:
            users = list(todo.pop().users)
            if any(user not in constant and user in facts and facts[user].frame.path != owner for user in users):
                yield owner
                break
            todo += [user for user in users if user in constant]


class ModuleUsers:
    """Tells whether replacing a module changes one call of it and nothing else.

    Args:
        model: The model that the modules belong to; not modified.
        seen: The calls in its flows, in all modes.
        inspected: Names of modules that a forward inspects; see :func:`inspected_modules`.
        not_run: Names of parts that do not run in some mode.
    """

    def __init__(
        self, model: nn.Module, seen: Sequence[CallsSeen], inspected: Container[str], not_run: Iterable[str]
    ) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._holders = Holders(model)
        self._runs_in_part = any(True for _ in not_run)
        self._read = {name for flow in seen for name in flow.read}
        self._inspected = inspected
        self._owners = Counter(id(value) for module in model.modules() for value in _tensors(module))
        self._calls: Counter[int] = Counter()
        for flow in seen:
            for name, calls in flow.calls.items():
                module = id(self._modules[name])
                self._calls[module] = max(self._calls[module], calls)

    def why_not_replaceable(self, name: str) -> str:
        """Return why the module cannot be replaced, or ""."""
        module = self._modules[name]
        if self._calls[id(module)] != 1:
            return "it is called several times"
        if name in self._read:
            return "something else reads its parameters"
        if name in self._inspected:
            return "a forward looks at its settings, class or parameters"
        if any(self._owners[id(value)] > 1 for value in _tensors(module)):
            return "another module has the same parameters or statistics"
        if any("__call__" in vars(cls) for cls in type(module).__mro__ if cls is not nn.Module):
            return "its class has a __call__ of its own"
        if self._holders.is_kept_elsewhere(module):
            return "an attribute holds it without registering it, so that it cannot be replaced"
        if self._runs_in_part and self._holders.count(module) > 1:
            return "it is registered several times in a model that does not run as a whole"
        return ""


def _tensors(module: nn.Module) -> list[Tensor]:
    values = [*module._parameters.values(), *module._buffers.values()]
    return [value for value in values if value is not None]


# Inspection by a forward ---------------------------------------------------------------------------------------------


def inspected_modules(model: nn.Module, runs: Iterable[Recording], names: Iterable[str]) -> frozenset[str]:
    """Return those of the named modules whose settings, parameters or class a forward reads.

    Each run is recorded again with the modules disguised: if nothing changes, no forward has inspected them. Modules
    that make a difference are found by bisection.

    Args:
        model: Not modified.
        runs: Recordings of the model or its parts.
        names: Names of leaves.
    """
    inspected: set[str] = set()
    for run in runs:
        todo = [sorted({*names} - inspected)]
        while todo:
            group = todo.pop()
            if not group or _is_unchanged_with_disguise(model, run, group):
                continue
            if len(group) == 1:
                inspected.update(group)
            else:
                todo += [group[: len(group) // 2], group[len(group) // 2 :]]
    return frozenset(inspected)


def _is_unchanged_with_disguise(model: nn.Module, run: Recording, names: Iterable[str]) -> bool:
    try:
        again = record_again(model, replace(run, call=replace(run.call, disguised=frozenset(names))), is_leaf)
    except (ModelRaised, NeedsData):
        return False
    return list(map(_comparable, run.facts.values())) == list(map(_comparable, again.facts.values()))


def _comparable(fact: Fact) -> tuple[object, ...]:
    return fact.label, fact.form, fact.shapes, fact.context, fact.frame.path


# Holders -------------------------------------------------------------------------------------------------------------


class Holders:
    """An index of the slots and attributes in which a model's modules are held."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._slots: Counter[int] = Counter()
        self._kept: set[int] = set()
        for module in model.modules():
            self._slots.update(id(child) for child in module._modules.values() if child is not None)
            for name, value in module.__dict__.items():
                if name not in _MODULE_INTERNALS:
                    self._add_modules_in(value)

    def _add_modules_in(self, value: Any) -> None:
        """Note the modules in a value: in containers and plain objects, at any depth."""
        seen: set[int] = set()
        todo = [value]
        while todo:
            value = todo.pop()
            if isinstance(value, nn.Module):
                self._kept.add(id(value))
            elif type(value) not in ATOMS and id(value) not in seen:
                seen.add(id(value))
                todo += _parts(value)

    def count(self, module: nn.Module) -> int:
        """Return the number of slots of the model in which the module is registered."""
        return self._slots[id(module)]

    def slots(self, path: str, module: nn.Module) -> int:
        """Return the number of slots of the module at ``path`` in which it is registered."""
        return sum(child is module for child in self._model.get_submodule(path)._modules.values())

    def is_kept_elsewhere(self, module: nn.Module) -> bool:
        """Return whether an attribute holds the module without registering it, alone or in a container."""
        return id(module) in self._kept


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return dict.values(value)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, (type, FunctionType, torch.Tensor, ModuleType)):
        return ()
    attributes = getattr(value, "__dict__", None)
    return attributes.values() if isinstance(attributes, dict) else ()
