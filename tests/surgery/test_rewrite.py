"""Blocks whose own forward must be rewritten: what they do must stay what they did, or the site is refused, in words.

Every net here is held against the oracle (the original, its dropped calls skipped), in eval and in train mode.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import random
import sys
import types
import warnings
from collections import OrderedDict, namedtuple
from math import sqrt
from typing import Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from calls import calls_of
from oracle import assert_same, dropped, record
from torch import Tensor, nn
from torch.nn.functional import relu as imported_relu
from torch.utils.checkpoint import checkpoint

import nmconv

torch.set_num_threads(1)

Pair = namedtuple("Pair", "one other")
T = TypeVar("T")


@dataclasses.dataclass
class Outputs:
    value: Tensor
    extra: Tensor | None = None


def net(forward, *bases, methods=None, **parts):
    """A module of a class of its own; parts are children and attributes."""
    space = {"forward": forward, "__module__": __name__, **(methods or {})}
    model = types.new_class("Net", bases or (nn.Module,), {}, lambda names: names.update(space))()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def conv(inputs=4, outputs=4):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def convs(*names):
    return {name: conv() for name in names}


def picture(*shape, seed=0):
    return torch.randn(*(shape or (2, 4, 6, 6)), generator=torch.Generator().manual_seed(seed))


def run(model, args, kwargs, training):
    """Output, arguments and buffers after one seeded call."""
    args, kwargs = copy.deepcopy((args, kwargs))
    kept = {name: value.clone() for name, value in model.named_buffers()}
    model.train(training)
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(*args, **kwargs)
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        for name, value in model.named_buffers():
            value.copy_(kept[name])
    return output, args, kwargs, buffers


def apply(model, plan, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        return nmconv.apply_plan(model, plan, **options)


def faithful(model, plan, *args, **kwargs):
    """Convert, hold against the oracle in both modes, and hand back the converted model, in eval mode."""
    gone = [site for site in plan.sites if site.action == "drop"]
    names = {module: name for name, module in model.named_modules()}
    expected = []
    for training in (False, True):
        with dropped(model, gone) as log:
            expected.append(run(model, args, kwargs, training))
        log.assert_all_hit(training=training)
    log.assert_inplace_agrees()
    keys = list(model.state_dict())
    converted = apply(model, plan, example_inputs=None if kwargs else args)
    assert isinstance(converted, type(model))
    assert list(converted.state_dict()) == keys
    assert set(model.modules()) == set(names), "the original has other modules now"
    for training, wanted in zip((False, True), expected, strict=True):
        assert_same(run(converted, args, kwargs, training), wanted, f"training={training}")
    model.eval()
    return converted.eval()


def planned(model, *args, ratio="2:1", **kwargs):
    return nmconv.make_plan(model, ratio, example_inputs=kwargs or args or picture(), keep="boundary")


def droppable(plan):
    return [site for site in plan.sites if site.action != "skip" and not site.locked]


def every_subset(model, *args, count, **kwargs):
    """The net has so many sites that can be dropped, and every choice of them is done right."""
    plan = planned(model, *args, **kwargs)
    sites = droppable(plan)
    assert len(sites) == count, str(plan)
    args = args or (() if kwargs else (picture(),))
    for gone in itertools.product((False, True), repeat=count):
        edits = {site.id: "drop" if drop else "keep" for site, drop in zip(sites, gone, strict=True)}
        converted = faithful(model, plan.edit(edits), *args, **kwargs)
    return plan.edit(dict.fromkeys((site.id for site in sites), "drop")), converted


def assert_same_gradients(model, plan):
    """After one step backwards the converted model's parameters have the gradients that the oracle's have."""
    converted = apply(model, plan)
    with dropped(model, plan.changes):
        model(picture()).square().sum().backward()
    converted(picture()).square().sum().backward()
    for one, other in zip(model.parameters(), converted.parameters(), strict=True):
        assert_same(one.grad, other.grad)


def everything(model, *args, **kwargs):
    """Drop whatever can be dropped: it is done right, or there is a reason in words, and the model is as it was.

    Returns:
        The converted model (at least what 2:1 drops and can be dropped is gone), and its plan.
    """
    args = args or (() if kwargs else (picture(),))
    plan = planned(model, *args, **kwargs)
    converted = faithful(model, plan, *args, **kwargs)  # what is planned can be done
    edited = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    try:
        apply(model, edited)
    except nmconv.RewriteError as error:
        assert any(reason in str(error) for reason in ("cannot be rewritten: ", "one decision would change several"))
        return converted, plan
    return faithful(model, edited, *args, **kwargs), edited


def refused(model, words, *args, **kwargs):
    """The one call that is to go at 2:1 stays instead, locked, and the plan says why; nothing else changes."""
    args = args or (() if kwargs else (picture(),))
    plan = planned(model, *args, **kwargs)
    locked = [site for site in plan.sites if site.locked]
    assert locked, str(plan)
    assert any(word in site.locked for site in locked for word in ([words] if isinstance(words, str) else words)), (
        locked
    )
    for site in locked:
        assert site.action != "drop"
        assert "cannot be dropped" in site.reason
        with pytest.raises(nmconv.PlanError, match="cannot be dropped"):
            plan.edit({site.id: "drop"})
    return plan, faithful(model, plan, *args, **kwargs)


def outer(block, **more):
    """conv, the block with an activation in its own forward, conv, a ReLU module: at 2:1 the block's is to go."""

    def forward(self, x):
        return self.relu(self.conv2(self.block(self.conv1(x))))

    return net(forward, **convs("conv1", "conv2"), block=block, relu=nn.ReLU(), **more)


# --- one activation, several calls --------------------------------------------------------------------------------


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


# --- arguments ----------------------------------------------------------------------------------------------------


def test_a_list_argument_that_the_block_changes():
    def fuse(self, maps):
        for at in range(len(maps)):
            maps[at] = self.branches[at](maps[at])
        return [self.relu(maps[0] + maps[1]), self.relu(self.last(maps[1]))]

    def forward(self, x):
        maps = [self.a(x), self.b(x)]
        fused = self.fuse(maps)
        return maps, fused  # the caller sees the changed list, which makes a fork of the sum

    model = net(
        forward,
        **convs("a", "b"),
        fuse=net(fuse, branches=nn.ModuleList([conv(), conv()]), last=conv(), relu=nn.ReLU()),
    )
    every_subset(model, count=1)


@pytest.mark.parametrize("how", ["append", "pop", "clear", "insert", "del", "extend"])
def test_a_list_argument_that_grows_or_shrinks(how):
    def part(self, x, maps):
        x = F.relu(self.conv(x))
        if how == "append":
            maps.append(x)
        elif how == "pop":
            x = x + maps.pop()
        elif how == "clear":
            maps.clear()
        elif how == "insert":
            maps.insert(0, x)
        elif how == "del":
            del maps[0]
        else:
            maps.extend([x, x * 2])
        return x

    def forward(self, x):
        maps = [x, x * 2]
        x = self.last(self.after(self.part(x, maps)))
        return x, maps

    model = net(forward, part=net(part, conv=conv()), after=conv(), last=nn.ReLU())
    everything(model)


def test_a_dict_argument():
    def part(self, maps):
        x = F.relu(self.conv(maps["x"]))
        maps["y"] = x
        return x

    def forward(self, x):
        maps = {"x": x}
        x = self.last(self.after(self.part(maps)))
        return x, maps

    model = net(forward, part=net(part, conv=conv()), after=conv(), last=nn.ReLU())
    everything(model)


def test_nested_containers_as_arguments():
    def part(self, pair, more):
        (one, two), [three] = pair, more
        return F.relu(self.conv(one + two * three))

    def forward(self, x):
        return self.last(self.after(self.part((x, x * 2), [x + 1])))

    every_subset(net(forward, part=net(part, conv=conv()), after=conv(), last=nn.ReLU()), count=2)


def optional(self, x, skip=None, scale=1.0, *, flip=False, **more):
    x = F.relu(self.conv(x))
    if skip is not None:
        x = x + skip
    if flip:
        x = x.flip(2)
    if more.get("twice"):
        x = x * 2
    return x * scale


def test_an_optional_argument_that_decides_has_the_value_it_was_converted_with():
    model = outer(net(optional, conv=conv()))
    _, converted = every_subset(model, count=2)
    x = picture()
    want = model.block.conv(x)
    assert_same(converted.block(x), want)
    assert_same(converted.block(x, None), want)
    assert_same(converted.block(x, skip=None, scale=1.0, flip=False), want)
    for args, kwargs in (
        ((x,), {"skip": x}),
        ((x, x), {}),
        ((x,), {"flip": True}),
        ((x,), {"twice": True}),
    ):
        with pytest.raises(nmconv.RewriteError, match="was rewritten by nmconv for"):
            converted.block(*args, **kwargs)
    assert_same(converted.block(x, None, 2.0), want * 2.0)  # what is only used may be another
    assert_same(converted.block(x, scale=3), want * 3)
    with pytest.raises(TypeError):
        converted.block()
    with pytest.raises(TypeError):
        converted.block(y=x)


