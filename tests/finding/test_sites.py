"""What a site is (docs/words.md), sentence by sentence: a tiny net for each, and the plan that the words give.

nets.py says how a plan is written.
"""

from __future__ import annotations

from functools import partial

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from calls import calls_of
from nets import conv, convs, expect, net, norms, relus, rows, skipped
from torch import nn

import nmconv

# --- Site: conv -> (norm) -> act -----------------------------------------------------------------------------------


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


# --- Site: conv -> (norm) -> residual add -> act -------------------------------------------------------------------


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


# --- Site: several conv branches summed -> act (RepVGG) ------------------------------------------------------------


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


SOURCES = {
    "input": lambda x: x,
    "pool": lambda x: F.max_pool2d(x, 2),
    "cat": lambda x: torch.cat([x, x], 1),
    "resize": lambda x: F.interpolate(x, scale_factor=2.0),
}


# --- Site: pre-activation, (norm) -> act -> conv -------------------------------------------------------------------


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
