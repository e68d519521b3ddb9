"""Activations between changes of layout, in place, and shared (docs/words.md)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import conv, convs, expect, net, norms, relus
from torch import nn

import nmconv

LAYOUTS = {
    "view": lambda x: x.view(x.shape[0], 4, -1, 4, x.shape[3]).view(x.shape),
    "reshape": lambda x: x.reshape(x.shape[0], 2, 2, x.shape[2], x.shape[3]).reshape(x.shape),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "torch.permute": lambda x: torch.permute(x, (0, 1, 3, 2)),
    "transpose": lambda x: x.transpose(2, 3),
    "flatten": lambda x: torch.flatten(x, 2).unflatten(2, x.shape[2:]),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
}


# --- Hard cases: layout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_passes_between_a_conv_and_its_activation_and_ends_the_chain(layout):
    def forward(self, x):
        x = self.a1(self.n1(LAYOUTS[layout](self.c1(x))))
        return self.a3(self.c3(self.a2(self.c2(x))))

    model = net(forward, **convs("c1 c2 c3"), **norms("n1"), **relus("a1 a2 a3"))
    expect(model, "a1 keep c1 A0 post \n a2 drop c2 B0 \n a3 keep c3 B0", convs=3)


def test_flatten_before_the_activation():
    def forward(self, x):
        return self.fc(self.a2(self.c2(self.a1(self.c1(x))).flatten(1)))

    model = net(forward, **convs("c1 c2"), **relus("a1 a2"), fc=nn.Linear(64, 2))
    expect(model, "a1 drop c1 A0 \n a2 keep c2 A0", example_inputs=torch.zeros(1, 4, 4, 4))


def test_layout_passes_between_a_pre_activation_and_its_conv():
    """The conv's activation is the one before it here."""

    def forward(self, x):
        x = F.max_pool2d(x, 2)
        x = self.c1(self.a1(x).transpose(2, 3))
        return F.max_pool2d(x, 2)

    expect(net(forward, **convs("c1"), **relus("a1")), "a1 keep c1 A0 pre", convs=1)


# --- Hard cases: in-place, and what is shared ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["module", "F", "method"])
def test_a_later_reader_of_the_old_name_sees_the_activated_value(form):
    def forward(self, x):
        y = self.c1(x)
        if form == "module":
            self.a1(y)
        elif form == "F":
            F.relu(y, inplace=True)
        else:
            y.relu_()
        return self.a2(self.c2(y))

    name = "a1" if form == "module" else ":relu"
    model = net(forward, **convs("c1 c2"), **(relus("a1", True) if form == "module" else {}), **relus("a2"))
    expect(model, f"{name} drop c1 A0 \n a2 keep c2 A0", convs=2)


def test_a_reader_after_the_in_place_activation_is_a_fork_after_it():
    def forward(self, x):
        y = self.c1(x)
        z = self.a1(y)
        return self.a2(self.c2(z)) + y

    expect(net(forward, **convs("c1 c2"), **relus("a1", True), **relus("a2")), "a1 keep c1 A0 post \n a2 keep c2 B0")


def test_a_reader_before_the_in_place_activation_is_a_fork_before_it():
    def forward(self, x):
        y = self.c1(x)
        early = y * 2
        z = self.a1(y)
        return F.max_pool2d(self.c2(z), 2), early

    expect(net(forward, **convs("c1 c2"), **relus("a1", True)), "a1 keep c2 A0 pre", convs=2)


def test_a_view_taken_before_the_in_place_activation_shows_the_activated_value():
    def forward(self, x):
        y = self.c1(x)
        flat = y.view(y.shape[0], -1)
        self.a1(y)
        return self.a2(self.c2(flat.view(y.shape)))

    # nobody reads the un-activated value; a layout ends the chain
    expect(net(forward, **convs("c1 c2"), **relus("a1", True), **relus("a2")), "a1 keep c1 A0 post \n a2 keep c2 B0")


def test_an_in_place_residual_add_read_through_its_old_name():
    def forward(self, x):
        y = self.c2(self.a1(self.c1(x)))
        y += x
        self.a2(y)
        return self.a3(self.c3(y))

    model = net(forward, **convs("c1 c2 c3"), **relus("a1 a3"), **relus("a2", True))
    expect(model, "a1 drop c1 A0 \n a2 keep c2 A0 residual \n a3 keep c3 B0")