def test_a_tensor_argument_that_is_missing_later():
    def part(self, x, mask):
        x = F.relu(self.conv(x))
        return x if mask is None else x * mask

    def forward(self, x):
        return self.last(self.after(self.part(x, torch.sigmoid(x))))

    model = net(forward, part=net(part, conv=conv()), after=conv(), last=nn.ReLU())
    _, converted = every_subset(model, count=2)
    for args in ((picture(), None), (picture(), 2.0), ([picture()], picture())):
        with pytest.raises(nmconv.RewriteError, match="was rewritten by nmconv for"):
            converted.part(*args)


def test_an_optional_tensor_that_is_given():
    def forward(self, x):
        return self.last(self.after(self.part(x, x, flip=True)))

    model = net(forward, part=net(optional, conv=conv()), after=conv(), last=nn.ReLU())
    _, converted = every_subset(model, count=2)
    with pytest.raises(nmconv.RewriteError):
        converted.part(picture())
    with pytest.raises(nmconv.RewriteError):
        converted.part(picture(), picture())


def test_one_tensor_given_by_position_here_and_by_keyword_there():
    def part(self, x, skip):
        return F.relu(self.conv(x) + skip)

    def forward(self, x):
        return self.last(self.after(self.part(self.part(x, x), skip=x)))

    model = net(forward, part=net(part, conv=conv()), after=conv(), last=nn.ReLU())
    everything(model)


def test_a_block_that_is_called_in_two_ways_is_refused():
    def forward(self, x):
        return self.last(self.after(self.part(self.part(x), x)))

    model = net(forward, part=net(optional, conv=conv()), after=conv(), last=nn.ReLU())
    plan = planned(model, ratio="4:1")
    edits = {site.id: "drop" for site in droppable(plan)}
    try:
        converted = apply(model, plan.edit(edits))
    except nmconv.RewriteError as error:
        assert "differ from call to call" in str(error)
    else:
        assert all(site.owner != "part" for site in nmconv.get_plan(converted).changes)


def test_keyword_only_and_starred_arguments():
    def part(self, *maps, weight, bias=0.5, **named):
        x = F.relu(self.conv(maps[0] + maps[1]))
        return x + weight + bias + named["shift"]

    def forward(self, x):
        return self.last(self.after(self.part(x, x * 2, weight=x, shift=x)))

    model = net(forward, part=net(part, conv=conv()), after=conv(), last=nn.ReLU())
    _, converted = every_subset(model, count=2)
    x = picture()
    with pytest.raises(nmconv.RewriteError):
        converted.part(x, x, x, weight=x, shift=x)
    with pytest.raises(nmconv.RewriteError):
        converted.part(x, x, weight=x, shift=x, unknown=x)


@pytest.mark.parametrize(
    "value", [3, 2.5, -1, True, "mean", None, (1, 2), [1, 2], float("inf"), torch.float32, slice(0, 2), 1j, 10**20]
)
def test_arguments_that_are_no_tensors(value):
    def part(self, x, option):
        assert option == value
        return F.relu(self.conv(x))

    def forward(self, x):
        return self.last(self.after(self.part(x, value)))

    model = net(forward, part=net(part, conv=conv()), after=conv(), last=nn.ReLU())
    converted, _plan = everything(model)
    if any(site.owner == "part" for site in nmconv.get_plan(converted).changes):
        with pytest.raises(nmconv.RewriteError):
            converted.part(picture(), "something else")


@pytest.mark.parametrize(
    "default", [float("inf"), float("nan"), (1, 2), [1, 2], {"a": 1}, torch.float16, torch.ones(1)]
)
def test_unusual_defaults(default):
    def part(self, x, option=default):
        return F.relu(self.conv(x))

    _, converted = every_subset(outer(net(part, conv=conv())), count=2)
    parameters = inspect.signature(converted.block.forward).parameters
    assert list(parameters) == ["x", "option"]
    assert parameters["option"].default is default


def test_the_signature_stays():
    def part(self, x: Tensor, /, skip: Tensor | None = None, *rest: Tensor, flag: bool = False, **more: int) -> Tensor:
        """What it does."""
        return F.relu(self.conv(x))

    model = outer(net(part, conv=conv()))
    _, converted = every_subset(model, count=2)
    assert str(inspect.signature(converted.block.forward)) == str(inspect.signature(model.block.forward))
    assert converted.block.forward.__doc__ == "What it does."


# --- what it returns ----------------------------------------------------------------------------------------------

RETURNS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"b": x, "a": y},
    "nested": lambda x, y: {"b": [x, (y, None)], "a": {"c": 1, "d": "text"}},
    "namedtuple": lambda x, y: Pair(x, y),
    "ordered dict": lambda x, y: OrderedDict([("b", x), ("a", y)]),
    "dataclass": lambda x, y: Outputs(x, y),
    "dataclass with a default": lambda x, y: Outputs(x),
    "numbers": lambda x, y: (x, y.shape[0], y.shape, 2, None),
    "an empty list": lambda x, y: (x, [], {}, ()),
    "a slice of the batch": lambda x, y: x[:1],
    "integer keys": lambda x, y: {0: x, 1: y},
    "default dict": lambda x, y: collections.defaultdict(list, {"x": x}),
}


