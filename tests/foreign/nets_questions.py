"""Forwards that ask: about classes, contexts, devices, sizes, data, and what they were given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import Two, conv, network, unit


def body():
    """Four convolutions that merge in pairs once converted."""
    return nn.Sequential(conv(3), nn.ReLU(), conv(4, 4, 1), nn.ReLU(), conv(), nn.ReLU(), conv(4, 4, 1), nn.ReLU())


@network(converts=False)
class CountsActivations(nn.Module):
    """Fault A: what it computes goes by how many ReLUs it met."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv())

    def forward(self, x):
        met = 0
        for m in self.f:
            x = m(x)
            met += isinstance(m, nn.ReLU)
        return x / met


@network(converts=False)
class CountsInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = body()

    def forward(self, x):
        x = self.f(x)
        return x * sum(isinstance(m, nn.ReLU) for m in self.modules()) if self.training else x


@network(converts=False)
class CountsBySettings(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = body()

    def forward(self, x):
        return self.f(x) + str(self).count("ReLU") + sum(hasattr(m, "inplace") for m in self.f)


@network(converts=False)
class AsksTheActivation(Two):
    """Uses what an activation says of itself."""

    def forward(self, x):
        y = self.r(self.a(x))
        gain = 2.0 if type(self.r) is nn.ReLU else 1.0
        return self.q(self.b(y * gain))


@network(converts=False)
class TriesTheActivation(Two):
    def forward(self, x):
        y = self.r(self.a(x))
        try:
            y = y * (2 - self.r.inplace)
        except AttributeError:
            y = y + 1
        return self.q(self.b(y))


@network(converts=False, picky=True)
class ListOnly(nn.Module):
    """Fault C: the Sequential is a list here; nobody calls it."""

    def __init__(self):
        super().__init__()
        self.l = nn.Sequential(conv(3), conv(4, 4, 1), nn.BatchNorm2d(4), conv())

    def forward(self, x):
        if x.mean() > 9:
            x = -x
        for m in self.l:
            x = F.relu(m(x))
        return x


@network(converts=False, picky=True)
class AsksTheContext(Two):
    """Fault G."""

    def forward(self, x):
        y = self.a(x)
        if not torch.is_grad_enabled():
            y = y * 2
        if torch.is_autocast_enabled("cpu"):
            y = y * 3
        return self.r(self.b(y))


@network(converts=False, picky=True)
class AsksForGradients(Two):
    def forward(self, x):
        y = self.r(self.a(x))
        y = y * 2 if y.requires_grad else y
        return self.q(self.b(y))


@network(converts=False)
class AsksTheDevice(Two):
    def forward(self, x):
        y = self.a(x)
        if x.device.type == "cpu":
            y = self.r(y)
        if not (x.is_cuda or x.is_meta):
            y = y + 1
        return self.q(self.b(y))


@network(converts=False)
class TypeOfASize(Two):
    def forward(self, x):
        h = x.shape[2]
        y = self.r(self.a(x))
        return self.q(self.b(y * 2 if type(h) is int else y))


@network(converts=False, picky=True)
class RangeOfASize(Two):
    def forward(self, x):
        y = self.r(self.a(x))
        for _ in range(int(x.shape[3] / 4)):
            y = y + 0.5
        return self.q(self.b(y))


@network(converts=False, picky=True)
class LargeOnes(Two):
    def forward(self, x):
        y = self.a(x)
        if y.shape[-1] > 15:
            y = F.relu(y)
        return self.q(self.b(y)) if len(x) % 2 == 0 else self.b(y)


@network(converts=False, picky=True)
class GoesByData(Two):
    def forward(self, x):
        y = self.r(self.a(x))
        y = y[y.mean((1, 2, 3)) > -1] if y.max() > 0 else y * 0
        return self.q(self.b(y * y.max().item()))


def with_extra(batch, size):
    return torch.randn(batch, 3, size, size), torch.randn(batch, 4, size, size)


@network(with_extra, given=True, converts=False, options=({"stop": True},))
class ClassOfATensor(Two):
    """Fault B in other words."""

    def forward(self, x, e, stop=False):
        y = self.a(x)
        if e.__class__ is Tensor:
            y = y + e
        if stop or type(y) is not Tensor:
            return y
        return self.r(self.b(y))


@network(converts=False)
class FreezesItself(nn.Module):
    """Changes modes while it runs, as frozen stages do."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Sequential(unit(3), unit()), nn.Sequential(unit(), unit())

    def forward(self, x):
        was = self.stem.training
        self.stem.eval()
        with torch.no_grad():
            x = self.stem(x)
        self.stem.train(was)
        return self.body(x)
