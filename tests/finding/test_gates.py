"""Gates are no activations (docs/words.md): a tiny net for each form."""

from __future__ import annotations

from functools import partial

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from nets import conv, convs, expect, net, norms, relus, rows, skipped
from torch import nn

import nmconv

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
