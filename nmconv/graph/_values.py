"""Shapes on demand: a node of an fx graph evaluated on fake tensors, and only if somebody asks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

from nmconv.graph._modules import leaf_op
from nmconv.graph._ops import Op
from nmconv.graph._quiet import in_mode
from nmconv.graph._zoo import is_norm_act

__all__ = ["Unknown", "Values", "fake_input"]


# Modules whose result is shaped as their input; evaluating a norm's parts costs the most of all.
_KEEP_SHAPE = (Op.NORM, Op.ACT, Op.DROP, Op.BOUNDED)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Unknown(TraceError):
    """A value that cannot be known from structure alone."""


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
        return self._known[node]

    def _compute(self, node: Node) -> Any:
        if node in self._lost:
            raise Unknown(f"what {node.target} returns is not known, since it could not be traced")
        if node.op == "placeholder":
            raise Unknown(f"the shape of input {node.target!r} is not known")
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        args: Any = map_arg(node.args, self._known.__getitem__)
        if node.op == "call_module" and args:
            if self._keeps_shape(str(node.target)):
                return args[0]
            shape = _convolved(self._root.get_submodule(str(node.target)), args[0])
            if shape is not None:
                with self._mode or nullcontext():
                    return torch.empty(shape, dtype=args[0].dtype, device=args[0].device)
        kwargs = map_arg(node.kwargs, self._known.__getitem__)
        try:
            # In eval mode: a norm in train mode counts batches in a real buffer, and shapes are the same.
            with self._mode or nullcontext(), torch.no_grad(), in_mode(False, set()):
                if node.op == "call_function":
                    return node.target(*args, **kwargs)  # type: ignore[operator]
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return self._root.get_submodule(str(node.target)).forward(*args, **kwargs)
        except Exception as error:
            raise Unknown(f"the value of {node} cannot be known: {type(error).__name__}: {error}") from error

    def _keeps_shape(self, name: str) -> bool:
        module = self._root.get_submodule(name)
        return leaf_op(module) in _KEEP_SHAPE or is_norm_act(module)

    def _attribute(self, name: str) -> Any:
        value: Any = self._root
        for part in name.split("."):
            value = getattr(value, part)
        return self.like(value) if isinstance(value, torch.Tensor) else value


def _convolved(module: nn.Module, x: Any) -> tuple[int, ...] | None:
    """The shape that one of torch's own convolutions gives, a hundred times as fast as by a fake tensor; or None."""
    if type(module) not in _CONVS or "forward" in module.__dict__ or not isinstance(x, torch.Tensor):
        return None
    conv: Any = module
    rank, padding = len(conv.kernel_size), conv.padding
    usual = x.dim() == rank + 2 and x.shape[1] == conv.in_channels and x.dtype == conv.weight.dtype
    if not usual or isinstance(padding, str) or not all(type(size) is int for size in x.shape):
        return None
    sizes = [
        (x.shape[2 + axis] + 2 * padding[axis] - conv.dilation[axis] * (conv.kernel_size[axis] - 1) - 1)
        // conv.stride[axis]
        + 1
        for axis in range(rank)
    ]
    return (x.shape[0], conv.out_channels, *sizes) if min(sizes) > 0 else None


def fake_input(root: nn.Module, values: Values, size: tuple[int, ...] | None) -> torch.Tensor | None:
    """A fake batch of two for a model without example inputs: its own default size, or a guess by its first conv."""
    if size is not None:
        return values.empty(2, *size)
    for module in root.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            extents = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}[len(module.kernel_size)]
            return values.empty(2, module.in_channels, *extents)
    return None
