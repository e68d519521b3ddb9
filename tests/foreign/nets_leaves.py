"""Layers that are not what their class says, and what else stands between two convolutions or reads one."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from .networks import Two, conv, network, unit


class TwiceAsMuch(nn.Conv2d):
    """Its call does more than its forward."""

    def __call__(self, x):
        return super().__call__(x) * 2


class Standardised(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


@network(converts=False)
def convolutions_with_a_call_of_their_own():
    layers = [TwiceAsMuch(3, 4, 3, padding=1), nn.ReLU(), TwiceAsMuch(4, 4, 1), nn.ReLU(), conv(), nn.ReLU()]
    return nn.Sequential(*layers, TwiceAsMuch(4, 4, 1), conv(4, 4, 1))


@network(counts=(4, 2))
def standardised_convolutions():
    layers = [Standardised(3, 4, 3, padding=1), nn.ReLU(), Standardised(4, 4, 1), nn.ReLU()]
    return nn.Sequential(*layers, Standardised(4, 4, 3, padding=1), nn.ReLU(), conv(), nn.ReLU())


@network(converts=False)
def convolution_with_another_forward():
    model = nn.Sequential(conv(3), nn.ReLU(), conv(4, 4, 1), nn.ReLU(), conv(), conv(4, 4, 1))
    for at in (0, 4):
        forward = types.MethodType(lambda self, x: self._conv_forward(x, self.weight * 2, self.bias), model[at])
        model[at].forward = forward
    return model


class AlwaysTraining(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True)


@network(counts=(4, 2))
def norms_of_the_batch():
    def block(inputs, norm):
        return nn.Sequential(conv(inputs), norm, nn.ReLU())

    first, second = AlwaysTraining(4), nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(block(3, first), block(4, second), block(4, nn.BatchNorm2d(4, affine=False)), unit())


class Symmetric(nn.Module):
    def forward(self, weight):
        return (weight + weight.flip(-1)) / 2


@network(counts=(4, 2))
def parametrised():
    model = nn.Sequential(unit(3), unit(), unit(), unit())
    for block in model:
        parametrize.register_parametrization(block[0], "weight", Symmetric())
    return model


@network()
class ReadsWeights(Two):
    """Gives back a penalty besides."""

    def forward(self, x):
        y = self.q(self.b(self.r(self.a(x))))
        return y, self.a.weight.square().sum() + self.b.weight.abs().mean()


@network()
class UsesWeightsAgain(Two):
    """A decoder with the encoder's weights."""

    def forward(self, x):
        y = self.q(self.b(self.r(self.a(x))))
        return F.conv_transpose2d(F.conv_transpose2d(y, self.b.weight), self.a.weight, padding=1)


@network(counts=(2, 1))
class DropoutForever(Two):
    def forward(self, x):
        return self.q(self.b(F.dropout(self.r(self.a(x)), 0.3, training=True)))


@network()
class NoiseBetween(Two):
    def forward(self, x):
        y = self.r(self.a(x))
        return self.q(self.b(y + 0.1 * torch.randn_like(y)))


@network(converts=False)
class AutocastInside(Two):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.r(self.a(x))
        return self.q(self.b(y.to(x.dtype)))


@network(options=({"scale": 0.5}, {"scale": 1}, {"extras": [1.0, 2.0]}))
class NumbersAndLists(nn.Module):
    """A number and the length of a list decide what lies between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.c = nn.Sequential(unit(3), unit()), conv(), conv(4, 4, 1), conv(4, 4, 1)

    def forward(self, x, scale=1.0, extras=()):
        y = self.a(self.first(x))
        if scale != 1.0:
            y = y * scale
        y = self.b(y)
        for extra in extras:
            y = y + extra
        return self.c(y)


@network(settings=({"scaled": True}, {"mode": "more"}, {"repeats": 2}))
class AttributesDecide(nn.Module):
    """Attributes, set after merging, decide what lies between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.c = nn.Sequential(unit(3), unit()), conv(), conv(4, 4, 1), conv(4, 4, 1)
        self.scaled, self.mode, self.repeats = False, "less", 1

    def forward(self, x):
        y = self.a(self.first(x))
        if self.scaled:
            y = y * 2
        y = self.b(y)
        if self.mode == "more":
            y = y + 1
        for _ in range(self.repeats):
            y = self.c(y)
        return y


@network(methods=("forward_features", "forward_intermediates"), merges=True)
class EntryPoints(nn.Module):
    """timm's other ways in: what they give is what they gave, or they say that they cannot."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([unit(3), unit(4, 4, 1), unit(), unit(4, 6, 1)])
        self.head = nn.Linear(6, 2)

    def forward_intermediates(self, x):
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def forward_features(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


@network(converts=False)
class HookOnAConvolution(nn.Module):
    """What a hook on a convolution inside a run keeps is read later."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.kept = conv(3), conv(4, 4, 1), conv(8, 4), {}
        self.a.register_forward_hook(Keep(self.kept))

    def forward(self, x):
        y = F.relu(self.b(self.a(x)))
        return F.relu(self.c(torch.cat([y, self.kept["last"]], 1)))


class Keep:
    def __init__(self, kept):
        self.kept = kept

    def __call__(self, module, args, output):
        self.kept["last"] = output.detach()


@network(converts=False)
class FallsBack(Two):
    """What real numbers raise, neither proxies nor meta tensors do."""

    def forward(self, x):
        y = self.a(x)
        try:
            torch.linalg.cholesky(-torch.eye(2, dtype=x.dtype) - x[0, 0, :2, :2] ** 2)
        except RuntimeError:
            y = y * 2
        return self.r(self.b(y))
