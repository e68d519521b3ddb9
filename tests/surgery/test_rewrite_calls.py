"""Rewritten blocks: which call of an activation is dropped, however often and by whatever name it is called."""

import functools
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from rewrite_nets import apply, conv, convs, every_subset, everything, faithful, net, outer, picture, planned
from torch import Tensor, nn
from torch.nn.functional import relu as imported_relu

torch.set_num_threads(1)


# --- one activation, several calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_called_three_times(inplace):
    def forward(self, x):
        y = self.relu(self.a(x))
        y = self.relu(self.b(y))
        return self.relu(self.c(y) + x)

    every_subset(net(forward, **convs("a", "b", "c"), relu=nn.ReLU(inplace)), count=3)


FORMS = {
    "F.relu": lambda x: F.relu(x),
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu in place by position": lambda x: F.relu(x, True),
    "F.relu by keyword": lambda x: F.relu(input=x),
    "F.relu by keyword in place": lambda x: F.relu(inplace=True, input=x),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "F.silu": F.silu,
    "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.3),
    "F.elu": lambda x: F.elu(x, 0.5, True),
    "F.hardswish": lambda x: F.hardswish(x, inplace=True),
    "F.softplus": lambda x: F.softplus(x, beta=2),
    "partial": functools.partial(F.relu, inplace=True),
    "imported name": imported_relu,
    "getattr": lambda x: getattr(F, "relu")(x),  # noqa: B009
}


@pytest.mark.parametrize("form", FORMS)
def test_functional_forms(form):
    act = FORMS[form]

    def forward(self, x):
        y = self.b(act(self.a(x)))
        return act(self.c(act(y)))

    every_subset(net(forward, **convs("a", "b", "c")), count=3)


def test_a_form_that_tracing_cannot_see_is_reported_by_name():
    def part(self, x):
        return Tensor.relu(self.conv(x))

    _, plan = everything(outer(net(part, conv=conv())))
    assert [site.name for site in plan.sites if site.locked] == ["block"]


def test_functional_prelu_keeps_its_weight():
    def forward(self, x):
        return F.prelu(self.b(F.prelu(self.a(x), self.weight)), self.weight)

    model = net(forward, **convs("a", "b"), weight=nn.Parameter(torch.rand(4)))
    every_subset(model, count=2)


def test_a_function_held_as_an_attribute():
    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))

    every_subset(net(forward, **convs("a", "b"), act=F.relu), count=2)


def test_a_loop_over_a_module_list():
    def forward(self, x):
        for layer in self.layers:
            x = self.relu(layer(x))
        for number, layer in enumerate(self.others):
            x = layer(x) if number == 1 else F.relu(layer(x))
        return self.relu(x)

    model = net(forward, layers=nn.ModuleList([conv(), conv()]), others=nn.ModuleList([conv(), conv()]), relu=nn.ReLU())
    every_subset(model, count=4)


def test_children_by_name_and_by_dict():
    def forward(self, x):
        for name in ("a", "b"):
            x = self.acts["relu"](getattr(self, name)(x))
        return self.acts["relu"](self.layers["last"](x))

    model = net(
        forward, **convs("a", "b"), layers=nn.ModuleDict({"last": conv()}), acts=nn.ModuleDict({"relu": nn.ReLU()})
    )
    every_subset(model, count=3)


def test_lambdas_comprehensions_and_inner_functions():
    def forward(self, x):
        act = lambda value: self.relu(value)  # noqa: E731

        def step(value, layer):
            return F.relu(layer(value))

        x = act(self.a(x))
        x = functools.reduce(step, [self.b, self.c], x)
        return sum(act(layer(x)) for layer in [self.d])

    every_subset(net(forward, **convs("a", "b", "c", "d"), relu=nn.ReLU()), count=4)


def test_a_sequential_that_holds_the_same_relu_twice():
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(conv(), relu, conv(), relu, conv(), relu)
    _, converted = every_subset(model, count=3)
    assert isinstance(converted, nn.Sequential) and len(converted) == 6


def test_a_converted_sequential_can_still_be_sliced_and_extended():
    relu = nn.ReLU()
    model = nn.Sequential(conv(), relu, conv(), relu)
    converted = apply(model, planned(model))
    x = picture()
    assert_same(converted[:1](x), model[0](x), "a slice")
    assert_same(converted[:3](x), model[2](model[0](x)), "a slice")
    converted.append(nn.Flatten())
    assert converted(x).ndim == 2


