"""The issue's "Words", sentence by sentence: a tiny net for each, and the plan that follows from the words by hand.

How a plan is written down is said in nets.py.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from calls import calls_of
from nets import conv, convs, expect, net, norms, relus, rows, skipped
from torch import nn
from zoo import models as zoo

import nmconv
from nmconv.finding import structure_of
from nmconv.flow import record_model
from nmconv.planning import changes_of

SIGMOIDS = {
    "module": nn.Sigmoid(),
    "torch": torch.sigmoid,
    "method": lambda x: x.sigmoid(),
    "F": F.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "Hardsigmoid": nn.Hardsigmoid(),
    "timm HardSigmoid": timm.layers.HardSigmoid(),
    "timm Sigmoid": timm.layers.Sigmoid(),
    "tanh": torch.tanh,
    "softmax": partial(torch.softmax, dim=1),
    "clamp": partial(torch.clamp, min=0, max=1),
    "hand-made": lambda x: F.relu6(x + 3) / 6,
}

# --- Site: conv -> (norm) -> act --------------------------------------------------------------------------------------


def test_conv_norm_act():
    def forward(self, x):
        return self.a2(self.n2(self.c2(self.a1(self.n1(self.c1(x))))))

    model = net(forward, **convs("c1 c2"), **norms("n1 n2"), **relus("a1 a2"))
    plan = expect(model, "a1 drop c1 A0 post \n a2 keep c2 A0 post", convs=2)
    assert [(site.kind, site.function, site.owner, site.modes) for site in plan.sites] == [
        ("ReLU", None, "", "both")
    ] * 2


def test_conv_act_without_a_norm():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Sequential(conv(), nn.ReLU()))
    expect(model, "1 drop 0 A0 post \n 2.1 keep 2.0 A0 post", convs=2)


def test_the_activation_inside_a_norm_act_is_the_site():
    def make():
        return timm.layers.ConvNormAct(4, 4, 3)

    text = "0.bn.act drop 0.conv A0 post \n 1.bn.act keep 1.conv A0 post"
    plan = expect(nn.Sequential(make(), make()), text, convs=2)
    assert plan.sites[0].owner == "0.bn"
    plain = nn.Sequential(conv(), timm.layers.BatchNormAct2d(4, apply_act=False), conv(), nn.ReLU())
    expect(plain, "3 keep 2 A0", convs=2)  # the first conv has none, its chain ends


def test_torchvisions_conv_norm_activation():
    parts = [torchvision.ops.Conv2dNormActivation(4, 4, 3) for _ in range(2)]
    expect(nn.Sequential(*parts), "0.2 drop 0.0 A0 post \n 1.2 keep 1.0 A0 post", convs=2)


def test_an_activations_forward_called_by_hand_is_a_functional_call_of_the_caller():
    def forward(self, x):
        return self.a2(self.c2(self.a1.forward(self.c1(x))))

    plan = nmconv.make_plan(net(forward, **convs("c1 c2"), **relus("a1 a2")), keep="boundary")
    assert [row for row in rows(plan) if row[1] != "skip"] == [
        (":relu#1", "drop", "c1", "A0", "post"),
        ("a2#1", "keep", "c2", "A0", "post"),
    ]


MODULES = [
    *(nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.LeakyReLU(0.1), nn.PReLU(), nn.PReLU(4), nn.ELU(), nn.SELU(), nn.CELU()),
    *(nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(), nn.Mish(), nn.Softplus()),
    *(timm.layers.Swish(), timm.layers.Mish(), timm.layers.PReLU(), timm.layers.GELU(), timm.layers.GELUTanh()),
    *(timm.layers.HardSwish(), timm.layers.HardMish(), timm.layers.QuickGELU()),
    *(timm.layers.create_act_layer("swish"), timm.layers.create_act_layer("hard_swish")),
]


@pytest.mark.parametrize("act", MODULES, ids=lambda act: type(act).__name__)
def test_every_activation_module_is_a_site(act):
    def forward(self, x):
        return self.a2(self.c2(self.act(self.c1(x))))

    expect(net(forward, **convs("c1 c2"), act=act, a2=nn.ReLU()), "act drop c1 A0 post \n a2 keep c2 A0 post")


def test_a_subclass_of_an_activation_is_a_site():
    model = nn.Sequential(conv(), type("Mine", (nn.ReLU,), {})(), conv(), nn.ReLU())
    expect(model, "1 drop 0 A0 \n 3 keep 2 A0")


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.Tanh(), nn.Identity()], ids=lambda act: type(act).__name__)
def test_what_is_not_on_the_list_is_no_site_and_its_conv_has_none(act):
    """conv, sigmoid, conv, act: the first conv has no activation of its own, so its chain ends."""
    expect(nn.Sequential(conv(), act, conv(), nn.ReLU(), conv(), nn.ReLU()), "3 drop 2 A0 \n 5 keep 4 A0", convs=3)


def test_a_swish_by_hand_is_a_site_and_no_gate():
    def forward(self, x):
        x = self.c1(x)
        x = x * torch.sigmoid(x)
        return self.a3(self.c3(self.a2(self.c2(x))))

    text = ":silu drop c1 A0 \n a2 keep c2 A0 \n a3 keep c3 A1"
    expect(net(forward, **convs("c1 c2 c3"), **relus("a2 a3")), text, convs=3)


@pytest.mark.parametrize("form", ["x * relu6(x + 3) / 6", "x * (relu6(x + 3) / 6)"])
def test_a_hard_swish_by_hand_is_a_site_and_no_gate(form):
    def forward(self, x):
        x = self.c1(x)
        x = eval(form, {"x": x, "relu6": F.relu6})
        return self.a3(self.c3(self.a2(self.c2(x))))

    text = ":relu6 skip - - \n :hardswish drop c1 A0 \n a2 keep c2 A0 \n a3 keep c3 A1"
    plan = expect(net(forward, **convs("c1 c2 c3"), **relus("a2 a3")), text)
    assert "inside" in skipped(plan, ":relu6#1")


FUNCTIONS = {
    "F.relu": (F.relu, "relu", "ReLU", False),
    "F.relu in-place": (partial(F.relu, inplace=True), "relu", "ReLU", True),
    "F.relu in-place, positional": (lambda x: F.relu(x, True), "relu", "ReLU", True),
    "F.relu_": (F.relu_, "relu", "ReLU", True),
    "torch.relu": (torch.relu, "relu", "ReLU", False),
    "torch.relu_": (torch.relu_, "relu", "ReLU", True),
    "x.relu": (lambda x: x.relu(), "relu", "ReLU", False),
    "x.relu_": (lambda x: x.relu_(), "relu", "ReLU", True),
    "F.relu6": (F.relu6, "relu6", "ReLU6", False),
    "F.leaky_relu": (lambda x: F.leaky_relu(x, 0.1), "leaky_relu", "LeakyReLU", False),
    "F.leaky_relu in-place, positional": (lambda x: F.leaky_relu(x, 0.1, True), "leaky_relu", "LeakyReLU", True),
    "F.leaky_relu_": (F.leaky_relu_, "leaky_relu", "LeakyReLU", True),
    "F.elu": (F.elu, "elu", "ELU", False),
    "F.elu in-place, positional": (lambda x: F.elu(x, 1.0, True), "elu", "ELU", True),
    "F.elu_": (F.elu_, "elu", "ELU", True),
    "F.selu": (F.selu, "selu", "SELU", False),
    "torch.selu": (torch.selu, "selu", "SELU", False),
    "torch.selu_": (torch.selu_, "selu", "SELU", True),
    "F.celu": (F.celu, "celu", "CELU", False),
    "torch.celu": (torch.celu, "celu", "CELU", False),
    "F.gelu": (F.gelu, "gelu", "GELU", False),
    "F.gelu tanh": (partial(F.gelu, approximate="tanh"), "gelu", "GELU", False),
    "F.silu": (F.silu, "silu", "SiLU", False),
    "F.silu in-place": (partial(F.silu, inplace=True), "silu", "SiLU", True),
    "F.hardswish": (F.hardswish, "hardswish", "Hardswish", False),
    "F.mish": (F.mish, "mish", "Mish", False),
    "F.softplus": (F.softplus, "softplus", "Softplus", False),
}


@pytest.mark.parametrize("form", FUNCTIONS)
def test_every_functional_form_is_a_site(form):
    function, name, kind, inplace = FUNCTIONS[form]

    def forward(self, x):
        return function(self.c2(function(self.c1(x))))

    model = net(forward, **convs("c1 c2"))
    plan = expect(model, f":{name}#1 drop c1 A0 post \n :{name}#2 keep c2 A0 post")
    calls = calls_of(model, plan)
    for site in plan.sites:
        assert (site.function, site.kind, calls[site.id].inplace, site.name) == (name, kind, inplace, "")


@pytest.mark.parametrize("prelu", [F.prelu, torch.prelu, lambda x, slope: x.prelu(slope)], ids=["F", "torch", "method"])
def test_prelu_on_a_parameter_is_a_site(prelu):
    def forward(self, x):
        return prelu(self.c2(prelu(self.c1(x), self.slope)), self.slope)

    model = net(forward, **convs("c1 c2"), slope=nn.Parameter(torch.ones(4)))
    expect(model, ":prelu#1 drop c1 A0 post \n :prelu#2 keep c2 A0 post")


def test_kinds_of_function_are_numbered_apart_and_by_owner():
    block = net(lambda self, x: F.silu(F.relu(self.c(x)) + 1), c=conv())

    def forward(self, x):
        return F.relu(self.c2(self.block(F.relu(self.c1(x)))))

    # silu stands after an activation and a shift, before c2: c1, block.c and c2 are one chain, silu nobody's
    text = ":relu#1 drop c1 A0 \n block:relu keep block.c A0 \n block:silu keep - - leading \n :relu#2 keep c2 A1"
    expect(net(forward, **convs("c1 c2"), block=block), text)


# --- Site: conv -> (norm) -> residual add -> act ----------------------------------------------------------------------

ADDS = {
    "+": lambda x, y: x + y,
    "+=": lambda x, y: x.__iadd__(y),
    "torch.add": torch.add,
    "method": lambda x, y: x.add(y),
    "method in-place": lambda x, y: x.add_(y),
    "reversed": lambda x, y: y + x,
    "sum": lambda x, y: sum([x, y]),
    "-": lambda x, y: y - x,
}


@pytest.mark.parametrize("add", ADDS)
def test_the_activation_after_a_residual_add_belongs_to_the_branch(add):
    def forward(self, x):
        y = self.n2(self.c2(self.a1(self.n1(self.c1(x)))))
        return self.a2(ADDS[add](y, x))

    model = net(forward, **convs("c1 c2"), **norms("n1 n2"), **relus("a1 a2"))
    expect(model, "a1 drop c1 A0 post \n a2 keep c2 A0 residual", convs=2)


@pytest.mark.parametrize("first", ["shortcut", "main"])
def test_longest_branch_not_the_downsample_conv(first):
    def forward(self, x):
        short = self.down(x) if first == "shortcut" else None
        y = self.c2(self.a1(self.c1(x)))
        short = self.down(x) if short is None else short
        return self.a2(short + y)

    model = net(forward, **convs("c1 c2 down"), **relus("a1 a2"))
    expect(model, "a1 drop c1 A0 post \n a2 keep c2 A0 residual", convs=3)


@pytest.mark.parametrize("swap", [False, True])
def test_ties_go_to_the_branch_executed_first(swap):
    def forward(self, x):
        left = self.c2(self.a1(self.c1(x)))
        right = self.c4(self.a3(self.c3(x)))
        return self.a5(right + left if swap else left + right)

    model = net(forward, **convs("c1 c2 c3 c4"), **relus("a1 a3 a5"))
    expect(model, "a1 drop c1 A0 \n a3 keep c3 B0 \n a5 keep c2 A0 residual", convs=4)


def test_three_branches_the_longest_owns():
    def forward(self, x):
        one = self.c1(x)
        two = self.c3(self.a2(self.c2(x)))
        return self.a9(one + two + x)

    expect(net(forward, **convs("c1 c2 c3"), **relus("a2 a9")), "a2 drop c2 A0 \n a9 keep c3 A0 residual", convs=3)


def test_a_residual_inside_a_branch_counts_by_its_longest_way():
    def forward(self, x):
        left = self.a1(self.c1(x))
        left = self.c3(self.a2(self.c2(left) + left))  # c1 c2 c3
        right = self.c5(self.a4(self.c4(x)))  # c4 c5
        return self.a9(right + left)

    # a1 forks: [c1]; a2 belongs to c2, and the join ends its chain: [c2] [c3]; [c4 c5]
    text = "a1 keep c1 A0 \n a2 keep c2 B0 residual \n a4 keep c4 C0 \n a9 keep c3 D0 residual"
    expect(net(forward, **convs("c1 c2 c3 c4 c5"), **relus("a1 a2 a4 a9")), text, convs=5)


def test_gates_do_not_count_towards_the_longest_branch():
    def forward(self, x):
        one = self.c1(x)
        gate = self.g3(self.ga2(self.g2(self.ga1(self.g1(one.mean((2, 3), keepdim=True)))))).sigmoid()
        two = self.c3(self.a2(self.c2(x)))
        return self.a9(one * gate + two)

    model = net(forward, **convs("c1 g1 g2 g3 c2 c3"), **relus("ga1 ga2 a2 a9"))
    text = "ga1 skip - - \n ga2 skip - - \n a2 drop c2 A0 \n a9 keep c3 A0 residual"
    expect(model, text, convs=3)


def test_a_gate_on_the_way_does_not_shorten_a_branch():
    """Longest counts convs from fork to join, gates notwithstanding."""

    def forward(self, x):
        short = self.c3(x)
        y = self.c1(x)
        y = self.a1(y * self.g(y.mean((2, 3), keepdim=True)).sigmoid())
        return self.a2(self.c2(y) + short)

    model = net(forward, **convs("c1 c2 c3 g"), **relus("a1 a2"))
    # the product ends c1's chain, the activation after it is still c1's
    expect(model, "a1 keep c1 A0 \n a2 keep c2 B0", convs=3)


def test_a_shortcut_with_more_convs_wins():
    def forward(self, x):
        short = self.d2(self.da(self.d1(x)))
        return self.a1(self.c1(x) + short)

    expect(net(forward, **convs("c1 d1 d2"), **relus("da a1")), "da drop d1 A0 \n a1 keep d2 A0 residual", convs=3)


def test_layer_scale_dropout_and_drop_path_in_the_branch():
    def forward(self, x):
        y = self.drop(self.n(self.c2(self.a1(self.c1(x)))) * self.gamma)
        return self.a2(x + F.dropout(y, 0.1, self.training))

    model = net(
        forward, **convs("c1 c2"), **norms("n"), **relus("a1 a2"), gamma=nn.Parameter(torch.ones(4, 1, 1)),
        drop=timm.layers.DropPath(0.1),
    )  # fmt: skip
    expect(model, "a1 drop c1 A0 \n a2 keep c2 A0 residual")


def test_each_conv_owns_at_most_one_so_the_one_after_the_add_is_pre_activation():
    """c2 has its own activation already: the one after the add stands before c3, which has one: it always stays."""

    def forward(self, x):
        y = self.a2(self.c2(self.a1(self.c1(x)))) + x
        return self.a4(self.c3(self.a3(y)))

    model = net(forward, **convs("c1 c2 c3"), **relus("a1 a2 a3 a4"))
    expect(model, "a1 drop c1 A0 \n a2 keep c2 A0 \n a3 keep - - leading \n a4 keep c3 B0")


def test_after_an_add_with_a_norm_it_is_pre_activation():
    def forward(self, x):
        y = self.c2(self.a1(self.c1(x))) + x
        return self.pool(self.c4(self.a4(self.c3(self.a3(self.n(y))))))

    model = net(forward, **convs("c1 c2 c3 c4"), **relus("a1 a3 a4"), **norms("n"), pool=nn.AdaptiveAvgPool2d(1))
    expect(model, "a1 keep c1 A0 post \n a3 keep c3 B0 pre \n a4 drop c4 B0 pre", convs=4)


# --- Site: several conv branches summed -> act (RepVGG) ---------------------------------------------------------------


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("sums", ["+", "sum"])
def test_repvgg_branches_count_as_one_conv_and_the_chain_goes_on(identity, sums):
    def block():
        def forward(self, x):
            parts = [self.n3(self.c3(x)), self.n1(self.c1(x))] + ([self.n0(x)] if identity else [])
            return self.act(sum(parts) if sums == "sum" else parts[0] + parts[1] + (parts[2] if identity else 0))

        return net(forward, c3=conv(), c1=conv(kernel=1), **norms("n0 n1 n3"), act=nn.ReLU())

    model = nn.Sequential(*(block() for _ in range(3)))
    text = """
        0.act drop 0.c3+0.c1 A0 parallel
        1.act keep 1.c3+1.c1 A0 parallel
        2.act keep 2.c3+2.c1 A1 parallel
    """
    expect(model, text, convs=3)


def test_conv_plus_identity_alone_is_a_residual_join():
    def forward(self, x):
        x = self.a1(self.c1(x) + x)
        return self.a2(self.c2(x) + x)

    expect(
        net(forward, **convs("c1 c2"), **relus("a1 a2")), "a1 keep c1 A0 residual \n a2 keep c2 B0 residual", convs=2
    )


def test_convs_of_different_values_are_not_parallel():
    def forward(self, x):
        y = F.max_pool2d(x, 3, 1, 1)
        x = self.a1(self.c1(x) + self.c2(y))
        return self.a3(self.c3(x))

    # a join of two branches of one conv: the first owns, and the chain ends there
    model = net(forward, **convs("c1 c2 c3"), **relus("a1 a3"))
    expect(model, "a1 keep c1 A0 residual \n a3 keep c3 B0", convs=3)


def test_branches_of_two_convs_are_not_parallel():
    def forward(self, x):
        x = self.a(self.c2(self.c1(x)) + self.c3(x))
        return self.a4(self.c4(x))

    # c1 has no activation of its own, so its chain is itself; c2 is on the longest branch
    expect(net(forward, **convs("c1 c2 c3 c4"), **relus("a a4")), "a keep c2 A0 residual \n a4 keep c4 B0", convs=4)


def test_parallel_activated_convs_are_a_join():
    def forward(self, x):
        x = self.a1(self.c1(x)) + self.a2(self.c2(x))
        return self.a3(self.c3(x))

    text = "a1 keep c1 A0 \n a2 keep c2 B0 \n a3 keep c3 C0"
    expect(net(forward, **convs("c1 c2 c3"), **relus("a1 a2 a3")), text, convs=3)


# --- Site: pre-activation, (norm) -> act -> conv ----------------------------------------------------------------------

SOURCES = {
    "input": lambda x: x,
    "pool": lambda x: F.max_pool2d(x, 2),
    "cat": lambda x: torch.cat([x, x], 1),
    "resize": lambda x: F.interpolate(x, scale_factor=2.0),
}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_pre_activation(source, normed):
    """A pre-activation chain's boundary is its front."""

    def forward(self, x):
        x = SOURCES[source](x)
        x = self.c1(self.a1(self.n1(x) if normed else x))
        return F.avg_pool2d(self.c2(self.a2(self.n2(x) if normed else x)), 2)

    width = 8 if source == "cat" else 4
    model = net(
        forward, c1=conv(width, 4), c2=conv(4, 4), n1=nn.BatchNorm2d(width), n2=nn.BatchNorm2d(4), **relus("a1 a2")
    )
    expect(model, "a1 keep c1 A0 pre \n a2 drop c2 A0 pre", convs=2, example_inputs=torch.zeros(1, 4, 16, 16))


