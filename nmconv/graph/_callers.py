"""Who calls which module, and what else looks at it: whether it can be replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import Node

from nmconv.graph._flow import Flow
from nmconv.graph._holders import Holders
from nmconv.recording import Fact

__all__ = ["Callers", "Seen"]


@dataclass(frozen=True)
class Seen:
    """What one flow shows of calls.

    Attributes:
        calls: How often each module is called, by qualified name.
        read: Names of modules whose parameters or buffers are read from outside of them.
    """

    calls: Counter[str]
    read: frozenset[str]

    @staticmethod
    def of(flow: Flow) -> Seen:
        """What is to be seen in a flow."""
        facts = flow.recording.facts
        calls = Counter(fact.label for node, fact in facts.items() if node.op == "call_module")
        calls.update(frame.path for frame in flow.frames)
        return Seen(calls, frozenset(_read_by_others(facts)))


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
        self, model: nn.Module, seen: Sequence[Seen], looked_at: Container[str], broken: Iterable[str]
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
