"""What a chain and a convolution are (docs/words.md): a tiny net for each, and the plan that the words give."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from nets import conv, convs, expect, net, norms, relus, rows, skipped
from torch import nn

import nmconv

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


# --- Chain: what it goes on through and where it ends --------------------------------------------------------------


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


# --- Chain: what a conv is -----------------------------------------------------------------------------------------


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
