"""Sites in train and eval mode, and the numbers of sites in known networks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from nets import conv, convs, inverted, net, relus
from torch import nn
from zoo import models as zoo

import nmconv


def auxiliary() -> nn.Module:
    def forward(self, x):
        x = self.relu(self.c1(x))
        aux = self.relu(self.b2(self.relu(self.b1(x)))) if self.training else None
        x = self.relu(self.c2(x))
        x = self.relu(self.c3(x))
        return x if aux is None else (x, aux)

    return net(forward, **convs("c1 b1 b2 c2 c3"), relu=nn.ReLU())


# --- train and eval ------------------------------------------------------------------------------------------------


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


# --- the expected counts -------------------------------------------------------------------------------------------


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
