"""Rewritten blocks: attributes, children and globals that change after conversion."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, dropped
from rewrite_nets import LIBRARY, conv, convs, droppable, everything, faithful, net, outer, picture, planned
from torch import nn

import nmconv

torch.set_num_threads(1)


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


# --- attributes that change after conversion -----------------------------------------------------------------------


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


def scaled_by_second(x, module):
    return x * module.scale


def scaled_by_first(module, x):
    return x * module.scale


# --- the same, hidden one step further away ------------------------------------------------------------------------


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


# --- the shape of the memory ---------------------------------------------------------------------------------------


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
