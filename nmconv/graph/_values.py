"""Shapes on demand: a node of an fx graph evaluated on fake tensors, and only if somebody asks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

from nmconv.graph._geometry import per_axis
from nmconv.graph._modules import leaf_op
from nmconv.graph._ops import FUNCTIONS, METHODS, Op
from nmconv.graph._quiet import in_mode
from nmconv.graph._zoo import is_norm_act

__all__ = ["Unknown", "Values", "fake_input"]


# What gives results shaped as its input; evaluating a norm's parts costs the most of all.
_KEEP_SHAPE = (Op.NORM, Op.ACT, Op.DROP, Op.BOUNDED, Op.PASS)
_SLIDING = (
    (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d),
    (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d),
    (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d),
)
_RANKS: dict[type, int] = {kind: rank for rank, kinds in enumerate(_SLIDING, 1) for kind in kinds}


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
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
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
        module = self._root.get_submodule(str(node.target)) if node.op == "call_module" else None
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
        given: list[Any] = [self._known[part] if isinstance(part, Node) else part for part in node.args]
        tensors = [part for part in given if isinstance(part, (torch.Tensor, _Shaped))]
        first = given[0] if given else None
        if not isinstance(first, (torch.Tensor, _Shaped)):
            return None
        if module is not None:
            if leaf_op(module) in _KEEP_SHAPE or is_norm_act(module):
                return first
            shape = _slid(module, first)
            return None if shape is None else _Shaped(shape, first.dtype, first.device)
        op = METHODS.get(str(node.target)) if node.op == "call_method" else FUNCTIONS.get(node.target)  # type: ignore[arg-type]
        if op is Op.ADD and len(given) == len(tensors) == 2 and not node.kwargs:
            return first if len({(tuple(part.shape), part.dtype, part.device) for part in tensors}) == 1 else None
        return first if op is Op.ACT else None

    def _attribute(self, name: str) -> Any:
        value: Any = self._root
        for part in name.split("."):
            value = getattr(value, part)
        return self.like(value) if isinstance(value, torch.Tensor) else value


def _slid(module: nn.Module, x: Any) -> tuple[int, ...] | None:
    """The shape that one of torch's own convolutions or pools gives, a hundred times as fast as by a fake tensor."""
    rank = _RANKS.get(type(module), 0)
    usual = len(x.shape) == rank + 2 and all(type(size) is int for size in x.shape)
    if not rank or not usual or "forward" in module.__dict__:
        return None
    slid: Any = module
    if isinstance(slid, nn.modules.conv._ConvNd):
        if x.shape[1] != slid.in_channels or x.dtype != slid.weight.dtype or isinstance(slid.padding, str):
            return None
    elif slid.ceil_mode or getattr(slid, "return_indices", False):
        return None
    given = (slid.kernel_size, slid.stride, slid.padding, getattr(slid, "dilation", 1))
    kernel, stride, padding, dilation = (per_axis(value, rank) for value in given)
    if not len(kernel) == len(stride) == len(padding) == len(dilation) == rank:
        return None
    if hasattr(slid, "ceil_mode") and any(2 * pad > taps for pad, taps in zip(padding, kernel, strict=True)):
        return None
    sizes = [
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in range(rank)
    ]
    return (x.shape[0], getattr(slid, "out_channels", x.shape[1]), *sizes) if min(sizes) > 0 else None


def fake_input(root: nn.Module, values: Values, size: tuple[int, ...] | None) -> torch.Tensor | None:
    """A fake batch of two for a model without example inputs: its own default size, or a guess by its first conv."""
    if size is not None:
        return values.empty(2, *size)
    for module in root.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            extents = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}[len(module.kernel_size)]
            return values.empty(2, module.in_channels, *extents)
    return None
