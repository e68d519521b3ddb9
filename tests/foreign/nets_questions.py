"""Forwards that ask: about devices, sizes, modes, classes, data; and those that remember, hook, alias and draw."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import Two, conv, network, quiet, unit


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


@network(converts=False)
class HookKeepsALater(nn.Module):
    """Fault E: a hook keeps what a dropped activation gave, and a concat reads it."""

    def __init__(self):
        super().__init__()
        self.body, self.last, self.kept = body(), conv(8, 4), []
        self.body[1].register_forward_hook(Keep(self.kept))

    def forward(self, x):
        self.kept.clear()
        y = self.body(x)
        return self.last(torch.cat([y, self.kept.pop()], 1))


class Keep:
    def __init__(self, kept):
        self.kept = kept

    def __call__(self, module, args, output):
        self.kept.append(output)


@network(converts=False, copies=False)
class HookOfAClosure(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kept = body(), []
        self.body[3].register_forward_hook(lambda module, args, output: self.kept.append(output))

    def forward(self, x):
        self.kept.clear()
        return self.body(x) + self.kept[-1]


@network(converts=False)
class HookThatChanges(Two):
    def prepare(self):
        self.r.register_forward_hook(twice)
        self.b.register_forward_pre_hook(one_more)

    def forward(self, x):
        return self.q(self.b(self.r(self.a(x))))


def twice(module, args, output):
    return output * 2


def one_more(module, args):
    return (args[0] + 1,)


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


@network(converts=False, copies=False)
class Closure(Two):
    def prepare(self):
        a, r = self.a, self.r
        self.enter = lambda x: r(a(x))

    def forward(self, x):
        return self.q(self.b(self.enter(x)))


@network(converts=False)
class BoundMethod(Two):
    def prepare(self):
        self.enter = self.first

    def first(self, x):
        return self.r(self.a(x))

    def forward(self, x):
        return self.q(self.b(self.enter(x)))


@network(converts=False)
class DictCache(Two):
    def prepare(self):
        self.cache = {}

    def forward(self, x):
        key = x.shape[-2], x.shape[-1], f"{x.dtype}"
        if key not in self.cache:
            self.cache[key] = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        return self.q(self.b(self.r(self.a(x)) * self.cache[key]))


@network(converts=False)
def filled_dict_cache():
    model = DictCache()
    model(torch.zeros(1, 3, 16, 17))
    model(torch.zeros(1, 3, 224, 224))
    return model


@network(converts=False)
class FlagBuffer(Two):
    """ActNorm's: what the first batch sets."""

    def prepare(self):
        self.register_buffer("init", torch.tensor(False))
        self.register_buffer("scale", torch.ones(1, 4, 1, 1))

    def forward(self, x):
        y = self.r(self.a(x))
        if not self.init:
            self.scale.copy_(y.detach().amax((0, 2, 3), keepdim=True) + 0.5)
            if self.training:
                self.init.fill_(True)
        return self.q(self.b(y / self.scale))


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


@network(converts=False)
class OverwritesAView(nn.Module):
    """What an activation gave is overwritten through a view; its input is read later."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3), conv(), conv(4, 4, 1)
        self.r, self.q, self.p = nn.SiLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.a(x)
        z = self.r(self.b(y))
        view = z.view(z.shape[0], 2, -1)
        view[:, 0].mul_(0.5).add_(1)
        return self.p(self.c(self.q(z))) + y


@network(converts=False)
class OverwritesWhatItGot(Two):
    def prepare(self):
        self.r = nn.SiLU()

    def forward(self, x):
        y = self.a(x)
        z = self.r(y)
        z[:, :2] = 0
        return self.q(self.b(z)) + y.mean()


def swish(x):
    return x * torch.sigmoid(x)


with quiet():  # torch.jit is on its way out
    swish = torch.jit.script(swish)


@network(converts=False)
class ScriptedFunction(Two):
    def forward(self, x):
        return self.q(self.b(swish(self.r(self.a(x)))))


@network(converts=False)
class WritesOut(Two):
    def forward(self, x):
        y = self.r(self.a(x)).detach()
        z = torch.empty_like(y)
        torch.add(y, 1, out=z)
        return self.q(self.b(z))


@network(converts=False, picky=True)
class PythonsRandom(nn.Module):
    """Stochastic depth by Python's generator."""

    def __init__(self):
        super().__init__()
        self.body, self.more = body(), nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())

    def forward(self, x):
        x = self.body(x)
        if self.training and random.random() < 0.5:
            return x
        return self.more(x) * (1 + random.random())


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
class RemembersTheLast(Two):
    def forward(self, x):
        y = self.r(self.a(x))
        self.last = y.detach()
        self.steps = getattr(self, "steps", 0) + 1
        return self.q(self.b(y)) + self.last.mean()


@network(converts=False)
class ByHandForwards(Two):
    def forward(self, x):
        return nn.ReLU.forward(self.q, self.b.forward(self.r.forward(self.a(x))))


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


@network(converts=False)
class OwnGradient(Two):
    def forward(self, x):
        return self.q(self.b(Scaled.apply(self.r(self.a(x)))))


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.5

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


@network(converts=False)
class OtherWeights(Two):
    def forward(self, x):
        weights = {"weight": self.b.weight * 2, "bias": self.b.bias}
        return self.q(torch.func.functional_call(self.b, weights, (self.r(self.a(x)),)))
