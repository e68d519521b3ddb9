"""Rewritten blocks: every kind of argument and of result."""

import collections
import dataclasses
import inspect
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from rewrite_nets import apply, conv, convs, droppable, every_subset, everything, faithful, net, outer, picture, planned
from torch import Tensor, nn

import nmconv

torch.set_num_threads(1)


Pair = namedtuple("Pair", "one other")


@dataclasses.dataclass
class Outputs:
    value: Tensor
    extra: Tensor | None = None


# --- arguments -----------------------------------------------------------------------------------------------------


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


# --- what it returns -----------------------------------------------------------------------------------------------


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
