"""Rewritten blocks: calls in helper methods, inherited forwards, and forwards set on the object."""

import types
from typing import Generic

import pytest
import torch
import torch.nn.functional as F
from calls import calls_of
from oracle import assert_same
from rewrite_nets import T, conv, convs, droppable, every_subset, everything, faithful, net, outer, picture, planned
from torch import Tensor, nn

import nmconv

torch.set_num_threads(1)


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
