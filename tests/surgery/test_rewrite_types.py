"""Rewritten blocks: forwards that ask for the types, sizes and numbers of what they are given."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, dropped
from rewrite_nets import LIBRARY, conv, droppable, every_subset, everything, faithful, net, outer, picture, planned
from torch import Tensor, nn

import nmconv

torch.set_num_threads(1)


def checks_type(how, x):
    """Whether x is a tensor, asked in one way."""
    if how == "isinstance":
        return isinstance(x, Tensor)
    if how == "tuple of types":
        return isinstance(x, (list, Tensor))
    if how == "nested tuple of types":
        return isinstance(x, (str, (int, Tensor)))
    if how == "union":
        return isinstance(x, Tensor | list)
    if how == "is_tensor":
        return torch.is_tensor(x)
    if how == "not a list":
        return not isinstance(x, (list, tuple))
    if how == "type":
        return type(x) is Tensor
    if how == "type in":
        return type(x) in (Tensor, nn.Parameter)
    if how == "issubclass":
        return issubclass(type(x), Tensor)
    if how == "class":
        return x.__class__ is Tensor
    if how == "match":
        match x:
            case Tensor():
                return True
            case _:
                return False
    if how == "library":
        return len(LIBRARY.as_list(x)) == 1
    if how == "library, exact":
        return LIBRARY.exact(x) is x
    if how == "hasattr":
        return hasattr(x, "shape") and not hasattr(x, "append")
    if how == "callable":
        return not callable(x)
    if how == "not an int":
        return not isinstance(x, int)
    if how == "not a parameter":
        return not isinstance(x, nn.Parameter)
    if how == "torch.overrides":
        return torch.overrides.is_tensor_like(x)
    if how == "object":
        return isinstance(x, object)
    raise ValueError(how)


@pytest.mark.parametrize(
    "how",
    [
        "isinstance", "tuple of types", "nested tuple of types", "union", "is_tensor", "not a list", "type", "type in",
        "issubclass", "class", "match", "library", "library, exact", "hasattr", "callable", "not an int",
        "not a parameter", "torch.overrides", "object",
    ],
)  # fmt: skip
def test_a_block_that_asks_what_it_was_given(how):
    def part(self, x):
        if checks_type(how, x):
            x = x * 2
        return F.relu(self.conv(x))

    model = outer(net(part, conv=conv()))
    everything(model)


CHILDREN = {
    "tuple": (lambda self, x: (x * 2, x), lambda y: y[0] if isinstance(y, tuple) else y + 1),
    "no tensor": (lambda self, x: (x * 2, x), lambda y: y if isinstance(y, Tensor) else y[0] + y[1]),
    "list": (lambda self, x: [x * 2], lambda y: y[0] if isinstance(y, list) else y),
    "dict": (lambda self, x: {"out": x * 2}, lambda y: y["out"] if isinstance(y, dict) else y),
    "none": (lambda self, x: None, lambda y: torch.ones(()) if y is None else y),
    "true": (lambda self, x: True, lambda y: 1.0 if y else 2.0),
    "number": (lambda self, x: 3, lambda y: y if isinstance(y, int) else 1),
    "unpacked": (lambda self, x: (x * 2, x), lambda y: sum(part for part in y)),
    "length": (lambda self, x: (x * 2, x), lambda y: y[len(y) - 1]),
    "shape": (lambda self, x: x.shape, lambda y: y[0] + 1.0),
}


@pytest.mark.parametrize("what", CHILDREN)
def test_a_child_that_returns_something_else_than_a_tensor(what):
    child, read = CHILDREN[what]

    def part(self, x):
        return F.relu(self.conv(x)) * read(self.child(x))

    model = outer(net(part, conv=conv(), child=net(child)))
    everything(model)


def test_sets_and_dicts_of_sizes():
    def part(self, x):
        scale = {4: 2.0, 8: 3.0}.get(x.shape[1], 5.0)
        if x.shape[1] in {4, 8}:
            scale += 1
        if x.shape[1] not in (4, 8):
            scale += 10
        return F.relu(self.conv(x)) * scale

    model = outer(net(part, conv=conv()))
    everything(model)


def test_a_plain_tensor_attribute():
    def part(self, x):
        return F.relu(self.conv(x)) * self.plain + self.buffer

    block = net(part, conv=conv(), plain=torch.rand(4, 1, 1))
    block.register_buffer("buffer", torch.rand(4, 1, 1))
    model = outer(block)
    _, converted = every_subset(model, count=2)
    x = picture()
    with torch.no_grad():
        converted.block.plain.zero_()
        assert_same(converted.block(x), model.block.buffer.expand(2, 4, 6, 6))
        converted.block.plain = torch.ones(4, 1, 1)
        converted.block.buffer = torch.zeros(4, 1, 1)
        assert_same(converted.block(x), model.block.conv(x))


@pytest.mark.parametrize("how", ["item", "made inside", "computed", "bool"])
def test_a_plain_tensor_that_is_read_as_a_number(how):
    def part(self, x):
        x = F.relu(self.conv(x))
        if how == "item":
            return x * self.plain.item()
        if how == "computed":
            return x * (self.plain * 2)
        if how == "bool":
            return x * 2 if self.plain else x
        return x * torch.tensor(3.0)

    model = outer(net(part, conv=conv(), plain=torch.tensor(2.0)))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = faithful(model, plan, picture())
    if how != "made inside":  # whoever changes the tensor finds it followed, or is told
        for each in (model, converted):
            each.block.plain = torch.tensor(0.0)
        with contextlib.suppress(nmconv.RewriteError), dropped(model, plan.changes):
            assert_same(converted(picture()), model(picture()))