@pytest.mark.parametrize("what", RETURNS)
def test_outputs_of_every_kind(what):
    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.b(x))
        return RETURNS[what](x, F.relu(self.c(x)))

    model = net(forward, **convs("a", "b", "c"))
    plan = planned(model, ratio="3:1")
    converted = faithful(model, plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop")), picture())
    assert type(converted(picture())) is type(model(picture()))


def test_an_output_that_is_its_own_class():
    class Bag(list):
        pass

    def part(self, x):
        bag = Bag([F.relu(self.conv(x))])
        bag.note = "kept"
        return bag

    model = net(
        lambda self, x: self.last(self.after(self.part(x)[0])),
        part=net(part, conv=conv()),
        after=conv(),
        last=nn.ReLU(),
    )
    plan = planned(model)
    converted = faithful(model, plan, picture())
    assert type(converted.part(picture())) is Bag
    assert converted.part(picture()).note == "kept"


# --- methods ------------------------------------------------------------------------------------------------------


def test_a_helper_method_that_holds_the_call():
    def bn_function(self, inputs):
        return self.conv1(self.relu(torch.cat(inputs, 1)))

    def forward(self, x):
        x = self.conv0(x)
        x = self.bn_function([x, x])
        return self.relu(self.conv3(self.relu(self.conv2(x))))

    model = net(
        forward, methods={"bn_function": bn_function}, **convs("conv0", "conv2", "conv3"), conv1=conv(8), relu=nn.ReLU()
    )
    every_subset(model, count=3)


def two_methods():
    def part(self, x):
        return self.b(F.relu(self.a(x)))

    def forward(self, x):
        x = F.relu(self.part(x))
        return F.relu(self.d(F.relu(self.c(x))))

    return net(forward, methods={"part": part}, **convs("a", "b", "c", "d"))


def test_calls_in_forward_and_in_a_helper_method_of_it():
    model = two_methods()
    _, converted = every_subset(model, count=4)
    assert_same(converted.part(picture()), model.b(model.a(picture())))


def test_converting_where_forward_and_a_helper_method_both_change():
    converted = nmconv.convert(two_methods(), "4:1", keep="boundary")
    assert nmconv.get_plan(converted).counts.activations_after == 1


def test_a_public_method_called_on_its_own():
    def forward_features(self, x):
        x = F.relu(self.a(x))
        return F.relu(self.b(x))

    def forward_head(self, x, pre_logits: bool = False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    methods = {"forward_features": forward_features, "forward_head": forward_head}
    model = net(forward, methods=methods, **convs("a", "b"), fc=nn.Linear(4, 3))
    _, converted = every_subset(model, count=2)
    x = picture()
    assert_same(converted.forward_features(x), model.b(model.a(x)))
    assert_same(converted.forward_head(converted.forward_features(x)), converted(x))
    assert_same(
        converted.forward_head(converted.forward_features(x), pre_logits=True), model.b(model.a(x)).mean((2, 3))
    )


def test_a_helper_method_called_twice():
    def part(self, x, layer):
        return F.relu(layer(x))

    def forward(self, x):
        return self.part(self.part(x, self.a), self.b)

    model = net(forward, methods={"part": part}, **convs("a", "b"))
    plan = planned(model)
    assert not plan.changes or faithful(model, plan, picture())
    for site in plan.sites:
        if site.locked:
            assert "several" in site.locked or "cannot be rewritten" in site.locked


@pytest.mark.parametrize("given", [True, False])
def test_a_helper_method_with_something_that_is_no_tensor(given):
    def part(self, x, skip, scale):
        x = F.relu(self.b(x))
        if skip is not None:
            x = x + skip
        return x * scale

    def forward(self, x):
        x = self.a(x)
        return self.relu(self.c(self.part(x, x if given else None, 2)))

    model = net(forward, methods={"part": part}, **convs("a", "b", "c"), relu=nn.ReLU())
    converted, plan = everything(model)
    calls = calls_of(model, plan, picture())
    x = picture()  # and on its own, whatever it is called with, it is right or says no
    for skip in (x, None):
        try:
            found = converted.part(x, skip, 2)
        except nmconv.RewriteError:
            continue
        gone = any(calls[site.id].method == "part" for site in nmconv.get_plan(converted).changes)
        y = model.b(x) if gone else F.relu(model.b(x))
        assert_same(found, (y if skip is None else y + skip) * 2)


def test_a_helper_method_that_takes_a_list_or_a_tensor():
    def part(self, inputs):
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        return F.relu(self.b(torch.cat(inputs, 1)))

    def forward(self, x):
        x = self.a(x)
        return self.relu(self.c(self.part([x, x])))

    model = net(forward, methods={"part": part}, **convs("a", "c"), b=conv(8), relu=nn.ReLU())
    everything(model)


def test_super_forward():
    class Base(nn.Module):
        def forward(self, x):
            return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x):
        return F.relu(self.c(Base.forward(self, x)))

    class Derived(Base):
        def forward(self, x):
            return F.relu(self.c(super().forward(x)))

    for cls in (Derived, type("Other", (Base,), {"forward": forward})):
        model = cls()
        for name, part in convs("a", "b", "c").items():
            setattr(model, name, part)
        every_subset(model, count=3)


def test_a_forward_put_on_the_object():
    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))))

    def other(self, x):
        return F.relu(self.b(F.relu(F.relu(self.a(x)) - 1))) * 2

    for part in (True, False):
        model = net(forward, **convs("a", "b"))
        model.forward = types.MethodType(other, model)
        model = outer(model) if part else model
        try:
            plan = planned(model, ratio="4:1")
        except nmconv.NoSitesError:
            continue
        faithful(model, plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop")), picture())


def test_a_class_with_a_hook_on_subclassing():
    made = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, key, **more):
            super().__init_subclass__(**more)
            made.append(key)

    class Block(Registered, key="block"):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return F.relu(self.conv(x))

    plan = planned(outer(Block()))
    faithful(outer(Block()), plan, picture())
    assert made == ["block"], "a rewritten class is nobody's subclass"


def test_generic_classes_and_properties():
    class Block(nn.Module, Generic[T]):
        factor = 2.0

        def __init__(self):
            super().__init__()
            self.conv = conv()
            self._shift = 0.25

        @property
        def shift(self):
            return self._shift

        @staticmethod
        def double(x):
            return x * 2

        @classmethod
        def scaled(cls, x):
            return x * cls.factor

        def forward(self, x):
            return self.scaled(self.double(F.relu(self.conv(x)))) + self.shift

    model = outer(Block())
    _, converted = every_subset(model, count=2)
    assert type(converted.block).__name__ == "Block"
    assert isinstance(converted.block, Block) and isinstance(converted.block, Generic)


# --- memory -------------------------------------------------------------------------------------------------------


def copies(model, plan):
    calls = calls_of(model, plan, picture())
    return [calls[site.id].copy for site in plan.sites if site.action != "skip"]


def test_no_copy_where_nobody_else_reads():
    def forward(self, x):
        y = self.relu1(self.bn(self.a(x)))
        y = F.relu(self.b(y))
        return self.relu2(self.c(y) + x)

    model = net(forward, **convs("a", "b", "c"), bn=nn.BatchNorm2d(4), relu1=nn.ReLU(), relu2=nn.ReLU())
    plan, _ = every_subset(model, count=3)
    assert copies(model, plan) == [False, False, False]


def test_no_copy_where_an_inplace_relu_follows_and_nobody_else_reads():
    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.b(y)
        y += x
        return F.relu_(y)

    model = net(forward, **convs("a", "b"))
    plan, _ = every_subset(model, count=2)
    assert copies(model, plan) == [False, False]


def overwriting(how):
    """The un-activated value y is read again after z, which shares its memory once the activation is gone, changes."""

    def forward(self, x):
        y = self.a(x)
        gate = y.view(y.shape) if how == "view" else y
        z = F.relu(y)
        if how == "add_":
            z.add_(1)
        elif how == "iadd":
            z += 1
        elif how == "setitem":
            z[:, 0] = 1
        elif how == "slice":
            z[:, 0].add_(1)
        elif how in ("chunk", "split", "unbind", "torch.chunk", "torch.split", "torch.unbind", "torch.select"):
            part = {
                "chunk": lambda: z.chunk(2, 1)[0],
                "split": lambda: z.split(2, 1)[0],
                "unbind": lambda: z.unbind(1)[0],
                "torch.chunk": lambda: torch.chunk(z, 2, 1)[0],
                "torch.split": lambda: torch.split(z, 2, 1)[0],
                "torch.unbind": lambda: torch.unbind(z, 1)[0],
                "torch.select": lambda: torch.select(z, 1, 0),
            }[how]()
            part += 1
        elif how in ("view", "relu_"):
            F.leaky_relu_(z, -0.5)
        elif how == "flatten":
            z.flatten(2).mul_(2)
        elif how == "diagonal":
            z.diagonal(dim1=2, dim2=3).zero_()
        elif how == "narrow":
            torch.narrow(z, 1, 0, 2).zero_()
        elif how == "select":
            z.select(1, 0).zero_()
        elif how == "unfold":
            z.unfold(2, 2, 2).mul_(2)
        elif how == "dropout":
            F.dropout(z, 0.5, self.training, inplace=True)
        elif how == "module":
            self.inplace(z)
        elif how == "atleast":
            torch.atleast_3d(z).zero_()
        elif how == "tensor_split":
            torch.tensor_split(z, 2, 1)[0].zero_()
        elif how == "as_strided":
            z.as_strided((2, 2), (1, 1)).zero_()
        elif how == "numpy index":
            z[..., None].zero_()
        elif how == "T":
            z.mT.zero_()
        elif how == "copy_":
            z.copy_(x)
        elif how == "clamp_":
            torch.clamp_(z, 0, 0.5)
        elif how == "out":
            torch.add(z, 1, out=z)
        elif how == "zero_":
            z.zero_()
        elif how == "opaque":
            self.opaque(z)
        elif how == "checkerboard":
            z[:, ::2, ::2] *= 0
        elif how == "data":
            z.data.mul_(2)
        elif how == "detach":
            z.detach().mul_(2)
        elif how == "movedim":
            z.movedim(1, 3).mul_(2)
        elif how == "swapdims":
            torch.swapdims(z, 1, 2).mul_(2)
        elif how == "broadcast":
            torch.broadcast_tensors(z, z)[0].clamp_(0, 1)
        elif how == "identity module":
            self.nothing(z).mul_(2)
        elif how == "eval dropout module":
            self.drop(z).mul_(2)
        elif how == "lerp_":
            z.lerp_(x, 0.5)
        elif how == "scatter":
            z.index_fill_(1, torch.tensor([0]), 0) if False else z.masked_fill_(x > 0, 0)
        return self.b(z) * torch.sigmoid(gate.mean((2, 3), keepdim=True))

    def opaque(self, x):
        return x.mul_(2) if x.sum().item() > 0 else x.add_(1)

    return net(
        forward,
        **convs("a", "b"),
        inplace=nn.Hardtanh(inplace=True),
        opaque=net(opaque),
        nothing=nn.Sequential(nn.Identity(), nn.Sequential()),
        drop=nn.Dropout(0.5),
    )


