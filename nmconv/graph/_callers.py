"""Who calls which module, and what else looks at it: whether it can be replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nmconv.graph._constants import settings_read
from nmconv.graph._holders import Holders
from nmconv.graph._records import Frame
from nmconv.graph._tracer import FlowTracer

__all__ = ["Callers", "Seen"]


@dataclass(frozen=True)
class Seen:
    """What one trace shows of calls.

    Attributes:
        calls: How often each module is called, by qualified name.
        read: Names of modules whose parameters or buffers are read from outside of them.
        settings: Ids of modules whose settings a forward could read.
    """

    calls: Counter[str]
    read: frozenset[str]
    settings: frozenset[int]

    @staticmethod
    def of(tracer: FlowTracer) -> Seen:
        """What is to be seen in a finished trace."""
        alive = [node for node in tracer.graph.nodes if node not in tracer.dead]
        calls = Counter(tracer.prefix + str(node.target) for node in alive if node.op == "call_module")
        read = (
            tracer.prefix + str(node.target).rpartition(".")[0]
            for node in alive
            if node.op == "get_attr" and node.users
        )
        settings = (held for module in _callers(tracer) for held in settings_read(module))
        return Seen(calls, frozenset(filter(None, read)), frozenset(settings))


def _callers(tracer: FlowTracer) -> list[nn.Module]:
    """Every module whose forward has made a node, and those around it."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    for frame, *_ in tracer.where.values():
        at: Frame | None = frame
        while at is not None and id(at) not in seen:
            seen.add(id(at))
            found[id(at.module)] = at.module
            at = at.parent
    return list(found.values())


class Callers:
    """Who calls which module, and whether replacing a module changes that one call and nothing else.

    Args:
        model: Whose modules.
        seen: What its traces show, in all modes.
        looked_at: Ids of modules at which a forward looked while it was traced, however that ended.
        broken: Names of parts that could not be traced.
    """

    def __init__(self, model: nn.Module, seen: Sequence[Seen], looked_at: Iterable[int], broken: Iterable[str]) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._holders = Holders(model)
        opaque = [self._modules[name] for name in broken]
        self._opaque = bool(opaque)
        self._read = {name for trace in seen for name in trace.read}
        self._settings = {held for trace in seen for held in trace.settings}.union(looked_at)
        self._settings.update(held for module in opaque for held in settings_read(module))
        self._owners = Counter(id(value) for module in model.modules() for value in _tensors(module))
        self._times: Counter[int] = Counter()
        for trace in seen:
            for name, times in trace.calls.items():
                module = id(self._modules[name])
                self._times[module] = max(self._times[module], times)

    def why_not(self, name: str) -> str:
        """Why the module cannot be replaced, or ""."""
        module = self._modules[name]
        if self._times[id(module)] != 1:
            return "it is called several times"
        if name in self._read:
            return "something else reads its parameters"
        if id(module) in self._settings:
            return "a forward looks at its settings, class or parameters"
        if any(self._owners[id(value)] > 1 for value in _tensors(module)):
            return "another module has the same parameters or statistics"
        if any("__call__" in vars(cls) for cls in type(module).__mro__ if cls is not nn.Module):
            return "its class has a __call__ of its own"
        if self._holders.is_kept_elsewhere(module):
            return "an attribute holds it without registering it, so that it cannot be replaced"
        if self._opaque and self._holders.count(module) > 1:
            return "it is registered several times in a model that cannot be traced as a whole"
        return ""


def _tensors(module: nn.Module) -> list[Tensor]:
    values = [*module._parameters.values(), *module._buffers.values()]
    return [value for value in values if value is not None]
