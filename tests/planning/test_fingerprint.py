"""The fingerprint, and plans applied to other models."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import conv, convs, net, norms
from plan_nets import PLANS, run_of, staged, untouched
from torch import nn
from zoo import models as zoo

import nmconv
from nmconv import (
    Plan,
    PlanError,
)


def swapped_kind() -> nn.Module:
    model = staged()
    model.layer1[1] = nn.SiLU()
    return model


def wider() -> nn.Module:
    model = staged()
    model.layer1[0], model.layer1[2] = conv(4, 8), conv(8, 4)
    return model


def renamed() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=run_of(1), layer1=run_of(2), layer3=run_of(3)))


# --- a plan and other models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [swapped_kind, wider, renamed, lambda: run_of(6), lambda: nn.Sequential(staged())])
def test_a_plan_of_another_model(other):
    plan = nmconv.make_plan(staged(), keep="boundary")
    model = other()
    before = untouched(model)
    for inplace in (False, True):
        with pytest.raises(PlanError, match=r"fingerprint.*make a plan for this model"):
            nmconv.apply_plan(model, plan, inplace=inplace)
        assert untouched(model) == before


def _wired(forward):
    return net(forward, **convs("c1 c2 c3"), **norms("n"))


WIRINGS = {
    "no activation": lambda self, x: self.c3(self.c2(self.c1(x))),
    "another function": lambda self, x: F.silu(self.c3(F.silu(self.c2(F.silu(self.c1(x)))))),
    "another order": lambda self, x: F.relu(self.c1(F.relu(self.c2(F.relu(self.c3(x)))))),
    "a residual": lambda self, x: F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(x)) + x)))),
    "one more before": lambda self, x: F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(F.relu(x))))))),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_plan_of_a_model_with_the_same_children_but_another_forward(wiring):
    """applying it to another model is a clear error: here the modules are alike, and only what is called differs."""
    plan = nmconv.make_plan(
        _wired(lambda self, x: F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(x))))))), "3:1", keep="boundary"
    )
    model = _wired(WIRINGS[wiring])
    before = untouched(model)
    with pytest.raises(PlanError):
        nmconv.apply_plan(model, plan, inplace=True)
    assert untouched(model) == before


def test_a_plan_of_a_model_that_overwrites_what_the_other_copies():
    """How an activation is called is found anew in each model, and is no part of a plan."""
    plain = _wired(lambda self, x: F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(x)))))))
    other = _wired(lambda self, x: F.relu_(self.c3(F.relu_(self.c2(F.relu_(self.c1(x)))))))
    plan = nmconv.make_plan(plain, "3:1", keep="boundary")
    assert nmconv.make_plan(other, "3:1", keep="boundary") == plan
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(nmconv.apply_plan(other, plan).eval()(x), nmconv.apply_plan(plain, plan).eval()(x))


@pytest.mark.parametrize(
    "plan", [None, "2:1", {}, 3, PLANS["plain"].to_json(), Plan], ids=["None", "ratio", "dict", "int", "json", "class"]
)
def test_what_is_no_plan(plan):
    model = staged()
    before = untouched(model)
    with pytest.raises(PlanError):
        nmconv.apply_plan(model, plan, inplace=True)
    assert untouched(model) == before


def test_a_plan_of_resnet18_is_none_of_timms():
    plan = PLANS["resnet"]
    with pytest.raises(PlanError):
        nmconv.apply_plan(zoo.build("timm/resnet18", "meta"), plan)


def variants() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    weight_normed, hooked = staged(), staged()
    nn.utils.parametrizations.weight_norm(weight_normed.layer1[0])
    hooked.layer1.register_forward_hook(lambda *_: None)
    return {
        "weights": staged(),
        "eval": staged().eval(),
        "half": staged().half(),
        "bfloat16": staged().bfloat16(),
        "double": staged().double(),
        "meta": staged().to("meta"),
        "frozen": staged().requires_grad_(False),
        "channels_last": staged().to(memory_format=torch.channels_last),
        "weight norm": weight_normed,
        "hooks": hooked,
        "copy": copy.deepcopy(staged()),
    }


# --- the fingerprint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", variants())
def test_the_fingerprint_ignores(variant):
    model, plan = variants()[variant], nmconv.make_plan(staged(), keep="boundary")
    assert nmconv.make_plan(model, keep="boundary").fingerprint == plan.fingerprint
    assert nmconv.get_plan(nmconv.apply_plan(model, plan)) == plan
    assert nmconv.get_plan(nmconv.apply_plan(staged(), nmconv.make_plan(model, keep="boundary"))).sites == plan.sites


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "resnetv2_50", "densenet121", "vgg11_bn"])
def test_the_fingerprint_ignores_timms_classifier(name):
    plan = nmconv.make_plan(zoo.build(f"timm/{name}", "meta"), keep="boundary")
    with torch.device("meta"):
        other = timm.create_model(name, num_classes=7)
        none = timm.create_model(name, num_classes=0)
        reset = timm.create_model(name)
        reset.reset_classifier(11)
    for model in (other, none, reset):
        new = nmconv.make_plan(model, keep="boundary")
        assert new.fingerprint == plan.fingerprint
        assert nmconv.get_plan(nmconv.apply_plan(model, plan, inplace=True)) == plan


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenet1_1", "mobilenet_v2", "vgg11_bn", "fcn_resnet50", "deeplabv3_resnet50"]
)
def test_the_fingerprint_ignores_torchvisions_classifier(name):
    """In squeezenet and in the segmentation heads the classifier is a conv."""
    import torchvision

    options = {"weights": None} | ({"weights_backbone": None} if "resnet50" in name else {})
    with torch.device("meta"):
        one, two = (torchvision.models.get_model(name, num_classes=count, **options) for count in (5, 9))
    one, two = nmconv.make_plan(one, keep="boundary"), nmconv.make_plan(two, keep="boundary")
    assert one.fingerprint == two.fingerprint


def test_a_reset_classifier_after_conversion_keeps_the_conversion():
    model = nmconv.convert(timm.create_model("resnet10t"), keep="boundary")
    plan = nmconv.get_plan(model)
    model.reset_classifier(3)
    assert nmconv.get_plan(model) == plan
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