def test_a_leading_activation_always_stays_where_the_last_conv_has_one():
    def forward(self, x):
        x = F.max_pool2d(x, 2)
        return self.a3(self.c2(self.a2(self.c1(self.a1(x)))))

    model = net(forward, **convs("c1 c2"), **relus("a1 a2 a3"))
    text = "a1 keep - - leading \n a2 drop c1 A0 post \n a3 keep c2 A0 post"
    for keep in ("boundary", "first", "spread"):
        plan = nmconv.make_plan(model, "2:1", keep=keep)
        assert plan.sites[0].action == "keep"
    expect(model, text, convs=2)


def test_a_leading_activation_stays_where_the_residual_activation_is_the_last_convs():
    def forward(self, x):
        x = F.max_pool2d(x, 2)
        y = self.c2(self.a2(self.c1(self.a1(x))))
        return self.a3(y + x)

    model = net(forward, **convs("c1 c2"), **relus("a1 a2 a3"))
    expect(model, "a1 keep - - leading \n a2 drop c1 A0 post \n a3 keep c2 A0 residual")


def test_pre_activation_resnet():
    """The un-activated values are read by the shortcut: forks, so each activation belongs to the conv after it."""

    def forward(self, x):
        x = self.c0(x)
        x = self.c2(self.a2(self.c1(self.a1(x)))) + x
        x = self.c4(self.a4(self.c3(self.a3(x)))) + x
        return self.a5(self.n(x)).mean((2, 3))

    model = net(forward, **convs("c0 c1 c2 c3 c4"), **relus("a1 a2 a3 a4 a5"), **norms("n"))
    text = "a1 keep c1 A0 pre \n a2 drop c2 A0 pre \n a3 keep c3 B0 pre \n a4 drop c4 B0 pre \n a5 skip - -"
    expect(model, text, convs=5)


