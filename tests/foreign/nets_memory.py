"""Forwards that remember, hook, alias, draw, write where others read, and call what is not a module of theirs."""

from __future__ import annotations

import random

import torch
from torch import nn

from .nets_questions import body
from .networks import Two, conv, network, quiet


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
