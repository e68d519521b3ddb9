"""Shapes on demand: a node of an fx graph evaluated on fake tensors, and only if somebody asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

from nmconv.graph._quiet import in_mode
from nmconv.graph._rules import shape_of_function, shape_of_module, what_is_read

__all__ = ["Unknown", "Values", "fake_input"]


class Unknown(TraceError):
    """A value that cannot be known from structure alone."""


@dataclass(frozen=True)
class _Shaped:
    """A tensor of which only this is known so far: making a fake one takes a hundred times as long.

    It is ``plain`` if its elements lie in memory in order: then there is nothing else to know of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    plain: bool


_LOOKING: ContextVar[bool] = ContextVar("looking", default=False)  # each thread has its own


def _is_heard(_: logging.LogRecord) -> bool:
    return not _LOOKING.get()


# Torch logs a traceback for every fake call that fails. That a value cannot be known is an answer here, and no error:
# what fails while this thread looks for one is kept from the log, all else is heard as before.
logging.getLogger(fake_tensor.__name__).addFilter(_is_heard)


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
        self._settle(node, True)
        value = self._known[node]
        if isinstance(value, _Shaped):
            with self._mode or nullcontext():
                value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            self._known[node] = value
        return value

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of the node's value, which is a tensor.

        Raises:
            Unknown: As :meth:`get` does, or if it is no tensor.
        """
        self._settle(node, False)
        value = self._known[node]
        if not isinstance(value, (torch.Tensor, _Shaped)):
            raise Unknown(f"{node} is no tensor")
        return tuple(value.shape)

    def _has(self, node: Node, whole: bool) -> bool:
        value = self._known.get(node, self)
        return value is not self and not (whole and isinstance(value, _Shaped) and not value.plain)

    def _settle(self, node: Node, whole: bool) -> None:
        """See to it that the value is known, or, if not ``whole``, its shape."""
        todo = [(node, whole)]
        while todo:
            last, whole = todo.pop()
            if self._has(last, whole):
                continue
            missing = [(other, whole) for other in last.all_input_nodes if not self._has(other, whole)]
            made = None if missing else self._ruled(last)
            if made is None or (whole and isinstance(made, _Shaped) and not made.plain):
                missing = missing or [(other, True) for other in last.all_input_nodes if not self._has(other, True)]
                if missing:
                    todo += [(last, whole), *missing]
                    continue
                made = self._compute(last)
            self._known[last] = made

    def _compute(self, node: Node) -> Any:
        if node in self._lost:
            raise Unknown(f"what {node.target} returns is not known, since it could not be traced")
        if node.op == "placeholder":
            raise Unknown(f"the shape of input {node.target!r} is not known")
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        module = self._named(str(node.target)) if node.op == "call_module" else None
        args: Any = map_arg(node.args, self.get)
        kwargs = map_arg(node.kwargs, self.get)
        looking = _LOOKING.set(True)
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
        finally:
            _LOOKING.reset(looking)

    def _ruled(self, node: Node) -> Any:
        """What a rule tells of the node's value, or None."""
        given = [self._told(part) for part in node.args]
        first = given[0][0] if given and isinstance(given[0], list) and given[0] else given[0] if given else None
        if node in self._lost or not isinstance(first, (torch.Tensor, _Shaped)):
            return None
        about = what_is_read(node, given)
        if about is not None:
            return about
        if any(map(_AUTOCAST, ("cpu", "cuda"))):  # dtypes are others then
            return None
        plain, read = True, list(_tensors(given))
        if node.op == "call_module":
            module = self._named(str(node.target))
            shape = shape_of_module(module, first)
            read += [value for value in module._parameters.values() if value is not None]
            plain = type(module).__module__.startswith("torch.") or isinstance(module, nn.modules.batchnorm._BatchNorm)
        else:
            shape = shape_of_function(node, given)
        plain = plain and all(map(_is_plain, read))  # timm's layer norms permute
        return None if shape is None else _Shaped(shape, first.dtype, first.device, plain)

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


_AUTOCAST = torch.is_autocast_enabled  # as it is before anybody replaces it


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (torch.Tensor, _Shaped)):
            yield value
        elif isinstance(value, list):
            yield from _tensors(value)


def _is_plain(value: Any) -> bool:
    """Whether strides are those of a new tensor, of extents of one, too: operations go by them."""
    if isinstance(value, _Shaped):
        return value.plain
    expected, strides = 1, []
    for size in reversed(value.shape):
        strides.append(expected)
        expected *= max(size, 1)
    return tuple(value.stride()) == tuple(reversed(strides))


def fake_input(root: nn.Module, values: Values, size: tuple[int, ...] | None) -> torch.Tensor | None:
    """A fake batch of two for a model without example inputs: its own default size, or a guess by its first conv."""
    if size is not None:
        return values.empty(2, *size)
    for module in root.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            extents = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}[len(module.kernel_size)]
            return values.empty(2, module.in_channels, *extents)
    return None
