"""Generators, critics and losses: domains and time by argument, norms of weights, features picked on the way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .networks import conv, image, network, unit

DOMAINS = ({"domain": "photo"}, {"domain": "sketch"})


class DomainBlock(nn.Module):
    """A norm for each domain, chosen by argument (fault F)."""

    def __init__(self, inputs=4):
        super().__init__()
        self.c, self.act = conv(inputs, 4), nn.ReLU()
        self.n = nn.ModuleDict({"photo": nn.BatchNorm2d(4), "sketch": nn.BatchNorm2d(4)})

    def forward(self, x, domain):
        return self.act(self.n[domain](self.c(x)))


@network(options=DOMAINS, counts=(4, 2))
class DomainNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([DomainBlock(3), DomainBlock(), DomainBlock(), DomainBlock()])

    def forward(self, x, domain="photo"):
        for block in self.blocks:
            x = block(x, domain)
        return x


@network(options=DOMAINS)
class DomainNormOfTheRoot(nn.Module):
    """Fault F at its shortest."""

    def __init__(self):
        super().__init__()
        self.first, self.c, self.d = nn.Sequential(unit(3), unit()), conv(), conv(4, 4, 1)
        self.n = nn.ModuleDict({"photo": nn.BatchNorm2d(4), "sketch": nn.BatchNorm2d(4)})

    def forward(self, x, domain="photo"):
        return self.d(self.n[domain](self.c(self.first(x))))


@network(options=({"at": 0}, {"at": 1}, {"at": -1}))
class NormByIndex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.c, self.d = nn.Sequential(unit(3), unit()), conv(), conv(4, 4, 1)
        self.n = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Identity()])

    def forward(self, x, at=0):
        return self.d(self.n[at](self.c(self.first(x))))


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(), conv(4, 4, 1), conv(4, 4, 1)

    def forward(self, x, aux=False):
        x = self.a(x)
        if aux:
            return self.b(x)
        return self.c(x)


@network(options=({"aux": True},))
class FlagHandedOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.child, self.last = nn.Sequential(unit(3), unit()), Child(), conv(4, 4, 1)

    def forward(self, x, aux=False):
        return self.last(self.child(self.first(x), aux))


@network(options=({"stop": True},))
class StopsHalfway(nn.Module):
    """Fault P's shape: a way out between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Sequential(unit(3), unit()), conv(), conv(4, 4, 1)

    def forward(self, x, stop=False):
        y = self.a(self.first(x))
        if stop:
            return y
        return self.b(y)


class Mirrored(nn.Module):
    """CycleGAN's residual block."""

    def __init__(self):
        super().__init__()
        block = [nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(True), nn.Dropout(0.5)]
        self.conv_block = nn.Sequential(*block, nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4))

    def forward(self, x):
        return x + self.conv_block(x)


@network(image(), converts=True)
def cyclegan():
    down = [nn.Conv2d(4, 4, 3, 2, 1), nn.InstanceNorm2d(4), nn.ReLU(True)]
    up = [nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(4), nn.ReLU(True)]
    first = [nn.ReflectionPad2d(3), nn.Conv2d(3, 4, 7), nn.InstanceNorm2d(4), nn.ReLU(True)]
    return nn.Sequential(
        *first, *down, Mirrored(), Mirrored(), *up, nn.ReflectionPad2d(3), nn.Conv2d(4, 3, 7), nn.Tanh()
    )


def critic(norm):
    layers = [norm(conv(3, 4)), nn.LeakyReLU(0.2), norm(conv()), nn.LeakyReLU(0.2, True), norm(conv(4, 1))]
    return nn.Sequential(*layers)


@network(converts=False, copies=False)
def critic_with_the_old_spectral_norm():
    return critic(nn.utils.spectral_norm)


@network(converts=False)
def critic_with_the_new_spectral_norm():
    return critic(nn.utils.parametrizations.spectral_norm)


class Dense(nn.Module):
    """ESRGAN's dense block: concatenations all the way, one activation for all, a scaled residual."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(4, 2), conv(6, 2), conv(8, 4)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x):
        x1 = self.lrelu(self.conv1(x))
        x2 = self.lrelu(self.conv2(torch.cat((x, x1), 1)))
        return self.conv3(torch.cat((x, x1, x2), 1)) * 0.2 + x


@network()
class SuperResolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body, self.after = conv(3), nn.Sequential(Dense(), Dense()), conv()
        self.up, self.hr, self.last = conv(4, 16), conv(), conv(4, 3)
        self.shuffle, self.lrelu = nn.PixelShuffle(2), nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x):
        feature = self.first(x)
        feature = feature + self.after(self.body(feature))
        feature = self.lrelu(self.shuffle(self.up(feature)))
        return self.last(self.lrelu(self.hr(feature))) + F.interpolate(x, scale_factor=2)


def noisy(batch, size):
    return torch.randn(batch, 3, size, size), torch.arange(batch)


class TimeBlock(nn.Module):
    def __init__(self, inputs=4):
        super().__init__()
        self.a, self.b, self.skip = conv(inputs), conv(), conv(inputs, 4, 1)
        self.n, self.m, self.time = nn.GroupNorm(1, inputs), nn.GroupNorm(2, 4), nn.Linear(8, 4)

    def forward(self, x, emb):
        h = self.a(F.silu(self.n(x))) + self.time(F.silu(emb))[:, :, None, None]
        return self.skip(x) + self.b(F.silu(self.m(h)))


@network(noisy, given=True, converts=False, options=({"label": torch.tensor([1, 0])},))
class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.labels, self.blocks = nn.Embedding(2, 8), nn.ModuleList([TimeBlock(3), TimeBlock(), TimeBlock()])

    def forward(self, x, t, label=None):
        angles = t[:, None].to(x.dtype) * torch.exp(-torch.arange(4, dtype=x.dtype, device=x.device))
        emb = torch.cat([angles.sin(), angles.cos()], -1)
        if label is not None:
            emb = emb + self.labels(label)
        for block in self.blocks:
            x = block(x, emb)
        return x


class Perceptual(nn.Module):
    """Features behind the activations with these numbers; a count of ReLUs tells which (fault A)."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted = wanted
        self.features = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU())

    def forward(self, x):
        found, number = [], 0
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                number += 1
                if number in self.wanted:
                    found.append(x)
        return found


@network(converts=False)
def perceptual_loss():
    return Perceptual({2, 4})


@network(converts=False)
class PerceptualByName(nn.Module):
    """The same by the name of the class."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU())

    def forward(self, x):
        total = 0.0
        for layer in self.features:
            x = layer(x)
            if type(layer).__name__.endswith("ReLU"):
                total = total + x.abs().mean()
        return x, total
