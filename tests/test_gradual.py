"""Gradual conversion: at slope 0 a model is the original to the bit, at slope 1 the hard conversion."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from nets import conv, net
from torch import nn

import nmconv

torch.set_num_threads(1)


# -- networks ----------------------------------------------------------------------------------------------------------


def plain(act=nn.ReLU, last=None):
    """Convolutions, norms and activations in a row."""
    parts = [conv(3), nn.BatchNorm2d(4), act(), conv(), nn.BatchNorm2d(4), act(), conv(), (last or act)(), conv()]
    return nn.Sequential(*parts)


def functional():
    def forward(self, x):
        x = F.relu(self.bn(self.one(x)))
        x = F.relu6(self.two(x), inplace=True)
        x = torch.relu_(self.three(x))
        return self.four(F.gelu(x) if self.training else F.gelu(x))

    return net(forward, one=conv(3), bn=nn.BatchNorm2d(4), two=conv(), three=conv(), four=conv())


def shared(act=nn.ReLU):
    def forward(self, x):
        x = self.act(self.bn(self.one(x)))
        return self.four(self.act(self.three(self.act(self.two(x)) + x)))

    return net(forward, one=conv(3), bn=nn.BatchNorm2d(4), two=conv(), three=conv(), four=conv(), act=act())


def by_hand():
    def forward(self, x):
        x = self.one(x)
        x = x * torch.sigmoid(x)
        x = self.two(x)
        x *= torch.sigmoid(x)
        x = self.three(x)
        return self.four(x * F.relu6(x + 3) / 6)

    return net(forward, one=conv(3), two=conv(), three=conv(), four=conv())


def preactivated(inplace=True):
    """The shortcut reads the memory that the first ReLU overwrites, and no return value of it."""

    def forward(self, x):
        x = self.stem(x)
        self.act1(x)
        y = self.two(self.act2(self.bn(self.one(x))))
        y = y + x
        F.relu_(y)
        return self.three(y) + y

    parts = {"one": conv(), "two": conv(), "three": conv(), "bn": nn.BatchNorm2d(4)}
    parts |= {"act1": nn.ReLU(inplace), "act2": nn.ReLU(inplace)}
    return net(forward, stem=nn.Sequential(conv(3), nn.BatchNorm2d(4)), **parts)


class Bend(nn.Module):
    """An activation of somebody's own."""

    def forward(self, x):
        return x * torch.tanh(F.softplus(x))


def moving():
    """Units that end without an activation: in a Sequential, and in a forward."""

    def forward(self, x):
        x = self.body(x)
        return self.out(self.four(F.relu(self.three(x))) + x)

    body = nn.Sequential(conv(3), nn.GELU(), conv(), nn.BatchNorm2d(4))
    return net(forward, body=body, three=conv(), four=conv(), out=conv())


def norm_act():
    return timm.create_model("mobilenetv2_035")


def torchvision_resnet():
    return torchvision.models.resnet18()


NETS = {
    "modules": plain,
    "in place": lambda: plain(lambda: nn.ReLU(True)),
    "prelu": lambda: plain(nn.PReLU),
    "silu in place": lambda: plain(lambda: nn.SiLU(True), nn.Softplus),
    "timm's": lambda: plain(timm.layers.Mish, timm.layers.GELU),
    "somebody's": lambda: plain(Bend),
    "functional": functional,
    "shared": shared,
    "shared in place": lambda: shared(lambda: nn.ReLU(True)),
    "shared prelu": lambda: shared(nn.PReLU),
    "by hand": by_hand,
    "preactivated": preactivated,
    "moving": moving,
    "norm and act": norm_act,
    "resnet of timm": lambda: timm.create_model("resnet18"),
    "preactivated resnet": lambda: timm.create_model("resnetv2_18"),
    "resnet of torchvision": torchvision_resnet,
}


def built(name):
    torch.manual_seed(0)
    model = NETS[name]()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    return model.eval()


def plan_of(model, **options):
    """A plan that drops or moves all that it can."""
    plan = nmconv.make_plan(model, "4:1", **options)
    more = {s.id: "drop" for s in plan.sites if s.is_real and not s.locked and s.action == "keep"}
    return plan.edit(more)


def pair(name, **options):
    """The original, the hard conversion, and the gradual one."""
    model = built(name)
    plan = plan_of(model, **options)
    assert plan.changes, plan
    soft = nmconv.apply_plan(model, plan, gradual=True)
    assert list(nmconv.get_slopes(soft)) == [site.id for site in plan.changes] or options
    assert set(nmconv.get_slopes(soft)) == {site.id for site in plan.changes}
    return model, nmconv.apply_plan(model, plan), soft


def picture(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def outcome(model, x, training=False, dtype=None):
    """What a step gives: the output, all gradients, and the buffers afterwards."""
    model = copy.deepcopy(model).train(training)
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(x)
    (output.float() ** 2).mean().backward()
    gradients = {"input": x.grad} | {name: value.grad for name, value in model.named_parameters()}
    buffers = {name: value for name, value in model.named_buffers() if "_nmconv_" not in name}
    return output.detach(), gradients, buffers


def same(found, expected):
    """Equal to the bit; a parameter that nobody reads has no gradient, or zeros."""
    assert found[0].dtype == expected[0].dtype
    assert equal(found[0], expected[0])
    for one, other in ((found[1], expected[1]), (found[2], expected[2])):
        assert one.keys() == other.keys()
        for name in one:
            if one[name] is None or other[name] is None:
                assert all(value is None or not value.any() for value in (one[name], other[name])), name
            else:
                assert equal(one[name], other[name]), name


def equal(one, other):
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) and torch.equal(one.isnan(), other.isnan())


# -- both ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relocate", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_both_ends_are_exact(name, relocate):
    model, hard, soft = pair(name, relocate=relocate)
    x = picture()
    assert list(soft.state_dict()) == list(model.state_dict())
    for training in (False, True):
        nmconv.set_slope(soft, 0)
        same(outcome(soft, x, training), outcome(model, x, training))
        nmconv.set_slope(soft, 1)
        same(outcome(soft, x, training), outcome(hard, x, training))
        nmconv.set_slope(soft, 0.5)
        output, gradients, _ = outcome(soft, x, training)
        assert not torch.equal(output, outcome(hard, x, training)[0])
        assert all(value is None or value.isfinite().all() for value in gradients.values())