def test_a_shared_activation_module():
    def forward(self, x):
        for layer in self.layers:
            x = self.relu(layer(x))
        return x

    model = net(forward, layers=nn.ModuleList(conv() for _ in range(3)), relu=nn.ReLU(True))
    expect(model, "relu#1 drop layers.0 A0 \n relu#2 keep layers.1 A0 \n relu#3 keep layers.2 A1", convs=3)


def test_an_activation_module_of_two_owners():
    relu = nn.ReLU()
    blocks = [net(lambda self, x: self.act(self.c(x)), c=conv(), act=relu) for _ in range(2)]
    expect(nn.Sequential(*blocks), "0.act drop 0.c A0 \n 1.act keep 1.c A0", convs=2)


def test_an_activation_module_that_lives_elsewhere():
    block = net(lambda self, x, act: act(self.c(x)), c=conv())

    def forward(self, x):
        return self.relu(self.c2(self.block(x, self.relu)))

    plan = nmconv.make_plan(net(forward, c2=conv(), block=block, relu=nn.ReLU()), keep="boundary")
    assert [(site.name, site.owner, site.call, site.convs, site.chain) for site in plan.sites] == [
        ("relu", "block", 1, ("block.c",), 0),
        ("relu", "", 1, ("c2",), 0),
    ]
    assert len({site.id for site in plan.sites}) == 2
    # the block is called with a module, which it cannot be rewritten for; if it stays, the plan says so
    assert plan.sites[0].action == "drop" or plan.sites[0].locked in plan.sites[0].reason


def test_a_shared_conv_is_a_conv_of_the_chain_each_time():
    def forward(self, x):
        return self.relu(self.c(self.relu(self.c(x))))

    expect(net(forward, c=conv(), relu=nn.ReLU()), "relu#1 drop c A0 \n relu#2 keep c A0")


def _head():
    return net(lambda self, x: self.a2(self.c2(self.a1(self.c1(x)))), **convs("c1 c2"), **relus("a1 a2"))


def test_a_block_called_on_several_levels_is_planned_once():
    def forward(self, x):
        return [self.head(x), self.head(F.max_pool2d(x, 2)), self.head(F.max_pool2d(x, 4))]

    expect(net(forward, head=_head()), "head.a1 drop head.c1 A0 \n head.a2 keep head.c2 A0", convs=2)


@pytest.mark.parametrize("keep", ["boundary", "first"])
@pytest.mark.parametrize("times", [2, 3, 4])
def test_a_block_called_in_a_row_is_one_decision_for_all_calls(times, keep):
    """One conv, one activation, called in a row: no unit of the row may lose all of its activations."""

    def forward(self, x):
        for _ in range(times):
            x = self.block(x)
        return x

    model = net(forward, block=net(lambda self, x: self.a(self.c(x)), c=conv(), a=nn.ReLU()))
    plan = nmconv.make_plan(model, "2:1", keep=keep)
    assert [(site.id, site.action) for site in plan.sites] == [("block.a#1", "keep")]


def test_a_block_of_two_convs_called_twice_in_a_row():
    model = net(lambda self, x: self.head(self.head(x)), head=_head())
    plan = nmconv.make_plan(model, "2:1", keep="boundary")
    assert [(site.id, site.action) for site in plan.sites] == [("head.a1#1", "drop"), ("head.a2#1", "keep")]
    # [c1 c2 c1] [c2]: what one call would drop another must keep
    for keep in ("boundary", "first", "spread"):
        plan = nmconv.make_plan(model, "3:1", keep=keep)
        assert [site.action for site in plan.sites] == ["keep", "keep"], keep


def test_a_block_called_in_surroundings_that_differ_keeps():
    def forward(self, x):
        one = self.a2(self.c2(self.block(x)))  # [block.c c2]: block.a would go
        two = F.max_pool2d(self.block(F.max_pool2d(x, 2)), 2)  # [block.c]: it stays
        return one, two

    block = net(lambda self, x: self.a(self.c(x)), c=conv(), a=nn.ReLU())
    plan = nmconv.make_plan(net(forward, **convs("c2"), **relus("a2"), block=block), keep="boundary")
    assert {site.id: site.action for site in plan.sites} == {"block.a#1": "keep", "a2#1": "keep"}
