"""Shapes on demand: a node of an fx graph evaluated on fake tensors, and only if somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

from nmconv.graph._quiet import in_mode
from nmconv.graph._rules import shape_of_function, shape_of_module

__all__ = ["Unknown", "Values", "fake_input"]


class Unknown(TraceError):
    """A value that cannot be known from structure alone."""


@dataclass(frozen=True)
class _Shaped:
    """A tensor of which only this is known so far: making a fake one takes a hundred times as long."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Values:
    """Evaluates nodes of one graph lazily, on fake tensors.

    Args:
        root: The module the graph belongs to. If its parameters are on the meta device, no fakes are needed.
        named: From a name to the root's submodule, where somebody keeps them.
    """

    def __init__(self, root: nn.Module, named: Callable[[str], nn.Module] | None = None) -> None:
        self._root = root
        self._named = named or root.get_submodule
        self._known: dict[Node, Any] = {}
        self._lost: set[Node] = set()
        first = next(iter(root.parameters()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.dtype = torch.float32
        if first is not None and first.dtype.is_floating_point:
            self.dtype = first.dtype
        self._mode = None if self.device.type == "meta" else FakeTensorMode(allow_non_fake_inputs=True)

    def set(self, node: Node, value: Any) -> None:
        """Give a placeholder's value: a real or fake tensor is taken for its shape, dtype and device only."""
        self._known[node] = self.like(value) if isinstance(value, torch.Tensor) else value

    def forget(self, node: Node) -> None:
        """Never evaluate this node: its arguments are not what its module takes."""
        self._lost.add(node)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the same shape and dtype on the model's device."""
        with self._mode or nullcontext():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)

    def empty(self, *shape: int) -> torch.Tensor:
        """A fake tensor of the model's dtype and device."""
        with self._mode or nullcontext():
            return torch.empty(shape, dtype=self.dtype, device=self.device)

    def get(self, node: Node) -> Any:
        """The node's value, with fake tensors for tensors.

        Raises:
            Unknown: If it depends on an input of unknown shape, on data, or cannot be computed.
        """
        self._settle(node)
        value = self._tensor(self._known[node])
        self._known[node] = value
        return value

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of the node's value, which is a tensor.

        Raises:
            Unknown: As :meth:`get` does, or if it is no tensor.
        """
        self._settle(node)
        value = self._known[node]
        if not isinstance(value, (torch.Tensor, _Shaped)):
            raise Unknown(f"{node} is no tensor")
        return tuple(value.shape)

    def _settle(self, node: Node) -> None:
        todo = [node]
        while todo:
            last = todo[-1]
            missing = [other for other in last.all_input_nodes if other not in self._known]
            if last in self._known:
                todo.pop()
            elif missing:
                todo += missing
            else:
                self._known[last] = self._compute(last)
                todo.pop()

    def _tensor(self, value: Any) -> Any:
        if not isinstance(value, _Shaped):
            return value
        with self._mode or nullcontext():
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)

    def _compute(self, node: Node) -> Any:
        if node in self._lost:
            raise Unknown(f"what {node.target} returns is not known, since it could not be traced")
        if node.op == "placeholder":
            raise Unknown(f"the shape of input {node.target!r} is not known")
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        module = self._named(str(node.target)) if node.op == "call_module" else None
        plain = self._shaped(node, module)
        if plain is not None:
            return plain
        args: Any = map_arg(node.args, self.get)
        kwargs = map_arg(node.kwargs, self.get)
        try:
            # In eval mode: a norm in train mode counts batches in a real buffer, and shapes are the same.
            with self._mode or nullcontext(), torch.no_grad(), in_mode(False, set()):
                if module is not None:
                    return module.forward(*args, **kwargs)
                if node.op == "call_function":
                    return node.target(*args, **kwargs)  # type: ignore[operator]
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        except Exception as error:
            raise Unknown(f"the value of {node} cannot be known: {type(error).__name__}: {error}") from error

    def _shaped(self, node: Node, module: nn.Module | None) -> Any:
        """The node's value where a rule tells its shape, or None."""
        given = [self._told(part) for part in node.args]
        first = given[0] if given else None
        if isinstance(first, list) and first:
            first = first[0]
        if not isinstance(first, (torch.Tensor, _Shaped)):
            return None
        if module is None:
            shape = shape_of_function(node, given)
        else:
            shape = shape_of_module(module, first) if first is given[0] else None
        if shape is None or shape == tuple(first.shape):
            return None if shape is None else first
        return _Shaped(shape, first.dtype, first.device)

    def _told(self, value: Any) -> Any:
        """What is known of an argument."""
        if isinstance(value, Node):
            return self._known[value]
        return [self._told(part) for part in value] if isinstance(value, (list, tuple)) else value

    def _attribute(self, name: str) -> Any:
        value: Any = self._root
        for part in name.split("."):
            value = getattr(value, part)
        return self.like(value) if isinstance(value, torch.Tensor) else value


def fake_input(root: nn.Module, values: Values, size: tuple[int, ...] | None) -> torch.Tensor | None:
    """A fake batch of two for a model without example inputs: its own default size, or a guess by its first conv."""
    if size is not None:
        return values.empty(2, *size)
    for module in root.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            extents = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}[len(module.kernel_size)]
            return values.empty(2, module.in_channels, *extents)
    return None
