"""Who calls, reads and holds which module: whether it can be replaced."""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from nmconv.flow import ATOMS, Flow
from nmconv.recording import Fact

__all__ = ["OWN", "Callers", "CallsSeen", "Holders"]


@dataclass(frozen=True)
class CallsSeen:
    """What one flow shows of calls.

    Attributes:
        calls: How often each module is called, by qualified name.
        read: Names of modules whose parameters or buffers are read from outside of them.
    """

    calls: Counter[str]
    read: frozenset[str]

    @staticmethod
    def of(flow: Flow) -> CallsSeen:
        """What is to be seen in a flow."""
        facts = flow.recording.facts
        calls = Counter(fact.label for node, fact in facts.items() if node.op == "call_module")
        calls.update(frame.path for frame in flow.frames)
        return CallsSeen(calls, frozenset(_read_by_others(facts)))


def _read_by_others(facts: Mapping[Node, Fact]) -> Iterator[str]:
    """Names of modules of which a parameter or buffer gets into what other modules compute from their inputs."""
    fixed: set[Node] = set()
    for node in facts:
        if node.op == "get_attr" or (node.op != "placeholder" and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    for node, fact in facts.items():
        owner = fact.label.rpartition(".")[0] if node.op == "get_attr" else ""
        todo = [node] if owner else []
        while todo:
            users = list(todo.pop().users)
            if any(user not in fixed and user in facts and facts[user].frame.path != owner for user in users):
                yield owner
                break
            todo += [user for user in users if user in fixed]


class Callers:
    """Who calls which module, and whether replacing a module changes that one call and nothing else.

    Args:
        model: Whose modules.
        seen: What its flows show, in all modes.
        looked_at: Names of modules at which a forward looks.
        broken: Names of parts that do not run in some mode.
    """

    def __init__(
        self, model: nn.Module, seen: Sequence[CallsSeen], looked_at: Container[str], broken: Iterable[str]
    ) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._holders = Holders(model)
        self._opaque = any(True for _ in broken)
        self._read = {name for flow in seen for name in flow.read}
        self._looked_at = looked_at
        self._owners = Counter(id(value) for module in model.modules() for value in _tensors(module))
        self._times: Counter[int] = Counter()
        for flow in seen:
            for name, times in flow.calls.items():
                module = id(self._modules[name])
                self._times[module] = max(self._times[module], times)

    def why_not(self, name: str) -> str:
        """Why the module cannot be replaced, or ""."""
        module = self._modules[name]
        if self._times[id(module)] != 1:
            return "it is called several times"
        if name in self._read:
            return "something else reads its parameters"
        if name in self._looked_at:
            return "a forward looks at its settings, class or parameters"
        if any(self._owners[id(value)] > 1 for value in _tensors(module)):
            return "another module has the same parameters or statistics"
        if any("__call__" in vars(cls) for cls in type(module).__mro__ if cls is not nn.Module):
            return "its class has a __call__ of its own"
        if self._holders.is_kept_elsewhere(module):
            return "an attribute holds it without registering it, so that it cannot be replaced"
        if self._opaque and self._holders.count(module) > 1:
            return "it is registered several times in a model that does not run as a whole"
        return ""


def _tensors(module: nn.Module) -> list[Tensor]:
    values = [*module._parameters.values(), *module._buffers.values()]
    return [value for value in values if value is not None]


OWN = frozenset(nn.Module().__dict__)  # what every module has: children, tensors and hooks


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
    held = getattr(value, "__dict__", None)
    return held.values() if isinstance(held, dict) else ()


class Holders:
    """An index of a model's modules by where they are kept."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts: Counter[int] = Counter()
        self._kept: set[int] = set()
        for module in model.modules():
            self._counts.update(id(child) for child in module._modules.values() if child is not None)
            for name, value in module.__dict__.items():
                if name not in OWN:
                    self._look_into(value)

    def _look_into(self, value: Any) -> None:
        """Through containers and plain objects, however deep."""
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
        """In how many slots of the model the module is registered."""
        return self._counts[id(module)]

    def slots(self, path: str, module: nn.Module) -> int:
        """In how many slots of the module at ``path`` it is registered."""
        return sum(child is module for child in self._model.get_submodule(path)._modules.values())

    def is_kept_elsewhere(self, module: nn.Module) -> bool:
        """Whether an attribute holds the module without registering it, alone or in a container."""
        return id(module) in self._kept