@pytest.mark.parametrize("order", ["main", "shortcut"])
def test_a_pre_activation_that_feeds_several_convs_belongs_to_the_longest_branch(order):
    def forward(self, x):
        h = self.a1(self.n1(F.max_pool2d(x, 2)))
        short = self.down(h) if order == "shortcut" else None
        y = self.c2(self.a2(self.c1(h)))
        short = self.down(h) if short is None else short
        return F.avg_pool2d(y + short, 2)

    model = net(forward, **convs("c1 c2 down"), **relus("a1 a2"), **norms("n1"))
    expect(model, "a1 keep c1 A0 pre \n a2 drop c2 A0 pre", convs=3)


def test_a_pre_activation_that_feeds_equal_branches_belongs_to_the_first():
    def forward(self, x):
        h = self.a1(F.max_pool2d(x, 2))
        left = self.c2(self.a2(self.c1(h)))
        right = self.c4(self.a4(self.c3(h)))
        return F.avg_pool2d(right + left, 2)

    model = net(forward, **convs("c1 c2 c3 c4"), **relus("a1 a2 a4"))
    # the right chain does not begin with an activation of its own: c3 owns the one after it
    expect(model, "a1 keep c1 A0 pre \n a2 drop c2 A0 pre \n a4 keep c3 B0 post", convs=4)


def test_the_longest_branch_below_a_pre_activation_goes_on_through_gates():
    def forward(self, x):
        h = self.a1(self.n1(F.max_pool2d(x, 2)))
        left = self.c3(self.a3(self.c2(h)))
        y = self.c4(h)
        y = self.c5(y * self.g(y.mean((2, 3), keepdim=True)).sigmoid())
        y = self.c6(y)
        return F.avg_pool2d(left + y, 2)

    # left: c2 c3; right: c4 (gate) c5 c6; c4 has no activation after it and owns the one before
    model = net(forward, **convs("c2 c3 c4 c5 c6 g"), **relus("a1 a3"), **norms("n1"))
    plan = nmconv.make_plan(model, keep="boundary")
    assert plan.sites[0].convs == ("c4",)
    assert rows(plan)[1][:3] == ("a3#1", "keep", "c2")
    assert plan.counts.convs == 5


def test_fork_of_the_un_activated_value_normfree_resnet():
    def forward(self, x):
        x = self.c0(x)
        out = self.a1(x) * 0.9
        short = self.down(out)
        x = self.c2(self.a2(self.c1(out))) * 0.2 + short
        out = self.a3(x) * 0.8
        x = self.c4(self.a4(self.c3(out))) * 0.2 + x
        return x.mean((2, 3))

    model = net(forward, **convs("c0 c1 c2 c3 c4 down"), **relus("a1 a2 a3 a4"))
    # c0's value has one reader, a1, which is c0's; it forks, so [c0], and c1 owns a2, [c1 c2]
    text = "a1 keep c0 A0 post \n a2 keep c1 B0 post \n a3 keep c3 C0 pre \n a4 drop c4 C0 pre"
    expect(model, text, convs=6)


def test_fork_of_the_un_activated_value_nasnet():
    """Two branches read the same un-activated conv; separable convs have no activation inside."""

    def forward(self, x):
        x = self.c0(x)
        left = self.p2(self.d2(self.a2(self.n1(self.p1(self.d1(self.a1(x)))))))
        right = self.p3(self.d3(self.a3(x)))
        return torch.cat([left, right], 1)

    model = net(forward, **convs("c0 d1 p1 d2 p2 d3 p3"), **relus("a1 a2 a3"), **norms("n1"))
    # [c0] [d1] [p1 d2] [p2] [d3] [p3]
    text = "a1 keep d1 A0 pre \n a2 keep p1 B0 post \n a3 keep d3 C0 pre"
    expect(model, text, convs=7)


def test_fork_of_the_normed_value():
    def forward(self, x):
        y = self.n0(self.c0(x))
        return self.c1(self.a1(y)) + y

    expect(net(forward, **convs("c0 c1"), **norms("n0"), **relus("a1")), "a1 keep c1 A0 pre", convs=2)


def test_fork_of_the_un_activated_value_with_no_conv_after_is_skipped():
    def forward(self, x):
        y = self.c2(self.a1(self.c1(x)))
        return self.a2(y), y

    plan = expect(net(forward, **convs("c1 c2"), **relus("a1 a2")), "a1 keep c1 A0 \n a2 skip - -")
    assert "reader" in skipped(plan, "a2#1")


def test_reading_the_shape_is_no_fork():
    def forward(self, x):
        y = self.c1(x)
        rows = y.shape[2]
        assert y.dim() == 4
        y = self.a1(y)
        return self.a2(self.c2(y)).reshape(-1, rows)

    expect(net(forward, **convs("c1 c2"), **relus("a1 a2")), "a1 drop c1 A0 \n a2 keep c2 A0")


def test_two_activations_in_a_row_the_second_always_stays():
    model = nn.Sequential(conv(), nn.ReLU(), nn.SiLU(), conv(), nn.ReLU())
    expect(model, "1 drop 0 A0 \n 2 keep - - leading \n 4 keep 3 A0")


def test_pre_activation_after_a_product_of_two_main_paths():
    def forward(self, x):
        return F.avg_pool2d(self.c3(self.a3(self.c1(x) * self.c2(x))), 2)

    expect(net(forward, **convs("c1 c2 c3"), **relus("a3")), "a3 keep c3 A0 pre", convs=3)


def test_pre_activated_repvgg_branches_with_a_shortcut():
    def forward(self, x):
        x = F.max_pool2d(x, 2)
        h = self.a1(self.n1(x))
        return F.max_pool2d(self.c3(h) + self.c1(h) + x, 2)

    expect(net(forward, **convs("c3 c1"), **norms("n1"), **relus("a1")), "a1 keep c3+c1 A0 pre", convs=1)


def test_repvgg_with_squeeze_excite_before_the_activation():
    def forward(self, x):
        x = self.a0(self.c0(x))
        y = self.c3(x) + self.c1(x) + x
        y = y * self.g(F.adaptive_avg_pool2d(y, 1)).sigmoid()
        return self.a2(self.c2(self.a1(y)))

    model = net(forward, **convs("c0 c3 c1 c2 g"), **relus("a0 a1 a2"))
    expect(model, "a0 drop c0 A0 \n a1 keep c3+c1 A0 \n a2 keep c2 B0", convs=3)