@pytest.mark.parametrize(
    "how",
    [
        "none",
        "add_",
        "iadd",
        "setitem",
        "slice",
        "chunk",
        "split",
        "unbind",
        "torch.chunk",
        "torch.split",
        "torch.unbind",
        "torch.select",
        "view",
        "relu_",
        "flatten",
        "diagonal",
        "narrow",
        "select",
        "unfold",
        "dropout",
        "module",
        "atleast",
        "tensor_split",
        "as_strided",
        "T",
        "copy_",
        "clamp_",
        "out",
        "zero_",
        "opaque",
        "checkerboard",
        "data",
        "detach",
        "movedim",
        "swapdims",
        "broadcast",
        "lerp_",
        "scatter",
        "numpy index",
        "identity module",
        "eval dropout module",
    ],
)
def test_the_identity_copies_where_the_value_is_read_again_after_a_change(how):
    model = overwriting(how)
    plan = planned(model)
    site = next(site for site in droppable(plan) if site.convs == ("a",))
    converted = faithful(model, plan.edit({site.id: "drop"}), picture())
    assert len(nmconv.get_plan(converted).changes) == 1
    assert calls_of(model, plan, picture())[site.id].copy == (how != "none")


def test_a_write_that_nobody_reads_by_its_own_name():
    """The other name of the memory is overwritten after the activation, by a call whose result is not used."""

    def forward(self, x):
        y = self.a(x)
        z = F.relu(y)
        y.mul_(2)
        return F.relu(self.b(z))

    every_subset(net(forward, **convs("a", "b")), count=2)


def test_a_write_that_also_reads_the_activated_value():
    """The written memory is the first operand's; that the second comes from the activation does not make it safe."""

    def forward(self, x):
        y = self.a(x)
        z = F.relu(y)
        y.add_(z)
        return F.relu(self.b(z))

    every_subset(net(forward, **convs("a", "b")), count=2)


def test_an_unread_write_to_what_a_gradient_needs():
    def forward(self, x):
        y = self.a(x)
        z = F.relu(y)
        w = self.b(z)  # keeps z for its weight's gradient
        y.add_(z)
        return F.relu(w)

    model = net(forward, **convs("a", "b"))
    plan, _ = every_subset(model, count=2)
    assert_same_gradients(model, plan)


@pytest.mark.parametrize("how", ["relu", "relu_", "sigmoid_"])
def test_a_write_to_what_the_call_before_keeps_for_its_gradient(how):
    """It stays, and needs what it made; the activation after it goes, and hands just that on to be overwritten."""

    def forward(self, x):
        y = getattr(torch, how)(self.a(x))
        z = F.silu(y)
        z.add_(1)
        return self.b(z)

    model = net(forward, **convs("a", "b"))
    plan = planned(model)
    site = next(site for site in droppable(plan) if site.function == "silu")
    plan = plan.edit({site.id: "drop"})
    faithful(model, plan, picture())
    assert_same_gradients(model, plan)


@pytest.mark.parametrize("how", ["activation", "sigmoid"])
def test_a_write_by_a_product_whose_written_operand_is_the_gate(how):
    def forward(self, x):
        y = F.relu_(self.a(x)) if how == "activation" else self.a(x).sigmoid_()
        z = F.silu(y)
        y.mul_(self.c(x))
        return F.relu(self.b(z)) + y

    every_subset(net(forward, **convs("a", "b", "c")), count=2)


def test_a_write_between_the_activation_and_its_reader_through_a_view():
    def forward(self, x):
        y = self.a(x)
        view = y.flatten(2)
        z = F.silu(y)
        F.relu_(view)
        return F.relu(self.b(z))

    every_subset(net(forward, **convs("a", "b")), count=2)


def test_two_dropped_activations_in_a_row_and_a_write_at_the_end():
    def forward(self, x):
        y = F.relu(self.a(x))
        z = F.silu(self.bn(y))
        w = F.relu(z.view(z.shape))
        w += 1
        return F.relu(self.b(w)) + z.mean() + y.mean()

    model = net(forward, **convs("a", "b"), bn=nn.Identity())
    everything(model)


def test_a_preactivation_of_the_input_itself_does_not_change_the_callers_tensor():
    def forward(self, x):
        y = F.relu(x)
        y += 1
        y = self.a(y)
        z = F.relu(y)
        return self.b(z)

    model = net(forward, **convs("a", "b"))
    everything(model)

    def forward(self, x):
        return self.relu(self.b(self.part(x)))

    def part(self, x):  # its own input belongs to others
        return F.relu(x)

    model = net(
        lambda self, x: self.relu(self.b(self.inner(x)) + x),
        inner=net(lambda self, x: self.c(F.relu(x))),
        b=conv(),
        relu=nn.ReLU(),
    )
    model.inner.c = conv()
    everything(model)


def test_both_values_are_returned():
    def forward(self, x):
        y = self.a(x)
        z = F.relu(y)
        return z, y[:, :1], self.b(z)

    model = net(forward, **convs("a", "b"))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = faithful(model, plan, picture())
    one, other, _ = converted(picture())
    before = other.clone()
    one.data.zero_()
    assert_same(other, before, "the caller overwrites one output and finds the other changed")


def test_in_place_operators_keep_who_is_who():
    def forward(self, x):
        x = self.a(x)
        y = x
        y += 1
        x = F.relu(x)
        z = x
        z *= 2
        z -= y
        z /= 4
        w = self.b(z)
        v = w
        v **= 2
        w = self.relu(w)
        w += v
        return self.relu(self.c(w)), x

    everything(net(forward, **convs("a", "b", "c"), relu=nn.ReLU()))


def test_numbers_are_not_tensors():
    def forward(self, x):
        n = x.size(0)
        m = n
        n += 1
        k = x.shape[1]
        k *= 2
        j = k
        j -= 1
        j //= 2
        q = x.shape[2] / 2
        q /= 3
        x = F.relu(self.a(x)) * n / m + k - j * q
        return F.relu(self.b(x)) * n**2

    every_subset(net(forward, **convs("a", "b")), count=2)


def test_gradients_are_the_same_and_autograd_does_not_complain():
    def forward(self, x):
        y = torch.sigmoid(self.a(x))
        z = F.relu(y)  # would hand on memory that sigmoid's gradient needs
        z += 1
        z = self.b(z)
        w = F.relu(z)
        w *= 2
        return self.relu(self.c(w))

    model = net(forward, **convs("a", "b", "c"), relu=nn.ReLU(inplace=True))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    assert plan.changes
    converted = apply(model, plan)
    with dropped(model, plan.changes):
        model(picture()).square().sum().backward()
    converted(picture()).square().sum().backward()
    for one, other in zip(model.parameters(), converted.parameters(), strict=True):
        assert_same(one.grad, other.grad)


# --- types --------------------------------------------------------------------------------------------------------

LIBRARY = types.ModuleType("nmconv_test_library")
exec(
    """
import torch
def as_list(x):
    return [x] if isinstance(x, torch.Tensor) else list(x)
def first(x):
    return x[0] if isinstance(x, (tuple, list)) else x
def exact(x):
    return x if type(x) is torch.Tensor else x[0]
""",
    LIBRARY.__dict__,
)
sys.modules["nmconv_test_library"] = LIBRARY


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


# --- attributes that change after conversion ----------------------------------------------------------------------


class Settings:
    def __init__(self):
        self.flag = False


def reads_flag(how):
    """A block that reads a flag of its own in one way, and a function that sets it."""

    def part(self, x):
        x = F.relu(self.conv(x))
        flag = {
            "attribute": lambda: self.flag,
            "getattr": lambda: getattr(self, "flag", False),
            "vars": lambda: vars(self)["flag"],
            "object": lambda: self.settings.flag,
            "dict": lambda: self.options["flag"],
            "list": lambda: self.options_list[0],
            "class attribute": lambda: self.class_flag,
            "property": lambda: self.is_flagged,
            "method": lambda: self.flagged(),
            "child": lambda: self.conv.flag,
            "local name": lambda: (lambda me: me.flag)(self),
        }[how]()
        return x * 2 if flag else x

    block = net(
        part,
        conv=conv(),
        flag=False,
        settings=Settings(),
        options={"flag": False},
        options_list=[False],
        methods={
            "class_flag": False,
            "is_flagged": property(lambda self: self.flag),
            "flagged": lambda self: self.flag,
        },
    )
    block.conv.flag = False

    def switch(block):
        block.flag = block.class_flag = block.settings.flag = block.options["flag"] = block.options_list[0] = True
        block.conv.flag = True

    return block, switch


@pytest.mark.parametrize(
    "how",
    [
        "attribute",
        "getattr",
        "vars",
        "object",
        "dict",
        "list",
        "class attribute",
        "property",
        "method",
        "child",
        "local name",
    ],
)
def test_a_flag_set_after_conversion_is_followed_or_complained_about(how):
    block, switch = reads_flag(how)
    model = outer(block)
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = faithful(model, plan, picture())
    switch(model.block)
    switch(converted.block)
    with contextlib.suppress(nmconv.RewriteError), dropped(model, plan.changes):
        assert_same(converted(picture()), model(picture()))