def test_an_activation_shared_by_two_owners():
    def part(self, x):
        return self.act(self.two(self.act(self.one(x))))

    relu = nn.ReLU()
    left, right = net(part, **convs("one", "two"), act=relu), net(part, **convs("one", "two"), act=relu)
    model = net(
        lambda self, x: self.act(self.last(self.right(self.left(x)))), left=left, right=right, last=conv(), act=relu
    )
    every_subset(model, count=5)


def test_an_activation_registered_in_the_parent_only():
    def part(self, x, act):
        return act(self.two(act(self.one(x))))

    block = net(part, **convs("one", "two"))
    model = net(lambda self, x: self.block(self.first(x), self.act), first=conv(), block=block, act=nn.ReLU())
    everything(model)


def test_an_activation_passed_to_the_block_when_it_was_made():
    relu = nn.ReLU()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()
            self.__dict__["act"] = relu  # used, not registered

        def forward(self, x):
            return self.act(self.conv(x))

    model = net(
        lambda self, x: self.act(self.last(self.two(self.one(x)))), one=Block(), two=Block(), last=conv(), act=relu
    )
    everything(model)


@pytest.mark.parametrize("used", ["first_name", "second_name"])
def test_an_activation_with_two_names_in_its_owner(used):
    def forward(self, x):
        return self.last(self.b(getattr(self, used)(self.a(x))))

    relu = nn.ReLU()
    model = net(forward, **convs("a", "b"), first_name=relu, second_name=relu, last=nn.ReLU())
    every_subset(model, count=2)


def test_an_activation_in_a_plain_list_too():
    def forward(self, x):
        return self.last(self.b(self.acts[0](self.a(x))))

    relu = nn.ReLU()
    model = net(forward, **convs("a", "b"), act=relu, acts=[relu], last=nn.ReLU())
    every_subset(model, count=2)


def test_a_block_called_several_times():
    def part(self, x):
        return self.act(self.two(self.act(self.one(x))))

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return x

    block = net(part, **convs("one", "two"), act=nn.ReLU())
    every_subset(net(forward, block=block), count=2)


def test_a_block_registered_under_two_names():
    def part(self, x):
        return F.relu(self.two(F.relu(self.one(x))))

    block = net(part, **convs("one", "two"))
    model = net(lambda self, x: self.right(self.left(x)), left=block, right=block)
    _, converted = every_subset(model, count=2)
    assert converted.left is converted.right


def test_a_forward_called_by_hand():
    def part(self, x):
        return F.relu(self.act(self.one(x)))

    block = net(part, one=conv(), act=nn.ReLU())
    model = net(lambda self, x: F.relu(self.last(self.block.forward(x))), block=block, last=conv())
    everything(model)


def test_an_owner_that_calls_itself():
    def forward(self, x, depth=1):
        x = F.relu(self.conv(x))
        return self(x, depth - 1) if depth else x

    model = net(forward, conv=conv())
    everything(model)


# --- the shape of the memory ---------------------------------------------------------------------------------------


def test_many_blocks_are_traced_under_the_same_patches():
    """One that cannot be, in the middle, and one that counts with sizes by a function of math's: none sees another."""

    def plain(self, x):
        return F.relu(self.b(F.relu(self.a(x))))

    def scaled(self, x):
        return F.relu(self.b(F.relu(self.a(x)) / sqrt(x.shape[-1])))

    def stores(self, x):
        self.last = F.relu(self.a(x))
        return F.relu(self.b(self.last))

    def by_mode(self, x):
        x = F.relu(self.a(x))
        return F.relu(self.b(x * 2 if self.training else x))

    def named(self, x):
        return F.relu(self.b(F.relu(self.a(x)) * self.gain))

    kinds = {"plain": plain, "scaled": scaled, "stores": stores, "by_mode": by_mode, "named": named}
    blocks = {name: net(forward, **convs("a", "b")) for name, forward in kinds.items()}
    blocks["named"].gain = nn.Parameter(torch.rand(4, 1, 1))
    model = net(
        lambda self, x: self.plain(self.named(self.by_mode(self.stores(self.scaled(x))))),
        **dict(reversed(blocks.items())),
    )
    plan = planned(model)
    locked = {site.owner: site.locked for site in plan.sites if site.locked}
    assert set(locked) == {"stores"} and "stores attributes" in locked["stores"]
    converted = faithful(model, plan, picture())
    rewritten = {name for name in kinds if type(getattr(converted, name)) is not type(getattr(model, name))}
    assert rewritten == set(kinds) - {"stores"}
    with torch.no_grad():
        for size in (3, 9):  # a number made from sizes is not frozen
            x = picture(2, 4, size, size)
            assert torch.equal(converted.scaled(x), F.relu(model.scaled.b(model.scaled.a(x) / size**0.5)))