# --- Chain: what it goes on through and where it ends -----------------------------------------------------------------

BETWEEN = {
    "norm": nn.BatchNorm2d(4),
    "GroupNorm": nn.GroupNorm(2, 4),
    "LocalResponseNorm": nn.LocalResponseNorm(2),
    "timm LayerNorm2d": timm.layers.LayerNorm2d(4),
    "torchvision FrozenBatchNorm2d": torchvision.ops.FrozenBatchNorm2d(4),
    "F.group_norm": lambda self, x: F.group_norm(x, 2),
    "Dropout": nn.Dropout(0.1),
    "Dropout2d in-place": nn.Dropout2d(0.1, inplace=True),
    "F.dropout": lambda self, x: F.dropout(x, 0.1, self.training),
    "F.dropout2d": lambda self, x: F.dropout2d(x, training=self.training),
    "DropPath": timm.layers.DropPath(0.1),
    "drop_path": lambda self, x: timm.layers.drop_path(x, 0.1, self.training),
    "StochasticDepth": torchvision.ops.StochasticDepth(0.1, "row"),
    "stochastic_depth": lambda self, x: torchvision.ops.stochastic_depth(x, 0.1, "row", self.training),
    "DropBlock": timm.layers.DropBlock2d(0.1),
    "frozen norm by hand": lambda self, x: x * (self.flat * self.var.rsqrt()).view(1, -1, 1, 1) + self.bias,
    "batch norm by hand": lambda self, x: F.batch_norm(x, self.var, self.var, self.flat, self.flat, self.training),
    "Identity": nn.Identity(),
    "ZeroPad2d": nn.ZeroPad2d(1),
    "ReflectionPad2d": nn.ReflectionPad2d(1),
    "F.pad": lambda self, x: F.pad(x, (0, 1, 0, 1)),
    "contiguous": lambda self, x: x.contiguous(),
    "clone": lambda self, x: x.clone(),
    "float": lambda self, x: x.float(),
    "times a constant": lambda self, x: x * 0.5,
    "constant times": lambda self, x: 0.5 * x,
    "over a constant": lambda self, x: x / 2,
    "times a constant in-place": lambda self, x: x.mul_(1.7),
    "LayerScale": lambda self, x: x * self.gamma,
    "LayerScale in-place": lambda self, x: x.mul_(self.gamma),
    "LayerScale by view": lambda self, x: x * self.flat.view(1, -1, 1, 1),
    "gain": lambda self, x: x * self.gain,
    "nothing": nn.Sequential(),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("what", BETWEEN)
def test_a_chain_goes_on_through(what, where):
    """Before the activation it is passed on the way from the conv, after it on the way to the next conv."""
    between = BETWEEN[what]
    between = between if isinstance(between, nn.Module) else net(
        between, gamma=nn.Parameter(torch.ones(4, 1, 1)), flat=nn.Parameter(torch.ones(4)),
        gain=nn.Parameter(torch.zeros(())), var=torch.ones(4), bias=torch.zeros(4, 1, 1),
    )  # fmt: skip

    def forward(self, x):
        x = self.c1(x)
        x = self.a1(self.between(x)) if where == "before" else self.between(self.a1(x))
        return self.a2(self.c2(x))

    model = net(forward, **convs("c1 c2"), **relus("a1 a2"), between=between)
    expect(model, "a1 drop c1 A0 post \n a2 keep c2 A0 post", convs=2)


ENDS = {
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "MaxPool2d": nn.MaxPool2d(2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(7),
    "BlurPool": timm.layers.BlurPool2d(4),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "Upsample": nn.Upsample(scale_factor=2),
    "cat": lambda x: torch.cat([x], 1),
    "chunk": lambda x: x.chunk(2, 1)[0].repeat(1, 2, 1, 1),
    "channel shuffle": lambda x: x.reshape(x.shape[0], 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "flatten": lambda x: x.flatten(2).view(x.shape),
    "EvoNorm": timm.layers.EvoNorm2dS0(4, group_size=2),
    "FRN": timm.layers.FilterResponseNormTlu2d(4),
}


@pytest.mark.parametrize("what", ENDS)
def test_a_chain_ends_at(what):
    """... -> act -> (this) -> conv -> act: two chains, each with one activation."""
    end = ENDS[what]

    def forward(self, x):
        x = self.a1(self.c1(x))
        return self.a2(self.c2(self.end(x) if isinstance(end, nn.Module) else end(x)))

    model = net(forward, **convs("c1 c2"), **relus("a1 a2"), **({"end": end} if isinstance(end, nn.Module) else {}))
    expect(model, "a1 keep c1 A0 post \n a2 keep c2 B0 post", convs=2)


@pytest.mark.parametrize("what", ["max_pool", "interpolate", "cat"])
def test_what_stands_behind_the_end_of_a_chain_is_pre_activation(what):
    def forward(self, x):
        x = ENDS[what](self.c1(x))
        return ENDS["max_pool"](self.c3(self.a3(self.c2(self.a2(x)))))

    expect(net(forward, **convs("c1 c2 c3"), **relus("a2 a3")), "a2 keep c2 A0 pre \n a3 drop c3 A0 pre", convs=3)


def test_the_mnist_example_pools_before_it_activates():
    def forward(self, x):
        x = F.relu(F.max_pool2d(self.c1(x), 2))
        x = F.relu(F.max_pool2d(self.drop(self.c2(x)), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))

    # the first stands between a pool and c2, which has none after it: pre-activation; the others beside no conv
    model = net(forward, **convs("c1 c2"), drop=nn.Dropout2d(), fc1=nn.Linear(256, 8), fc2=nn.Linear(8, 2))
    plan = expect(model, ":relu#1 keep c2 A0 pre \n :relu#2 skip - - \n :relu#3 skip - -", convs=2)
    assert "linear" in skipped(plan, ":relu#3").lower()


def test_a_chain_ends_at_a_fork_after_the_activation():
    def forward(self, x):
        h = self.a1(self.c1(x))
        return self.a2(self.c2(h)), self.a3(self.c3(h))

    text = "a1 keep c1 A0 \n a2 keep c2 B0 \n a3 keep c3 C0"
    expect(net(forward, **convs("c1 c2 c3"), **relus("a1 a2 a3")), text, convs=3)


def test_an_activated_value_that_is_returned_too_is_a_fork():
    def forward(self, x):
        h = self.a1(self.c1(x))
        return self.a2(self.c2(h)), {"feature": h}

    expect(net(forward, **convs("c1 c2"), **relus("a1 a2")), "a1 keep c1 A0 \n a2 keep c2 B0", convs=2)


def test_a_chain_ends_after_a_conv_without_an_activation():
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.BatchNorm2d(4), conv(), nn.ReLU(), conv(), nn.ReLU())
    # [0 2] [4 6]
    expect(model, "1 keep 0 A0 \n 5 drop 4 B0 \n 7 keep 6 B0", convs=4)


def test_a_join_ends_a_chain_only_behind_its_activation():
    """conv, add, act, conv: the activation belongs to the branch, and the chain ends at the join."""

    def forward(self, x):
        x = self.a1(self.c1(x))
        x = self.a3(self.c3(self.a2(self.c2(x))) + x)
        return self.a5(self.c5(self.a4(self.c4(x))))

    model = net(forward, **convs("c1 c2 c3 c4 c5"), **relus("a1 a2 a3 a4 a5"))
    # [c1] forks, [c2 c3] ends at the join, [c4 c5]
    text = "a1 keep c1 A0 \n a2 drop c2 B0 \n a3 keep c3 B0 residual \n a4 drop c4 C0 \n a5 keep c5 C0"
    expect(model, text, convs=5)


def test_dense_concat():
    def layer(width):
        def forward(self, features):
            x = torch.cat(features, 1)
            return self.c2(self.a2(self.n2(self.c1(self.a1(self.n1(x))))))

        parts = {"n1": nn.BatchNorm2d(width), "n2": nn.BatchNorm2d(8), "c1": conv(width, 8, 1), "c2": conv(8, 4)}
        return net(forward, **parts, **relus("a1 a2"))

    def forward(self, x):
        features = [self.stem(x)]
        for block in self.layers:
            features.append(block(features))
        x = torch.cat(features, 1)
        return F.relu(self.n(x)).mean((2, 3))

    model = net(forward, stem=conv(), layers=nn.ModuleList([layer(4), layer(8)]), n=nn.BatchNorm2d(12))
    text = """
        layers.0.a1 keep layers.0.c1 A0 pre
        layers.0.a2 drop layers.0.c2 A0 pre
        layers.1.a1 keep layers.1.c1 B0 pre
        layers.1.a2 drop layers.1.c2 B0 pre
        :relu skip - -
    """
    expect(model, text, convs=5)


# --- Chain: what a conv is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(4, 4, 3), (1, 4, 32)),
        (lambda: nn.Conv3d(4, 4, 3), (1, 4, 16, 16, 16)),
        (lambda: nn.ConvTranspose1d(4, 4, 3), (1, 4, 32)),
        (lambda: nn.ConvTranspose2d(4, 4, 3), (1, 4, 16, 16)),
        (lambda: nn.ConvTranspose3d(4, 4, 3), (1, 4, 8, 8, 8)),
        (lambda: conv(groups=4), (1, 4, 16, 16)),
        (lambda: timm.layers.create_conv2d(4, 4, 3, padding="same", stride=2), (1, 4, 64, 64)),
        (lambda: timm.layers.StdConv2d(4, 4, 3), (1, 4, 16, 16)),
        (lambda: timm.layers.ScaledStdConv2d(4, 4, 3), (1, 4, 16, 16)),
        (lambda: timm.layers.ScaledStdConv2dSame(4, 4, 3), (1, 4, 16, 16)),
        (lambda: timm.layers.MixedConv2d(4, 4, [3, 5]), (1, 4, 16, 16)),
        (lambda: timm.layers.create_conv2d(4, 4, [3, 5], padding="same", stride=2), (1, 4, 64, 64)),
        (lambda: nn.utils.parametrizations.weight_norm(conv()), (1, 4, 16, 16)),
        (lambda: nn.utils.parametrizations.spectral_norm(conv()), (1, 4, 16, 16)),
        (lambda: conv().requires_grad_(False), (1, 4, 16, 16)),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_what_counts_as_a_conv(make, shape, given):
    def forward(self, x):
        return self.a2(self.c2(self.a1(self.c1(x))))

    model = net(forward, c1=make(), c2=make(), **relus("a1 a2"))
    options = {"example_inputs": torch.zeros(shape)} if given else {}
    expect(model, "a1 drop c1 A0 post \n a2 keep c2 A0 post", convs=2, **options)


class WeightStandardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SamePadded(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class SamePaddedByShape(nn.Conv2d):
    def forward(self, x):
        rows, columns = x.shape[-2:]
        extra = max((-(-rows // 2) - 1) * 2 + 3 - rows, 0), max((-(-columns // 2) - 1) * 2 + 3 - columns, 0)
        if extra[0] > 0 or extra[1] > 0:
            x = F.pad(x, (extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2))
        return F.conv2d(x, self.weight, self.bias, 2)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * 0.5, self.bias)


@pytest.mark.parametrize(
    "cls", [WeightStandardised, SamePadded, SamePaddedByShape, Scaled], ids=lambda cls: cls.__name__
)
def test_a_subclass_with_its_own_forward_is_the_conv_of_its_name(cls):
    def forward(self, x):
        return self.a2(self.c2(self.a1(self.c1(x))))

    model = net(forward, c1=cls(4, 4, 3), c2=cls(4, 4, 3), **relus("a1 a2"))
    plan = nmconv.make_plan(model, keep="boundary")
    assert [row[1:2] + row[3:] for row in rows(plan)] == [("drop", "A0", "post"), ("keep", "A0", "post")]
    assert plan.counts.convs == 2
    # a pattern with the qualified name of the conv finds it
    assert [site.action for site in nmconv.make_plan(model, {"c1": None, "c2": "2:1"}, keep="boundary").sites] == [
        "keep",
        "keep",
    ]
    assert [name.partition(":")[0] for site in plan.sites for name in site.convs] == ["c1", "c2"]


class ConvWithRelu(nn.Conv2d):
    def forward(self, x):
        return F.relu(super().forward(x))


def test_a_conv_subclass_that_activates_itself():
    def forward(self, x):
        return self.c2(self.c1(x))

    model = net(forward, c1=ConvWithRelu(4, 4, 3), c2=ConvWithRelu(4, 4, 3))
    plan = nmconv.make_plan(model, keep="boundary")
    assert [row[:2] + row[3:] for row in rows(plan)] == [
        ("c1:relu#1", "drop", "A0", "post"),
        ("c2:relu#1", "keep", "A0", "post"),
    ]


@pytest.mark.parametrize("form", ["parameter", "scaled", "standardised", "transposed", "torch"])
def test_functional_conv_on_a_parameter_counts(form):
    def forward(self, x):
        weight = self.weight
        if form == "scaled":
            weight = weight * 0.1
        if form == "standardised":
            weight = F.batch_norm(weight.reshape(1, 4, -1), None, None, training=True).reshape_as(weight)
        function = {"transposed": F.conv_transpose2d, "torch": torch.conv2d}.get(form, F.conv2d)
        return self.a2(self.c2(self.a1(function(x, weight, padding=1))))

    model = net(forward, weight=nn.Parameter(torch.rand(4, 4, 3, 3)), c2=conv(), **relus("a1 a2"))
    plan = nmconv.make_plan(model, keep="boundary")
    assert [row[:2] + row[3:] for row in rows(plan)] == [("a1#1", "drop", "A0", "post"), ("a2#1", "keep", "A0", "post")]
    assert plan.counts.convs == 2


@pytest.mark.parametrize("form", ["buffer", "repeated", "keyword"])
def test_a_fixed_blur_filter_does_not_count(form):
    """It ends the chain like a pool; an activation behind it is pre-activation."""

    def forward(self, x):
        x = self.c1(x)
        kernel = self.kernel.repeat(4, 1, 1, 1) if form == "repeated" else self.kernel
        x = F.conv2d(x, weight=kernel, groups=4) if form == "keyword" else F.conv2d(x, kernel, None, 1, 1, 1, 4)
        return self.a2(self.c2(self.a1(x)))

    kernel = torch.ones(1 if form == "repeated" else 4, 1, 3, 3) / 9
    model = net(forward, **convs("c1 c2"), **relus("a1 a2"), kernel=kernel)
    expect(model, "a1 keep - - leading \n a2 keep c2 A0 post", convs=2)


def test_linear_counts_only_where_the_user_asks():
    def block():
        def forward(self, x):
            y = self.norm(self.dw(x).permute(0, 2, 3, 1))
            y = self.fc2(self.act(self.fc1(y))) * self.gamma
            return x + self.drop(y.permute(0, 3, 1, 2))

        return net(
            forward, dw=conv(groups=4), norm=nn.LayerNorm(4), fc1=nn.Linear(4, 8), act=nn.GELU(), fc2=nn.Linear(8, 4),
            gamma=nn.Parameter(torch.ones(4)), drop=timm.layers.DropPath(0.1),
        )  # fmt: skip

    with pytest.raises(nmconv.NoSitesError, match="linear=True"):
        nmconv.make_plan(nn.Sequential(block(), block()), keep="boundary")
    text = "0.act keep 0.fc1 A0 post \n 1.act keep 1.fc1 B0 post"
    expect(nn.Sequential(block(), block()), text, linear=True, convs=6)


def test_linear_layers_of_gates_do_not_count():
    def forward(self, x):
        x = self.a1(self.c1(x))
        gate = self.f2(self.ga(self.f1(x.mean((2, 3))))).sigmoid()
        return self.a2(self.c2(x * gate[:, :, None, None]))

    model = net(forward, **convs("c1 c2"), **relus("a1 a2 ga"), f1=nn.Linear(4, 4), f2=nn.Linear(4, 4))
    expect(model, "a1 keep c1 A0 \n ga skip - - \n a2 keep c2 B0", linear=True, convs=2)


def test_linear_chains():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    x = torch.zeros(1, 4, 1, 2)
    plan = expect(model, "1 keep 0 A0 \n 4 skip - - \n 6 skip - -", convs=1, example_inputs=x)
    assert "linear" in skipped(plan, "4#1").lower()
    expect(model, "1 keep 0 A0 \n 4 drop 3 B0 \n 6 keep 5 B0", linear=True, convs=3, example_inputs=x)


def test_an_activation_beside_no_conv_is_listed_with_the_reason():
    def forward(self, x):
        x = self.a1(self.c1(x))
        x = self.a2(self.n(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1))).mean((2, 3))
        return self.a3(self.fc(x))

    model = net(forward, **convs("c1"), n=nn.BatchNorm2d(8), fc=nn.Linear(8, 4), unused=nn.ReLU(), **relus("a1 a2 a3"))
    plan = expect(model, "a1 keep c1 A0 \n a2 skip - - \n a3 skip - - \n unused#0 skip - -")
    assert plan.counts.activations_before == 1
    assert "linear" in skipped(plan, "a3#1").lower()
    assert "call" in skipped(plan, "unused#0")


def test_an_unused_value_is_no_fork_and_its_activation_no_gate():
    def forward(self, x):
        y = self.c1(x)
        self.a9(self.c9(y))
        return self.a2(self.c2(self.a1(y)))

    model = net(forward, **convs("c1 c2 c9"), **relus("a1 a2 a9"))
    plan = expect(model, "a9 skip - - \n a1 drop c1 A0 \n a2 keep c2 A0", convs=2)
    assert "gate" not in skipped(plan, "a9#1")


def test_linear_then_activation_then_conv_is_pre_activation():
    def forward(self, z):
        x = self.a0(self.n(self.fc(z).view(-1, 4, 8, 8)))
        return self.a2(self.c2(self.a1(self.c1(x))))

    model = net(forward, fc=nn.Linear(16, 256), **norms("n"), **convs("c1 c2"), **relus("a0 a1 a2"))
    text = "a0 keep - - leading \n a1 drop c1 A0 \n a2 keep c2 A0"
    expect(model, text, convs=2, example_inputs=torch.zeros(2, 16))


def test_indivisible_norm_act_with_an_act_inside_is_explained():
    def forward(self, x):
        return self.a2(self.c2(self.frn(self.c1(x))))

    model = net(forward, **convs("c1 c2"), frn=timm.layers.FilterResponseNormAct2d(4), **relus("a2"))
    plan = nmconv.make_plan(model, keep="boundary")
    assert [row[:3] for row in rows(plan) if row[1] != "skip"] == [("a2#1", "keep", "c2")]
    for site in plan.sites:
        assert "never calls" not in site.reason, site


# --- Hard cases: gates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmoid", SIGMOIDS)
@pytest.mark.parametrize("size", ["channel", "full"])
def test_squeeze_excite_after_the_activation(sigmoid, size):
    function = SIGMOIDS[sigmoid]

    def forward(self, x):
        x = self.a1(self.c1(x))
        gate = x.mean((2, 3), keepdim=True) if size == "channel" else x
        gate = self.g2(self.ga(self.g1(gate)))
        x = x * (self.gate(gate) if isinstance(function, nn.Module) else function(gate))
        return self.a3(self.c3(self.a2(self.c2(x))))

    more = {"gate": function} if isinstance(function, nn.Module) else {}
    model = net(forward, **convs("c1 c2 c3"), g1=conv(kernel=1), g2=conv(kernel=1), **relus("ga a1 a2 a3"), **more)
    hand = ":relu6 skip - - \n" if sigmoid == "hand-made" else ""
    plan = expect(model, f"a1 keep c1 A0 \n ga skip - - \n {hand} a2 drop c2 B0 \n a3 keep c3 B0", convs=3)
    assert "gate" in skipped(plan, "ga#1")


@pytest.mark.parametrize("sigmoid", SIGMOIDS)
def test_a_bounded_branch_of_full_size_is_a_gate(sigmoid):
    """conv1 * sigmoid(act(conv2)): conv2's branch reaches the main path only as the bounded operand."""
    function = SIGMOIDS[sigmoid]

    def forward(self, x):
        y = self.c1(x)
        gate = self.g2(self.ga(self.g1(x)))
        y = y * (self.gate(gate) if isinstance(function, nn.Module) else function(gate))
        return self.a2(self.c2(y))

    more = {"gate": function} if isinstance(function, nn.Module) else {}
    model = net(forward, **convs("c1 c2 g1 g2"), **relus("ga a2"), **more)
    hand = ":relu6 skip - - \n" if sigmoid == "hand-made" else ""
    expect(model, f"ga skip - - \n {hand} a2 keep c2 A0", convs=2)


@pytest.mark.parametrize("product", ["*", "reversed", "*=", "mul", "torch.mul", "mul_", "expand_as"])
def test_an_activation_after_the_gates_product_belongs_to_the_conv_before_it(product):
    def forward(self, x):
        x = self.n1(self.c1(self.a0(self.c0(x))))
        g = self.g2(self.ga(self.g1(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        if product == "*=":
            x *= g
        elif product == "reversed":
            x = g * x
        elif product == "expand_as":
            x = x * g.expand_as(x)
        else:
            x = {"*": x.__mul__, "mul": x.mul, "torch.mul": partial(torch.mul, x), "mul_": x.mul_}[product](g)
        return self.a2(self.c2(self.a1(x)))

    model = net(forward, **convs("c0 c1 c2 g1 g2"), **norms("n1"), **relus("a0 a1 a2 ga"))
    # the product ends the chain [c0 c1]; [c2]
    text = "a0 drop c0 A0 \n ga skip - - \n a1 keep c1 A0 gated \n a2 keep c2 B0"
    expect(model, text, convs=3)


def test_an_activation_after_gate_and_residual_add_belongs_to_the_conv_before_it():
    def forward(self, x):
        y = self.c2(self.a1(self.c1(x)))
        y = y * self.g2(self.ga(self.g1(y.mean((2, 3), keepdim=True)))).sigmoid()
        x = self.a2(y + x)
        return self.a3(self.c3(x))

    model = net(forward, **convs("c1 c2 c3 g1 g2"), **relus("a1 a2 a3 ga"))
    plan = nmconv.make_plan(model, keep="boundary")
    assert [row[:4] for row in rows(plan)] == [
        ("a1#1", "drop", "c1", "A0"),
        ("ga#1", "skip", "-", "-"),
        ("a2#1", "keep", "c2", "A0"),
        ("a3#1", "keep", "c3", "B0"),
    ]


def test_an_activation_after_gate_and_add_in_a_pre_activation_chain_belongs_to_the_conv_after_it():
    def forward(self, x):
        x = F.max_pool2d(x, 2)
        y = self.c2(self.a2(self.c1(self.a1(self.n1(x)))))
        y = y * self.g(y.mean((2, 3), keepdim=True)).sigmoid()
        return F.max_pool2d(self.c3(self.a3(y + x)), 2)

    model = net(forward, **convs("c1 c2 c3 g"), **norms("n1"), **relus("a1 a2 a3"))
    expect(model, "a1 keep c1 A0 pre \n a2 drop c2 A0 pre \n a3 keep c3 B0 pre", convs=3)


def test_an_activation_after_the_gate_of_a_pre_activation_chain_belongs_to_the_conv_after_it():
    def forward(self, x):
        x = F.max_pool2d(x, 2)
        y = self.c2(self.a2(self.c1(self.a1(self.n1(x)))))
        y = y * self.g(y.mean((2, 3), keepdim=True)).sigmoid()
        y = self.c4(self.a4(self.c3(self.a3(y))))
        return F.max_pool2d(x + y, 2)

    model = net(forward, **convs("c1 c2 c3 c4 g"), **norms("n1"), **relus("a1 a2 a3 a4"))
    # [c1 c2] begins with a1, and c2 has none of its own; [c3 c4] begins with a3
    text = "a1 keep c1 A0 pre \n a2 drop c2 A0 pre \n a3 keep c3 B0 pre \n a4 drop c4 B0 pre"
    expect(model, text, convs=4)


@pytest.mark.parametrize("how", ["*", "+"])
def test_a_broadcast_operand_is_a_gate_in_products_and_sums(how):
    """Global context: no sigmoid, but the branch is broadcast."""

    def forward(self, x):
        x = self.a1(self.c1(x))
        context = self.ga2(self.g2(self.ga1(self.g1(F.adaptive_avg_pool2d(x, 1)))))
        x = x * context if how == "*" else x + context
        return self.a2(self.c2(x))

    model = net(forward, **convs("c1 c2"), g1=conv(kernel=1), g2=conv(kernel=1), **relus("a1 a2 ga1 ga2"))
    text = "a1 keep c1 A0 \n ga1 skip - - \n ga2 skip - - \n a2 keep c2 B0"
    expect(model, text, convs=2)


def test_a_bounded_operand_of_a_sum_is_a_gate():
    def forward(self, x):
        y = self.c1(x) + torch.sigmoid(self.g2(self.ga(self.g1(x))))
        return self.a2(self.c2(self.a1(y)))

    model = net(forward, **convs("c1 c2 g1 g2"), **relus("a1 a2 ga"))
    # the activation after it belongs to c1, and the chain ends
    expect(model, "ga skip - - \n a1 keep c1 A0 \n a2 keep c2 B0", convs=2)


def test_attention_by_softmax_is_a_gate():
    def forward(self, x):
        x = self.a1(self.c1(x))
        weight = self.g2(self.ga(self.g1(x)))
        b, c, h, w = weight.shape
        weight = weight.view(b, c, h * w).softmax(-1).view(b, c, h, w)
        return self.a2(self.c2(x * weight))

    model = net(forward, **convs("c1 c2 g1 g2"), **relus("a1 a2 ga"))
    expect(model, "a1 keep c1 A0 \n ga skip - - \n a2 keep c2 B0", convs=2)


def test_starnet_the_activation_that_feeds_a_product_directly_is_the_gate():
    def forward(self, x):
        x = self.c0(x)
        x = self.act(self.f1(x)) * self.f2(x)
        return self.a3(self.c3(self.a2(self.g(x))))

    model = net(forward, **convs("c0 f1 f2 g c3"), act=nn.ReLU6(), **relus("a2 a3"))
    plan = expect(model, "act skip - - \n a2 drop g A0 \n a3 keep c3 A0", convs=5)
    assert "gate" in skipped(plan, "act#1")


def test_both_activations_of_a_product_are_gates():
    def forward(self, x):
        return self.a3(self.c3(self.a1(self.c1(x)) * self.a2(self.c2(x))))

    expect(net(forward, **convs("c1 c2 c3"), **relus("a1 a2 a3")), "a1 skip - - \n a2 skip - - \n a3 keep c3 A0")


def test_a_gate_inside_a_gate():
    def forward(self, x):
        x = self.a1(self.c1(x))
        inner = self.ga1(self.g1(x))
        inner = inner * self.h(self.ha(self.g2(inner.mean((2, 3), keepdim=True)))).sigmoid()
        x = x * self.g3(inner).sigmoid()
        return self.a2(self.c2(x))

    model = net(forward, **convs("c1 c2 g1 g2 g3 h"), **relus("a1 a2 ga1 ha"))
    expect(model, "a1 keep c1 A0 \n ga1 skip - - \n ha skip - - \n a2 keep c2 B0", convs=2)


def test_a_branch_that_also_reaches_the_main_path_otherwise_is_no_gate():
    def forward(self, x):
        side = self.a1(self.c1(x))
        y = self.c3(self.a2(self.c2(x))) * torch.sigmoid(side)
        return torch.cat([y, side], 1)

    model = net(forward, **convs("c1 c2 c3"), **relus("a1 a2"))
    expect(model, "a1 keep c1 A0 \n a2 keep c2 B0", convs=3)


def test_highway():
    def forward(self, x):
        gate = torch.sigmoid(self.g(x))
        x = self.a1(self.c1(x) * gate + x * (1 - gate))
        return self.a2(self.c2(x))

    model = net(forward, **convs("c1 c2 g"), **relus("a1 a2"))
    plan = nmconv.make_plan(model, keep="boundary")
    assert [row[:3] for row in rows(plan)] == [("a1#1", "keep", "c1"), ("a2#1", "keep", "c2")]
    assert plan.counts.convs == 2


# --- Hard cases: layout -----------------------------------------------------------------------------------------------

LAYOUTS = {
    "view": lambda x: x.view(x.shape[0], 4, -1, 4, x.shape[3]).view(x.shape),
    "reshape": lambda x: x.reshape(x.shape[0], 2, 2, x.shape[2], x.shape[3]).reshape(x.shape),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "torch.permute": lambda x: torch.permute(x, (0, 1, 3, 2)),
    "transpose": lambda x: x.transpose(2, 3),
    "flatten": lambda x: torch.flatten(x, 2).unflatten(2, x.shape[2:]),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
}


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


# --- Hard cases: in-place, and what is shared -------------------------------------------------------------------------


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


# --- Unit -------------------------------------------------------------------------------------------------------------


def post(count: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(count) for part in (conv(), nn.ReLU())))


def pre(count: int) -> nn.Module:
    return nn.Sequential(nn.MaxPool2d(2), *(part for _ in range(count) for part in (nn.ReLU(), conv())))


def kept(model: nn.Module, ratio: object, **options) -> tuple[list[int], list[int]]:
    """Which activations stay, by position, and the unit of each."""
    plan = nmconv.make_plan(model, ratio, **{"keep": "boundary", **options})
    assert {site.chain for site in plan.sites} == {plan.sites[0].chain}
    stay = [at for at, site in enumerate(plan.sites) if site.action == "keep"]
    return stay, [site.unit for site in plan.sites]


@pytest.mark.parametrize(
    ("ratio", "keep", "stay"),
    [
        ("1:1", "boundary", [0, 1, 2, 3, 4, 5, 6]),
        ("2:1", "boundary", [1, 3, 5, 6]),
        ("3:2", "boundary", [1, 2, 4, 5, 6]),
        ("3:1", "boundary", [2, 5, 6]),
        ("4:1", "boundary", [3, 6]),
        ("5:3", "boundary", [2, 3, 4, 5, 6]),
        ("8:1", "boundary", [6]),
        ("7:2", "boundary", [5, 6]),
        ("2:1", "first", [0, 2, 4, 6]),
        ("3:2", "first", [0, 1, 3, 4, 6]),
        ("3:1", "first", [0, 3, 6]),
        ("4:1", "first", [0, 4]),
        ("2:1", "spread", [1, 3, 5, 6]),
        ("3:1", "spread", [2, 5, 6]),
    ],
)
def test_units_of_a_chain_of_seven(ratio, keep, stay):
    """The tail is a shorter unit of r convs, which keeps ceil(r M / N)."""
    n = int(ratio.partition(":")[0])
    assert kept(post(7), ratio, keep=keep) == (stay, [at // n for at in range(7)])


@pytest.mark.parametrize(
    ("ratio", "keep", "stay"),
    [
        ("2:1", "boundary", [0, 2, 4]),
        ("3:2", "boundary", [0, 1, 3, 4]),
        ("3:1", "boundary", [0, 3]),
        ("4:1", "boundary", [0, 4]),
        ("2:1", "first", [1, 3, 4]),
        ("3:2", "first", [1, 2, 3, 4]),
        ("3:1", "first", [2, 4]),
        ("4:1", "first", [3, 4]),
        ("2:1", "spread", [0, 2, 4]),
    ],
)
def test_units_of_a_pre_activation_chain_of_five(ratio, keep, stay):
    n = int(ratio.partition(":")[0])
    assert kept(pre(5), ratio, keep=keep) == (stay, [at // n for at in range(5)])


@pytest.mark.parametrize(
    ("ratio", "last", "front"), [("4:2", {1, 3}, {0, 2}), ("6:3", {1, 3, 5}, {0, 2, 4}), ("6:2", {2, 5}, {0, 3})]
)
def test_spread_spaces_them_evenly(ratio, last, front):
    n = int(ratio[0])
    assert set(kept(post(n), ratio, keep="spread")[0]) == last
    assert set(kept(pre(n), ratio, keep="spread")[0]) == front


@pytest.mark.parametrize("ratio", ["3:2", "5:3", "5:4", "7:3"])
def test_spread_keeps_the_share(ratio):
    n, m = map(int, ratio.split(":"))
    assert len(kept(post(n), ratio, keep="spread")[0]) == m
    assert len(kept(pre(n), ratio, keep="spread")[0]) == m


def test_a_callable_decides_for_itself():
    asked = []

    def middle(unit):
        asked.append(unit)
        return [1]

    assert kept(post(7), "3:1", keep=middle)[0] == [1, 4, 6]
    assert [(unit.unit, unit.allowed, unit.pre) for unit in asked] == [(0, 1, False), (1, 1, False)]
    assert asked[0].convs == (("0",), ("2",), ("4",))
    assert asked[0].sites == ("1#1", "3#1", "5#1")
    assert asked[0].owners == (0, 1, 2)
    assert kept(pre(3), "3:1", keep=lambda unit: [1] if unit.pre else [])[0] == [1]
    assert kept(post(3), "3:1", keep=lambda unit: [])[0] == []
    assert kept(post(3), "3:2", keep=lambda unit: {2})[0] == [2]


def test_a_unit_that_has_few_enough_is_left_alone():
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())  # three convs, two activations
    assert kept(model, "3:2") == ([0, 1], [0, 0])
    assert kept(model, "3:1") == ([1], [0, 0])
    assert kept(model, "3:1", keep="first") == ([0], [0, 0])
    assert kept(model, "2:1") == ([1], [0, 0])
    assert kept(model, "4:1") == ([1], [0, 0])

    def never(unit):
        raise AssertionError(unit)

    assert kept(model, "3:2", keep=never) == ([0, 1], [0, 0])


def test_units_count_from_the_chains_first_conv():
    def forward(self, x):
        h = self.a1(self.c1(x))
        h = self.a5(self.c5(self.a4(self.c4(self.a3(self.c3(self.a2(self.c2(h))))))))
        return h + x

    model = net(forward, **convs("c1 c2 c3 c4 c5"), **relus("a1 a2 a3 a4 a5"))
    text = "a1 drop c1 A0 \n a2 keep c2 A0 \n a3 drop c3 A1 \n a4 keep c4 A1 \n a5 keep c5 A2"
    expect(model, text, convs=5)


# --- relocate ---------------------------------------------------------------------------------------------------------


def inverted(residual: bool) -> nn.Module:
    def forward(self, x):
        y = self.n3(self.c3(self.a2(self.n2(self.c2(self.a1(self.n1(self.c1(x))))))))
        return x + y if residual else y

    return net(forward, **convs("c1 c2 c3"), **norms("n1 n2 n3"), **relus("a1 a2"))


def actions(model: nn.Module, ratio: str, **options) -> list[str]:
    return [
        site.action for site in nmconv.make_plan(model, ratio, relocate=True, **{"keep": "boundary", **options}).sites
    ]


def test_relocate_makes_a_true_unit_of_an_inverted_residual():
    model = nn.Sequential(inverted(True), inverted(False), conv(), nn.ReLU())
    text = """
        0.a1 drop 0.c1 A0 post
        0.a2 move 0.c2 A0 post
        1.a1 drop 1.c1 B0 post
        1.a2 move 1.c2 B0 post
        3 keep 2 C0 post
    """
    plan = expect(model, text, "3:1", relocate=True, convs=7)
    assert plan.counts.activations_after == 3
    assert [plan.sites[at].behind for at in (1, 3)] == ["0.c3", "1.c3"]
    structure = structure_of(model, record_model(model, both_sizes=False))
    one, two = (change.place for change in changes_of(plan, structure).made if change.place is not None)
    # behind the add of the first block, behind the norm of the second
    assert (one.owner, one.op, one.call) in {("0", "add", 1), ("", "0", 1)}
    assert (two.owner, two.op, two.call) in {("1", "n3", 1), ("", "1", 1)}


def test_relocated_it_works_as_written_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(inverted(True), inverted(False), conv(), nn.ReLU()).eval()
    new = nmconv.convert(model, "3:1", relocate=True, keep="boundary")

    def by_hand(block, x, residual):
        y = block.n3(block.c3(block.n2(block.c2(block.n1(block.c1(x))))))
        return torch.relu(x + y if residual else y)

    x = torch.randn(2, 4, 8, 8)
    wanted = torch.relu(model[2](by_hand(model[1], by_hand(model[0], x, True), False)))
    assert torch.equal(new(x), wanted)
    assert list(new.state_dict()) == list(model.state_dict())


def test_relocate_moves_the_kept_one_whichever_it_is():
    model = nn.Sequential(inverted(True), conv(), nn.ReLU())
    assert actions(model, "3:1", keep="first") == ["move", "drop", "keep"]


def test_relocate_moves_nothing_where_the_last_conv_has_its_own():
    assert actions(post(3), "3:1") == ["drop", "drop", "keep"]
    assert actions(post(3), "3:1", keep="first") == ["keep", "drop", "drop"]


def test_relocate_also_where_the_unit_has_few_enough_already():
    """The issue's own example of "never onto logits", RetinaNet's head at 3:1, is a unit of two convs with one
    activation: few enough, and yet its activation would move if the rule on outputs did not forbid it."""
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.MaxPool2d(2), conv(), nn.ReLU())
    text = "1 move 0 A0 \n 5 keep 4 B0"
    expect(model, text, "2:1", relocate=True, convs=3)


@pytest.mark.parametrize("tail", ["output", "pool and linear", "norm", "also further", "in a dict"])
def test_relocate_never_onto_what_reaches_an_output_without_a_further_conv(tail):
    def forward(self, x):
        y = self.c3(self.a2(self.c2(self.a1(self.c1(x)))))
        if tail == "pool and linear":
            return self.fc(y.mean((2, 3)))
        if tail == "norm":
            return self.n(y)
        if tail == "also further":
            return y, self.a4(self.c4(y))
        return {"logits": y} if tail == "in a dict" else y

    more = {"a4": nn.ReLU(), "c4": conv()} if tail == "also further" else {}
    model = net(forward, **convs("c1 c2 c3"), **relus("a1 a2"), fc=nn.Linear(4, 2), **norms("n"), **more)
    assert actions(model, "3:1")[:2] == ["drop", "keep"]


def test_relocate_never_in_a_pre_activation_chain():
    model = nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.MaxPool2d(2), conv(), nn.ReLU())
    expect(model, "1 keep 2 A0 pre \n 3 drop 4 A0 pre \n 7 keep 6 B0 post", "2:1", relocate=True)
    expect(model, "1 drop 2 A0 pre \n 3 keep 4 A0 pre \n 7 keep 6 B0 post", "2:1", relocate=True, keep="first")


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v2", "timm/mobilenetv2_100"])
def test_relocate_mobilenet_v2_at_3_1(name):
    """Expand, depthwise, project, add, act: 17 units of three, and the last conv."""
    plan = nmconv.make_plan(zoo.build(name, "meta"), "3:1", relocate=True, keep="boundary")
    assert plan.counts.activations_before == 35
    assert plan.counts.activations_after == 18
    assert [site.action for site in plan.sites].count("move") == 17
    assert [site.action for site in plan.sites].count("drop") == 17
    assert plan.sites[-1].action == "keep"


def test_relocate_retinanet_head_stays():
    """[conv conv conv] [conv logits] at 3:1: the second unit would end on the logits."""
    plan = nmconv.make_plan(zoo.build("torchvision/retinanet_resnet50_fpn"), "3:1", relocate=True, keep="boundary")
    for head in ("classification_head", "regression_head"):
        sites = [site for site in plan.sites if f"{head}.conv" in site.name]
        assert [site.action for site in sites] == ["drop", "drop", "keep", "keep"]
        assert [site.unit for site in sites] == [0, 0, 0, 1]


# --- train and eval ---------------------------------------------------------------------------------------------------


def auxiliary() -> nn.Module:
    def forward(self, x):
        x = self.relu(self.c1(x))
        aux = self.relu(self.b2(self.relu(self.b1(x)))) if self.training else None
        x = self.relu(self.c2(x))
        x = self.relu(self.c3(x))
        return x if aux is None else (x, aux)

    return net(forward, **convs("c1 b1 b2 c2 c3"), relu=nn.ReLU())


@pytest.mark.parametrize("training", [False, True])
def test_auxiliary_heads_are_planned_and_numbered_for_both_modes(training):
    model = auxiliary().train(training)
    plan = nmconv.make_plan(model, keep="boundary")
    assert model.training is training
    found = {(site.modes, site.call, site.train_call): (site.convs[0], site.action, site.id) for site in plan.sites}
    # eval: [c1 c2 c3]; in training also [b1 b2]
    assert found == {
        ("both", 1, 1): ("c1", "drop", "relu#1"),
        ("both", 2, 4): ("c2", "keep", "relu#2"),
        ("both", 3, 5): ("c3", "keep", "relu#3"),
        ("train", 2, 2): ("b1", "drop", "relu#2(train)"),
        ("train", 3, 3): ("b2", "keep", "relu#3(train)"),
    }
    assert (plan.counts.convs, plan.counts.activations_before, plan.counts.activations_after) == (3, 3, 2)


def test_a_site_of_eval_mode_only():
    def forward(self, x):
        x = self.a1(self.c1(x))
        return self.c2(x) if self.training else self.a2(self.c2(x))

    plan = nmconv.make_plan(net(forward, **convs("c1 c2"), **relus("a1 a2")), keep="boundary")
    assert [(site.id, site.action, site.modes, site.train_call) for site in plan.sites] == [
        ("a1#1", "drop", "both", 1),
        ("a2#1", "keep", "eval", None),
    ]


def test_two_kinds_of_activation_in_the_two_modes():
    def forward(self, x):
        x = self.c1(x)
        x = F.relu(x) if self.training else F.relu6(x)
        return self.a2(self.c2(x))

    plan = nmconv.make_plan(net(forward, **convs("c1 c2"), **relus("a2")), keep="boundary")
    found = {site.id: (site.modes, site.action) for site in plan.sites}
    assert found[":relu6#1"] == ("eval", "drop")
    assert found[":relu#1(train)"][0] == "train"
    assert plan.counts.activations_before == 2


# --- the expected counts ----------------------------------------------------------------------------------------------

COUNTS = {
    "timm/resnet18": (17, 9),
    "torchvision/resnet18": (17, 9),
    "timm/resnet50": (49, 33),
    "torchvision/resnet50": (49, 33),
    "torchvision/alexnet": (5, 4),
    "torchvision/vgg16_bn": (13, 8),
    "torchvision/densenet121": (120, 62),
    "timm/densenet121": (120, 62),
    "torchvision/googlenet": (57, 38),
    "torchvision/inception_v3": (94, 68),
    "timm/mobilenetv2_100": (35, 18),
    "timm/seresnet50": (49, 33),
    "timm/rexnet_100": (33, 17),
}


@pytest.mark.parametrize("name", COUNTS)
def test_expected_counts(name):
    counts = nmconv.make_plan(zoo.build(name, "meta"), "2:1", keep="boundary").counts
    assert (counts.activations_before, counts.activations_after) == COUNTS[name]
    assert counts.ratio_asked == "2:1"


def test_convnext_counts_with_linear():
    """All 18 activations follow a linear layer: [fc1 fc2] eighteen times, which have one each already."""
    model = zoo.build("timm/convnext_tiny", "meta")
    with pytest.raises(nmconv.NoSitesError):
        nmconv.make_plan(model, keep="boundary")
    counts = nmconv.make_plan(model, linear=True, keep="boundary").counts
    assert (counts.activations_before, counts.activations_after) == (18, 18)


def test_repvgg_a0_counts_one_conv_a_block():
    counts = nmconv.make_plan(zoo.build("timm/repvgg_a0", "meta"), keep="boundary").counts
    assert counts.convs == counts.activations_before == 22
    assert counts.activations_after == 11


def test_what_a_plan_says_is_no_matter_of_dtype_device_mode_or_freezing():
    def make(**kind):
        return nn.Sequential(inverted(True), conv(), nn.ReLU(), conv(), nn.ReLU()).to(**kind)

    wanted = nmconv.make_plan(make(), keep="boundary")
    variants = SimpleNamespace(
        meta=make(device="meta"),
        half=make(dtype=torch.half),
        bfloat16=make(dtype=torch.bfloat16),
        double=make(dtype=torch.double),
        frozen=make().requires_grad_(False),
        eval=make().eval(),
        channels_last=make(memory_format=torch.channels_last),
    )
    for name, model in vars(variants).items():
        assert nmconv.make_plan(model, keep="boundary") == wanted, name


def test_hooks_weight_norm_and_checkpointing_change_nothing():
    wanted = nmconv.make_plan(zoo.build("timm/resnet18", "meta"), keep="boundary").sites
    model = zoo.build("timm/resnet18", "meta")
    model.set_grad_checkpointing(True)
    model.train()
    model.layer1.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    nn.utils.parametrizations.spectral_norm(model.layer2[0].conv1)
    assert nmconv.make_plan(model, keep="boundary").sites == wanted


def test_a_unit_ends_before_what_the_next_block_begins_with():
    """A dropout that hands on the very tensor is no end: the shortcut beside it reads the value itself."""

    class Next(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.c, self.n, self.shortcut = nn.Dropout(0.0), conv(), nn.BatchNorm2d(4), nn.Identity()

        def forward(self, x):
            return self.n(self.c(self.drop(x))) + self.shortcut(x)

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.r, self.b, self.n = conv(), nn.Hardswish(), conv(), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.n(self.b(self.r(self.a(x))))

    model = nn.Sequential(First(), Next(), conv(), nn.ReLU()).eval()
    plan = nmconv.make_plan(model, "2:1", relocate=True, keep="boundary")
    assert [(site.id, site.action, site.behind) for site in plan.sites] == [
        ("0.r#1", "move", "0.b"),
        ("3#1", "keep", ""),
    ]
    x = torch.rand(2, 4, 8, 8)
    first = F.hardswish(model[0].n(model[0].b(model[0].a(x))))
    expected = model[3](model[2](model[1](first)))
    assert torch.equal(nmconv.apply_plan(model, plan)(x), expected)