def test_the_dtype_of_the_parameters_is_read_anew():
    def part(self, x):
        x = x.to(next(self.parameters()).dtype)
        return F.relu(self.conv(x)).to(self.conv.weight.dtype)

    model = outer(net(part, conv=conv()))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = faithful(model, plan, picture())
    assert converted.double()(picture().double()).dtype == torch.float64


# --- modes --------------------------------------------------------------------------------------------------------


def test_dropout_follows_the_mode_after_conversion():
    def part(self, x):
        x = F.relu(self.conv(x))
        x = F.dropout(x, 0.5, self.training)
        x = F.dropout(x, p=0.3, training=self.training, inplace=True)
        return F.relu(x)

    model = outer(net(part, conv=conv()))
    for training in (False, True):
        model.train(training)
        plan = planned(model)
        plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
        converted = faithful(model, plan, picture())
        x = picture()
        assert_same(converted.eval()(x), converted(x))
        torch.manual_seed(0)
        one = converted.train()(x)
        assert not torch.equal(one, converted(x))
        converted.block.eval()
        assert_same(converted(x), converted.eval()(x))


def test_a_forward_with_other_calls_in_train_mode():
    def part(self, x):
        if self.training:
            x = F.relu(self.only(x))
            x = F.relu(self.conv(x))
            return F.relu(self.conv2(x))
        return F.relu(self.conv2(F.relu(self.conv(x))))

    model = outer(net(part, **convs("only", "conv", "conv2")))
    plan = planned(model)
    for site in droppable(plan):
        faithful(model, plan.edit({site.id: "drop"}), picture())
    faithful(model, plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop")), picture())


def test_calls_that_run_in_training_first_do_not_shift_the_others():
    def forward(self, x):
        if self.training:
            x = F.relu(self.extra(x), inplace=True)
        x = F.relu(self.a(x))
        return F.relu(self.b(x))

    model = net(forward, **convs("extra", "a", "b"))
    plan = planned(model)
    with record(model.train()) as entries:
        model(picture())
    for site in plan.sites:
        call = site.train_call if site.modes == "both" else site.call
        inplace = calls_of(model, plan, picture())[site.id].inplace
        assert entries[call - 1].inplace == inplace, site
        assert (site.modes == "train") == inplace
    for site in droppable(plan):
        faithful(model, plan.edit({site.id: "drop"}), picture())


def test_the_mode_of_another_module_is_refused_or_followed():
    def part(self, x):
        return F.dropout(F.relu(self.conv(x)), 0.5, self.conv.training)

    model = outer(net(part, conv=conv()))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = faithful(model, plan, picture())
    converted.block.conv.train()
    assert not torch.equal(converted(picture()), converted(picture()))


# --- what must be refused, or be done right -----------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Hands the tensor on, and doubles its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "autocast to another type": lambda: torch.autocast("cpu", dtype=torch.float16),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "set_grad_enabled, true": lambda: torch.set_grad_enabled(True),
    "fork_rng": lambda: torch.random.fork_rng([]),
    "null": contextlib.nullcontext,
}


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("around", ["null", "no_grad", "autocast"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_that_the_block_enters_is_never_lost(context, around, inside):
    """Whatever surrounds the conversion, the converted model computes in the context that its source enters."""

    def plain(self, x):
        with CONTEXTS[context]():
            x = self.conv(x.float())
        return F.relu(x.float().clone())

    def whole(self, x):
        with CONTEXTS[context]():
            x = F.relu(self.conv(x.float()))
        return x.float().clone()

    model = outer(net(whole if inside else plain, conv=conv()))
    with CONTEXTS[around]():
        plan = planned(model)
        plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
        converted = apply(model, plan)
    for outside in (contextlib.nullcontext, torch.no_grad, lambda: torch.autocast("cpu")):
        found = []
        for each in (model, converted):
            each.eval()
            seen = []
            each.block.conv.register_forward_hook(
                lambda m, i, o, seen=seen: seen.append((o.dtype, o.requires_grad, torch.is_inference(o)))
            )
            with outside(), dropped(model, plan.changes) if each is model else contextlib.nullcontext():
                output = each(picture())
                found.append((output.dtype, output.requires_grad, output.float().detach().clone(), seen[-1]))
        assert_same(found[1], found[0])
    if any(site.owner == "block" and site.locked for site in plan.sites):
        assert any("context" in site.locked for site in plan.sites)


def test_a_forward_with_a_decorator():
    def counted(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            return function(self, *args, **kwargs) * 2

        return wrapper

    @counted
    def part(self, x, scale=1):
        return F.relu(self.conv(x)) * scale

    model = outer(net(part, conv=conv()))
    everything(model)

    @torch.no_grad()
    def frozen(self, x):
        return F.relu(self.conv(x))

    model = outer(net(frozen, conv=conv()))
    plan = planned(model)
    converted = apply(model, plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop")))
    assert not converted.block(picture()).requires_grad


class Namespace:
    pass


STORES = {
    "tensor": lambda self, x: setattr(self, "last", x),
    "counter": lambda self, x: setattr(self, "count", self.count + 1),
    "list": lambda self, x: self.kept.append(x),
    "full list": lambda self, x: self.full.append(x),
    "dict": lambda self, x: self.table.update(x=x),
    "set": lambda self, x: self.seen.add(self.count),
    "deque": lambda self, x: self.recent.append(x),
    "object": lambda self, x: setattr(self.space, "last", x),
    "counter of an object": lambda self, x: setattr(self.space, "count", getattr(self.space, "count", 0) + 1),
    "nested list": lambda self, x: self.nested[0].append(x),
    "child's attribute": lambda self, x: setattr(self.conv, "last", x),
    "buffer in place": lambda self, x: self.steps.add_(1),
    "buffer anew": lambda self, x: setattr(self, "steps", self.steps + 1),
    "delete": lambda self, x: delattr(self, "spare") if hasattr(self, "spare") else None,
    "plain dict entry": lambda self, x: self.__dict__.update(direct=x),
    "ordered dict": lambda self, x: self.ordered.update(x=x),
    "counter class": lambda self, x: self.tally.update(["x"]),
}


def storing(what):
    def part(self, x):
        x = self.conv(x)
        STORES[what](self, x)
        return F.relu(x)

    block = net(
        part,
        conv=conv(),
        count=0,
        kept=[],
        full=[1],
        table={},
        seen=set(),
        recent=collections.deque(maxlen=2),
        space=Namespace(),
        nested=[[]],
        spare=1,
        ordered=OrderedDict(),
        tally=collections.Counter(),
        last=None,
    )
    block.register_buffer("steps", torch.zeros(()))
    return block


def state(block):
    found = {name: value for name, value in vars(block).items() if not name.startswith("_")}
    found["space"] = dict(vars(block.space))
    found["conv.last"] = getattr(block.conv, "last", None)
    found["steps"] = block.steps
    found["recent"] = list(block.recent)
    found["tally"] = dict(block.tally)
    return found


@pytest.mark.parametrize("what", STORES)
def test_a_block_that_stores_something_goes_on_storing_it(what):
    model = outer(storing(what))
    before = copy.deepcopy(state(model.block))
    plan = planned(model)
    assert_same(state(model.block), before, "planning has left something")
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = apply(model, plan)
    assert_same(state(model.block), before, "converting has left something in the original")
    assert_same(state(converted.block), before, "converting has left something")
    with torch.no_grad():
        for _ in range(2):
            with dropped(model, plan.changes):
                wanted = model(picture())
            assert_same(converted(picture()), wanted)
            assert_same(state(converted.block), state(model.block))
    if any(site.locked for site in plan.sites):
        assert any("stores" in site.locked or "attribute" in site.locked for site in plan.sites)


class AttrDict(dict):
    """As many configurations are."""

    def __init__(self, path, **more):
        super().__init__(more)
        self.path = path

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class FrozenDict(dict):
    """One that refuses to be changed."""

    def _refuse(self, *args, **kwargs):
        raise TypeError("this dict is frozen")

    def __deepcopy__(self, memo):
        return self

    __setitem__ = __delitem__ = clear = update = pop = setdefault = _refuse


@pytest.mark.parametrize("settings", [AttrDict("here", scale=2), FrozenDict(scale=2), FrozenDict(), AttrDict("here")])
def test_containers_of_unusual_classes_among_the_attributes(settings):
    def part(self, x):
        return F.relu(self.conv(x)) * 2

    model = outer(net(part, conv=conv(), settings=settings), config=settings)
    before = dict(settings)
    _, converted = every_subset(model, count=2)
    assert model.config is settings and model.block.settings is settings
    assert dict(settings) == before and type(settings) is type(converted.config)


RANDOM = {
    "random": lambda self: random.random(),
    "torch": lambda self: float(torch.rand(())),
    "own generator": lambda self: self.generator.random(),
    "torch generator": lambda self: float(torch.rand((), generator=self.torch_generator)),
    "shuffle": lambda self: random.sample([1.0, 2.0, 3.0, 4.0, 5.0], 5)[0],
    "numpy": lambda self: float(pytest.importorskip("numpy").random.rand()),
    "numpy generator": lambda self: float(self.numpy_generator.random()),
}


@pytest.mark.parametrize("what", RANDOM)
def test_random_decisions_are_not_frozen(what):
    import numpy

    def part(self, x):
        return F.relu(self.conv(x)) * RANDOM[what](self)

    block = net(
        part,
        conv=conv(),
        generator=random.Random(0),
        torch_generator=torch.Generator().manual_seed(0),
        numpy_generator=numpy.random.default_rng(0),
    )
    model = outer(block)
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = apply(model, plan).eval()
    with torch.no_grad():
        assert len({float(converted.block(picture()).sum()) for _ in range(20)}) > 2
    locked = [site for site in plan.sites if site.locked]
    assert locked and all("random" in site.locked for site in locked)


def test_planning_leaves_generators_alone():
    import numpy

    def part(self, x):
        return F.relu(self.conv(x)) * (
            random.random() + float(torch.rand(())) + self.own.random() + numpy.random.rand()
        )

    model = outer(net(part, conv=conv(), own=random.Random(0)))
    before = (
        random.getstate(),
        torch.get_rng_state().tolist(),
        model.block.own.getstate(),
        str(numpy.random.get_state()),
    )
    planned(model)
    after = (
        random.getstate(),
        torch.get_rng_state().tolist(),
        model.block.own.getstate(),
        str(numpy.random.get_state()),
    )
    assert after == before


def test_random_tensors_like_the_input_are_drawn_anew():
    def part(self, x):
        x = F.relu(self.conv(x))
        return x + torch.rand_like(x) + torch.randn(x.shape[0], 1, 1, 1) * 0

    model = outer(net(part, conv=conv()))
    converted, _plan = everything(model)
    assert not torch.equal(converted.block(picture()), converted.block(picture()))


BRANCHES = {
    "shape": lambda x: x.shape[2] > 4,
    "size": lambda x: x.size(2) > 4,
    "ndim": lambda x: x.ndim == 4,
    "numel": lambda x: x.numel() > 100,
    "data": lambda x: bool((x > 0).all()),
    "data by item": lambda x: x.sum().item() > 0,
    "data by float": lambda x: float(x.detach().sum()) > 0,
    "dtype": lambda x: x.dtype == torch.float32,
    "device": lambda x: x.device.type == "cpu",
    "requires_grad": lambda x: x.requires_grad,
    "contiguous": lambda x: x.is_contiguous(),
    "floating": lambda x: x.is_floating_point(),
    "len": lambda x: len(x) > 1,
    "any": lambda x: any(extent == 6 for extent in x.shape),
    "tuple": lambda x: tuple(x.shape[2:]) == (6, 6),
    "range": lambda x: [1 for _ in range(x.shape[0])] == [1, 1],
    "str": lambda x: str(x.dtype) == "torch.float32",
    "format": lambda x: f"{x.shape[2]}" == "6",
    "grad enabled": lambda x: torch.is_grad_enabled(),
    "autocast": lambda x: torch.is_autocast_enabled("cpu"),
    "min": lambda x: min(x.shape[2], 4) == 4,
    "int": lambda x: int(x.shape[2]) > 4,
    "equal": lambda x: x.shape == (2, 4, 6, 6),
    "in": lambda x: 6 in x.shape,
    "tracing": lambda x: torch.jit.is_tracing(),
    "compiling": lambda x: torch.compiler.is_compiling(),
    "nan": lambda x: not torch.isnan(x).any(),
    "all finite": lambda x: torch.isfinite(x).all(),
    "torch.numel": lambda x: torch.numel(x) > 100,
    "identity": lambda x: x is not None,
    "channels last": lambda x: x.is_contiguous(memory_format=torch.channels_last),
    "layout": lambda x: x.layout == torch.strided,
}
INPUTS = [
    picture(),
    picture(2, 4, 3, 3),
    picture(1, 4, 6, 6),
    -picture().abs(),
    picture().to(memory_format=torch.channels_last),
    picture(4, 6, 6),
]


@pytest.mark.parametrize("what", BRANCHES)
def test_branches_are_taken_anew_or_refused(what):
    """On inputs of other shapes, values and layouts than those of the conversion too."""

    def part(self, x):
        taken = BRANCHES[what](x)
        x = F.relu(self.conv(x))
        return x * 2 if taken else x - 1

    model = outer(net(part, conv=conv()))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = faithful(model, plan, picture())
    for context in (contextlib.nullcontext, torch.no_grad, lambda: torch.autocast("cpu")):
        for x in INPUTS:
            with context(), dropped(model, plan.changes):
                wanted = model(x.clone())
            with context():
                assert_same(converted(x.clone()), wanted)
    for site in plan.sites:
        assert not site.locked or "cannot be rewritten: " in site.locked


def test_assertions_still_speak():
    def part(self, x):
        assert x.shape[1] == 4, "four channels"
        if x.ndim != 4:
            raise ValueError("four dimensions")
        return F.relu(self.conv(x))

    model = outer(net(part, conv=conv()))
    converted, _plan = everything(model)
    with pytest.raises(ValueError, match="four dimensions"):
        converted.block(picture(4, 4, 4))
    with pytest.raises(AssertionError, match="four channels"):
        converted.block(picture(2, 3, 6, 6))


def test_an_assertion_on_a_shape():
    def part(self, x):
        assert x.shape[1] == 4, "four channels"
        return F.relu(self.conv(x))

    model = outer(net(part, conv=conv()))
    converted, _plan = everything(model)
    with pytest.raises(AssertionError, match="four channels"):
        converted.block(picture(2, 3, 6, 6))


def test_try_and_except():
    def part(self, x):
        x = F.relu(self.conv(x))
        try:
            return x + self.missing
        except AttributeError:
            return x * 2

    everything(outer(net(part, conv=conv())))

    def part(self, x):
        x = F.relu(self.conv(x))
        try:
            if x.sum() > 0:
                return x
            return x + 1
        except Exception:  # it catches the tracer's own complaint
            return x * 2

    model = outer(net(part, conv=conv()))
    everything(model)


def test_a_gradient_of_its_own_is_not_lost():
    def part(self, x):
        return F.relu(Doubled.apply(self.conv(x)))

    model = outer(net(part, conv=conv()))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = apply(model, plan)
    grads = []
    for each in (model, converted):
        with dropped(model, plan.changes) if each is model else contextlib.nullcontext():
            each(picture()).square().sum().backward()
        grads.append([parameter.grad for parameter in each.parameters()])
    assert_same(grads[1], grads[0])


def test_detach_is_not_lost():
    def part(self, x):
        y = self.conv(x)
        return F.relu(y) + y.detach() * 2 + y.data

    every_subset(outer(net(part, conv=conv())), count=1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_the_block_is_not_lost(reentrant):
    def inner(self, x):
        return F.relu(self.conv(x))

    def part(self, x):
        x = checkpoint(self.inner, x, use_reentrant=reentrant)
        return F.relu(self.conv2(x))

    model = outer(net(part, **convs("conv", "conv2"), methods={"inner": inner}))
    plan = planned(model, ratio="3:1")
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = apply(model, plan)
    counts = []
    for each in (model, converted):
        calls = []
        each.block.conv.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with dropped(model, plan.changes) if each is model else contextlib.nullcontext():
            each(picture().requires_grad_()).sum().backward()
        counts.append(len(calls))
    assert counts[0] == counts[1]  # with early stop the last convolution need not run again


def test_a_module_made_in_the_forward():
    def part(self, x):
        return F.relu(nn.Identity()(self.conv(x)))

    every_subset(outer(net(part, conv=conv())), count=2)

    def part(self, x):
        return F.relu(nn.BatchNorm2d(4)(self.conv(x)))

    assert [site.locked for site in everything(outer(net(part, conv=conv())))[1].sites if site.locked]


def test_a_closure_over_another_module():
    other = conv()

    def part(self, x):
        return F.relu(self.conv(x) + other(x))

    model = outer(net(part, conv=conv()))
    everything(model)


def test_global_names_with_the_same_name():
    """Two functions of one name, from two modules."""

    def part(self, x):
        x = F.relu(self.conv(x))
        return torch.pow(x, 2) + x.pow(2) + torch.special.expit(x) + F.softmax(x, 1) + torch.softmax(x, 1)

    every_subset(outer(net(part, conv=conv())), count=2)


def test_python_builtins_and_odd_operators():
    def part(self, x):
        x = F.relu(self.conv(x))
        y = abs(x) + max([x.mean(), x.mean()], key=id) + sum([x, x]) - -x + +x
        y = y @ y.transpose(2, 3) + (x > 0) * (x != 1) + (~(x > 0)).float() + x // 2 + x % 2 + 2**x + divmod(7, 2)[0]
        y[..., 0] = 0
        y[:, 1:3, None] = 1
        z, *rest = y.unbind(1)
        return torch.stack([z, *rest], 1) if len(rest) == 3 else y

    model = outer(net(part, conv=conv()))
    everything(model)


def test_complaints_are_named_in_the_plan():
    def part(self, x):
        x = F.relu(self.conv(x))
        return x * 2 if x.sum() > 0 else x

    _, plan = everything(outer(net(part, conv=conv())))
    (site,) = [site for site in plan.sites if site.locked]
    assert "block.forward" in site.locked and "branches on a shape or value" in site.locked

    def part(self, x):
        x = F.relu(self.conv(x))
        return x * 2 if x.shape[2] > 4 else x

    plan, _ = refused(outer(net(part, conv=conv())), "branches on a shape")
    site = next(site for site in plan.sites if site.locked)
    assert "block.forward" in site.locked and "cannot be rewritten" in site.locked
    assert site.id in str(plan) and "branches on a shape" in str(plan)


# --- the same, hidden one step further away -----------------------------------------------------------------------

exec(
    """
import torch

def twice_if_tensor(x):
    return x * 2 if isinstance(x, torch.Tensor) else x

def scaled(x, module):
    return x * module.scale

def precise(x, module):
    with torch.autocast("cpu", enabled=False):
        return module(x.float())

def inner(x, module):
    return precise(x, module)

def deep(x, module):
    return inner(x, module)

@torch.autocast("cpu", enabled=False)
def decorated(x, module):
    return module(x.float())

def with_grad(x, module):
    with torch.enable_grad():
        return module(x)
""",
    LIBRARY.__dict__,
)
inner_of_library = LIBRARY.deep


def precise_here(x, module):
    with torch.autocast("cpu", enabled=False):
        return module(x.float())


def calls_precise_here(x, module):
    return precise_here(x, module)


class Precise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.conv(x.float())

    def run(self, x):
        return self.forward(x)

    @property
    def mode(self):
        return torch.autocast("cpu", enabled=False)


HIDDEN = {
    "a library's function": lambda self, x: LIBRARY.precise(x, self.conv),
    "a library's function that calls another": lambda self, x: LIBRARY.deep(x, self.conv),
    "an imported function": lambda self, x: inner_of_library(x, self.conv),
    "a decorated function": lambda self, x: LIBRARY.decorated(x, self.conv),
    "a function that calls another": lambda self, x: calls_precise_here(x, self.conv),
    "a child's forward": lambda self, x: self.child.forward(x),
    "a child's method": lambda self, x: self.child.run(x),
    "an exit stack": lambda self, x: [stack := contextlib.ExitStack(), stack.enter_context(self.child.mode),
                                      self.conv(x.float()), stack.close()][2],
    "by hand": lambda self, x: [mode := self.child.mode, mode.__enter__(), self.conv(x.float()),
                                mode.__exit__(None, None, None)][2],
}  # fmt: skip


@pytest.mark.parametrize("how", HIDDEN)
def test_a_context_that_is_entered_out_of_sight(how):
    def part(self, x):
        return F.relu(HIDDEN[how](self, x))

    model = outer(net(part, conv=conv(), child=Precise()))
    converted, plan = everything(model)
    with torch.no_grad(), torch.autocast("cpu"):
        for each in (model, converted):
            seen = []
            for child in (each.block.conv, each.block.child.conv):
                child.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.dtype))
            with dropped(model, plan.changes) if each is model else contextlib.nullcontext():
                each(picture())
            assert seen == [torch.float32]


def test_enable_grad_in_a_library():
    def part(self, x):
        return F.relu(LIBRARY.with_grad(x, self.conv))

    model = outer(net(part, conv=conv()))
    converted, _ = everything(model)
    with torch.no_grad():
        seen = []
        converted.block.conv.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
        converted(picture())
    assert seen == [True]


def test_a_library_asks_for_the_type():
    def part(self, x):
        return F.relu(self.conv(LIBRARY.twice_if_tensor(x)))

    everything(outer(net(part, conv=conv())))


def scaled_by_second(x, module):
    return x * module.scale


def scaled_by_first(module, x):
    return x * module.scale


@pytest.mark.parametrize("how", ["library", "second argument", "first argument", "child's forward", "alias", "tuple"])
def test_an_attribute_that_is_read_out_of_sight(how):
    def part(self, x):
        x = F.relu(self.conv(x))
        if how == "library":
            return LIBRARY.scaled(x, self)
        if how == "second argument":
            return scaled_by_second(x, self)
        if how == "first argument":
            return scaled_by_first(self, x)
        if how == "child's forward":
            return self.child.forward(x)
        if how == "alias":
            me = self
            return x * me.scale
        scale, _ = (self.scale, 1)
        return x * scale

    block = net(part, conv=conv(), scale=2.0, child=net(lambda self, x: x * self.scale, scale=2.0))
    model = outer(block)
    converted, plan = everything(model)
    for each in (model, converted):
        each.block.scale = each.block.child.scale = 3.0
    with contextlib.suppress(nmconv.RewriteError), dropped(model, plan.changes):
        assert_same(converted(picture()), model(picture()))


def test_a_container_of_settings_that_changes_later():
    def part(self, x):
        x = F.relu(self.conv(x))
        for scale in self.scales:
            x = x * scale
        return F.interpolate(x, **self.options)

    model = outer(net(part, conv=conv(), scales=[2.0, 3.0], options={"scale_factor": 2}))
    converted, plan = everything(model)
    for each in (model, converted):
        each.block.scales.append(5.0)
        each.block.options["scale_factor"] = 3
    with contextlib.suppress(nmconv.RewriteError), dropped(model, plan.changes):
        assert_same(converted(picture()), model(picture()))


def test_children_that_are_exchanged_later_are_used():
    def part(self, x):
        x = F.relu(self.conv(x))
        for layer in self.layers:
            x = layer(x)
        return self.extra(x)

    model = outer(net(part, conv=conv(), layers=nn.ModuleList([conv(), conv()]), extra=nn.Identity()))
    converted, plan = everything(model)
    replaced, another = conv(), conv()
    for each in (model, converted):
        each.block.extra = replaced
        each.block.layers[1] = another
        each.block.conv = another
    with dropped(model, plan.changes):
        assert_same(converted(picture()), model(picture()))
    for each in (model, converted):
        each.block.layers.append(replaced)
    with contextlib.suppress(nmconv.RewriteError), dropped(model, plan.changes):
        assert_same(converted(picture()), model(picture()))


def test_a_child_that_is_none_at_first():
    def part(self, x):
        y = F.relu(self.conv(x))
        return y + (x if self.downsample is None else self.downsample(x))

    block = net(part, conv=conv())
    block.downsample = None
    block.register_module("other", None)
    model = outer(block)
    converted, plan = everything(model)
    added = conv()
    for each in (model, converted):
        each.block.downsample = added
    with contextlib.suppress(nmconv.RewriteError), dropped(model, plan.changes):
        assert_same(converted(picture()), model(picture()))


def test_an_optional_parameter_and_buffer():
    def part(self, x):
        x = F.relu(self.conv(x))
        if self.bias is not None:
            x = x + self.bias
        if self.mask is not None:
            x = x * self.mask
        return x

    block = net(part, conv=conv())
    block.register_parameter("bias", None)
    block.register_buffer("mask", None)
    model = outer(block)
    converted, plan = everything(model)
    for each in (model, converted):
        each.block.bias = nn.Parameter(torch.ones(4, 1, 1))
        each.block.mask = torch.full((4, 1, 1), 2.0)
    with contextlib.suppress(nmconv.RewriteError), dropped(model, plan.changes):
        assert_same(converted(picture()), model(picture()))


SCALE = 2.0


def test_a_global_that_changes_later(monkeypatch):
    def part(self, x):
        return F.relu(self.conv(x)) * SCALE

    model = outer(net(part, conv=conv()))
    converted, plan = everything(model)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    with contextlib.suppress(nmconv.RewriteError), dropped(model, plan.changes):
        assert_same(converted(picture()), model(picture()))


def test_a_loop_whose_length_is_an_attribute():
    def part(self, x):
        for _ in range(self.repeats):
            x = F.relu(self.conv(x))
        return x

    block = net(part, conv=conv(), repeats=2)
    model = outer(block)
    converted, plan = everything(model)
    for each in (model, converted):
        each.block.repeats = 3
    with contextlib.suppress(nmconv.RewriteError), dropped(model, plan.changes):
        assert_same(converted(picture()), model(picture()))


# --- the same call in both modes ----------------------------------------------------------------------------------


def both_modes(how):
    """Forwards in which what comes before a call differs between the modes; the call itself is one and the same."""

    def clamped_in_eval(self, x):
        if not self.training:
            x = x.clamp(-1, 1)
        x = self.act(x)
        return F.relu(self.b(F.relu(self.a(x) + x)))

    def relu_in_train(self, x):
        if self.training:
            x = F.relu(x, True)
        y = F.relu(self.a(x), inplace=True)
        y = self.act(self.b(y) + x)
        F.relu_(x.chunk(2, 1)[1])
        return F.relu(self.c(y)) + self.act2(self.d(x))

    def written_in_train(self, x):
        y = self.act(self.a(x))
        if self.training:
            y.mul_(0.5)
        z = self.act2(self.b(y) + y)
        return F.relu(self.c(F.relu(self.d(z))))

    def same_conv(self, x):
        if self.training:
            x = F.relu(self.a(x))
        x = F.relu(self.a(x), inplace=True)
        return F.relu(self.b(x))

    def two_of_three(self, x):
        for at in range(3 if self.training else 2):
            x = F.relu(self.a(x) + at)
        return F.relu(self.b(x))

    def other_branch(self, x):
        if self.training:
            x = self.act(self.a(x))
            x = self.act(self.b(x)) * 2
        else:
            x = self.act(self.a(x) + 1)
        return self.act(self.c(x))

    def another_order(self, x):
        one, other = F.relu(self.a(x)), None
        if self.training:
            other = F.silu(self.b(x))
            one = F.silu(self.c(one))
        else:
            one = F.silu(self.c(one))
            other = F.silu(self.b(x))
        return one + other

    def behind_a_child(self, x):
        x = self.child(x)
        return F.relu(self.b(F.silu(x, inplace=True)))

    def aux(self, x):
        x = self.act(self.a(x))
        extra = self.act(self.d(self.act(self.c(x)))) if self.training else None
        return self.act(self.b(x)), extra

    forward = locals()[how]
    child = net(lambda self, x: F.elu(self.a(x)) if self.training else self.a(x), a=conv())
    return net(forward, **convs("a", "b", "c", "d"), act=nn.SiLU(inplace=True), act2=nn.SiLU(), child=child)


MODES = ["clamped_in_eval", "relu_in_train", "written_in_train", "same_conv", "two_of_three", "other_branch"]
MODES += ["another_order", "aux", "behind_a_child"]


@pytest.mark.parametrize("how", MODES)
def test_the_plan_names_every_call_once_in_each_mode(how):
    model = both_modes(how)
    plan = planned(model)
    calls = calls_of(model, plan, picture())
    for training in (False, True):
        with record(model.train(training)) as entries:
            model(picture())
        real = [(entry.owner, entry.name or entry.owner, entry.call, entry.inplace) for entry in entries]
        found = [
            (
                site.owner,
                site.name,
                site.train_call if training and site.modes == "both" else site.call,
                calls[site.id].inplace,
            )
            for site in plan.sites
            if site.modes in ("both", "train" if training else "eval") and "never calls it" not in site.reason
        ]
        assert sorted(found) == sorted(real), f"training={training}"


@pytest.mark.parametrize("how", MODES)
def test_every_choice_of_calls_is_done_right_in_both_modes(how):
    model = both_modes(how)
    plan = planned(model)
    sites = droppable(plan)
    for gone in itertools.islice(itertools.product((False, True), repeat=len(sites)), 1, 64):
        edits = {site.id: "drop" if drop else "keep" for site, drop in zip(sites, gone, strict=True)}
        try:
            apply(model, plan.edit(edits))
        except nmconv.RewriteError as error:
            assert "one decision would change several" in str(error) or "cannot be rewritten: " in str(error)
            continue
        faithful(model, plan.edit(edits), picture())


def test_a_module_call_that_is_the_same_in_both_modes_is_one_site():
    for how in ("clamped_in_eval", "relu_in_train", "written_in_train"):
        plan = planned(both_modes(how))
        assert [site.modes for site in plan.sites if site.name == "act"] == ["both"], how


# --- the shape of the memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["expand", "expand_as", "slice", "chunk", "step", "broadcast_to", "narrow"])
@pytest.mark.parametrize("then", ["view", "write", "read", "flatten"])
def test_an_activation_made_dense_what_was_a_part_or_an_expansion(how, then):
    """A call that allocates returns dense memory; without it a view of a part cannot be viewed or written alike."""

    def forward(self, x):
        y = self.a(x)
        if how == "expand":
            y = y.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)
        elif how == "expand_as":
            y = y.mean((2, 3), keepdim=True).expand_as(x)
        elif how == "broadcast_to":
            y = torch.broadcast_to(y.mean((2, 3), keepdim=True), x.shape)
        elif how == "slice":
            y = y[:, :, 1:, 1:]
        elif how == "chunk":
            y = torch.chunk(y, 2, 3)[0]
        elif how == "narrow":
            y = y.narrow(2, 0, 4)
        else:
            y = y[:, :, ::2, ::2]
        z = F.relu(y)
        if then == "view":
            z = z.view(z.shape[0], 4, -1, z.shape[2])
        elif then == "write":
            z += 1
        elif then == "flatten":
            return F.relu(self.b(z)), z.view(-1)
        return F.relu(self.b(z))

    model = net(forward, **convs("a", "b"))
    plan = planned(model)
    edited = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    faithful(model, edited, picture())


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


FIRST = """
import torch, torch.nn.functional as F
from math import sqrt
from torch import nn

def by_size(x):
    return x / sqrt(x.shape[-1])

def by_class(x):
    return x if isinstance(x, torch.Tensor) else x * 0 + 1

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))))
"""
SECOND = """
import torch.nn.functional as F
import ONE
from torch import nn

class Block(ONE.Block):
    def forward(self, x):
        return F.relu(self.b(ONE.HELPER(F.relu(self.a(x)))))
"""


@pytest.mark.parametrize("helper", ["by_size", "by_class"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_helper_of_another_package_is_understood_whatever_else_is_rewritten(helper, turned, monkeypatch):
    names = [f"{which}_{helper}_{turned}" for which in ("one", "other")]
    for name, source in zip(names, (FIRST, SECOND), strict=True):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(source.replace("HELPER", helper).replace("ONE", names[0]), module.__dict__)
    blocks = [sys.modules[name].Block() for name in names]
    model = nn.Sequential(conv(), *(reversed(blocks) if turned else blocks))
    x = picture(2, 4, 16, 16)
    plan = planned(model, x)
    assert not [site.locked for site in plan.sites if site.locked]
    faithful(model, plan, x)
    one = "2:" if turned else "1:"  # the package's own is left alone
    faithful(model, plan.edit({site.id: "keep" for site in plan.sites if site.id.startswith(one)}), x)


def test_an_attribute_that_tensors_are_keys_of():
    model = net(lambda self, x: F.relu(self.b(F.relu(self.a(x)))), **convs("a", "b"))
    model.optimizer = torch.optim.SGD([model.a.weight], lr=0.1, momentum=0.9)
    model.a(picture()).sum().backward()
    model.optimizer.step()
    (held,) = model.optimizer.state.items()
    plan = planned(model)
    assert len(droppable(plan)) == 2
    converted = faithful(model, plan, picture())
    assert type(converted.a) is nn.Conv2d and nmconv.find_runs(converted)
    (kept,) = model.optimizer.state.items()
    assert kept[0] is held[0] and kept[1] is held[1]


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="packs no weights here")
def test_an_attribute_of_torchscripts_that_is_no_tensor():
    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)

    model = net(forward, **convs("a", "b"))
    model.packed = torch.ops.quantized.linear_prepack_fp16(torch.randn(5, 6), torch.randn(5))
    plan = planned(model)
    assert len(droppable(plan)) == 2 and not [site.locked for site in plan.sites if site.locked]
    faithful(model, plan, picture())
