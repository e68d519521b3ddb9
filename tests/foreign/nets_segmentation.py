"""Segmentation and parallel branches: skips, exchanges, trees, octaves, sizes that are looked at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .networks import conv, network, unit


class UnetLevel(nn.Module):
    """pix2pix's: it begins in-place, so that the skip carries what was activated."""

    def __init__(self, inputs, inner, outer, below=None):
        super().__init__()
        self.outermost = below is not None and inputs == 3
        down = nn.Conv2d(inputs, inner, 4, 2, 1, bias=False)
        up = nn.ConvTranspose2d(inner * (1 if below is None else 2), outer, 4, 2, 1, bias=False)
        if self.outermost:
            layers = [down, below, nn.ReLU(True), up, nn.Tanh()]
        elif below is None:
            layers = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, nn.BatchNorm2d(outer)]
        else:
            norm = nn.BatchNorm2d(inner)
            layers = [nn.LeakyReLU(0.2, True), down, norm, below, nn.ReLU(True), up, nn.BatchNorm2d(outer)]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


def pix2pix_sizes(batch, size):
    return (torch.randn(batch, 3, size, size),)


@network(pix2pix_sizes, sizes=(32, 40))
def pix2pix_unet():
    return UnetLevel(3, 4, 3, UnetLevel(4, 4, 4, UnetLevel(4, 4, 4)))


@network(counts=(4, 2), merges=True)
class InplaceSkip(nn.Module):
    """The skip is taken before an activation that overwrites it."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Sequential(unit(3), conv()), nn.Sequential(unit(8, 4), unit())
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.stem(x)
        skip = x
        return self.last(torch.cat([self.act(x), skip], 1))


class Exchange(nn.Module):
    """HRNet: every resolution hears of every other."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(unit(), unit()) for _ in range(2))
        up = nn.Sequential(conv(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Upsample(scale_factor=2))
        down = nn.Sequential(conv(stride=2, bias=False), nn.BatchNorm2d(4))
        self.fuse = nn.ModuleList([nn.ModuleList([None, up]), nn.ModuleList([down, None])])
        self.relu = nn.ReLU()

    def forward(self, x):
        x = [branch(each) for branch, each in zip(self.branches, x, strict=True)]
        fused = []
        for i in range(len(self.fuse)):
            y = x[0] if i == 0 else self.fuse[i][0](x[0])
            for j in range(1, len(x)):
                y = y + (x[j] if i == j else self.fuse[i][j](x[j]))
            fused.append(self.relu(y))
        return fused


def even(batch, size):
    return (torch.randn(batch, 3, size, size),)


@network(even, sizes=(16, 12), merges=True)
class HrNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Sequential(unit(3), unit()), unit(stride=2)
        self.stages, self.head = nn.ModuleList([Exchange()]), conv(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        x = [x, self.down(x)]
        for stage in self.stages:
            x = stage(x)
        return self.head(x[0] + F.interpolate(x[1], x[0].shape[2:], mode="bilinear", align_corners=False))


class Root(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.conv, self.bn, self.relu = conv(inputs, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, *x):
        y = self.bn(self.conv(torch.cat(x, 1)))
        y += x[0]
        return self.relu(y)


class Basic(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.c1, self.n1, self.c2, self.n2 = conv(stride=stride), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, residual=None):
        residual = x if residual is None else residual
        y = self.relu(self.n1(self.c1(x)))
        y = self.n2(self.c2(y))
        y += residual
        return self.relu(y)


class Tree(nn.Module):
    def __init__(self, levels, more=0, stride=1):
        super().__init__()
        self.levels = levels
        self.root = Root(8 + more) if levels == 1 else None
        self.one = Basic(stride) if levels == 1 else Tree(levels - 1, stride=stride)
        self.two = Basic() if levels == 1 else Tree(levels - 1, more=4)
        self.shrink = nn.MaxPool2d(stride, stride) if stride > 1 else None

    def forward(self, x, residual=None, children=None):
        children = [] if children is None else children
        bottom = self.shrink(x) if self.shrink else x
        one = self.one(x, bottom)
        if self.levels == 1:
            return self.root(self.two(one), one, *children)
        children.append(one)
        return self.two(one, children=children)


@network(even, sizes=(16, 12))
def dla():
    return nn.Sequential(unit(3), Tree(2, stride=2), conv(4, 2, 1))


class Octave(nn.Module):
    """Two frequencies, in a tuple or not."""

    def __init__(self, inputs=4, low_in=True, low_out=True):
        super().__init__()
        self.hh, self.hl = conv(inputs), conv(inputs) if low_out else None
        self.lh, self.ll = conv() if low_in else None, conv() if low_in and low_out else None
        self.norm, self.low_norm, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        high, low = x if isinstance(x, tuple) else (x, None)
        y = self.hh(high)
        z = self.hl(F.avg_pool2d(high, 2)) if self.hl is not None else None
        if low is not None:
            y = y + F.interpolate(self.lh(low), scale_factor=2)
            z = z + self.ll(low) if z is not None else None
        y = self.relu(self.norm(y))
        return y if z is None else (y, self.relu(self.low_norm(z)))


@network(even, sizes=(16, 12), converts=False)
def octave():
    return nn.Sequential(Octave(3, low_in=False), Octave(), Octave(), Octave(low_out=False), unit(), unit())


class UpCat(nn.Module):
    """MONAI's: it asks torch.jit what it was given (fault B)."""

    def __init__(self, skips):
        super().__init__()
        self.up, self.c1, self.c2 = nn.ConvTranspose2d(4, 4, 2, 2), conv(8 if skips else 4, 4), conv()
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x, extra):
        y = self.up(x)
        if extra is not None and torch.jit.isinstance(extra, torch.Tensor):
            y = torch.cat([extra, y], 1)
        return self.act(self.c2(self.act(self.c1(y))))


# It is refused: the trace takes another way (fault B). Reading by recording mends that.
@network(even, sizes=(16, 12), converts=False)
class BasicUnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.down = nn.Sequential(unit(3), unit()), nn.Sequential(nn.MaxPool2d(2), unit(), unit())
        self.one, self.two = UpCat(True), UpCat(False)

    def forward(self, x):
        x = self.enter(x)
        return self.two(self.one(self.down(x), x), None)


def with_extra(batch, size):
    return torch.randn(batch, 3, size, size), torch.randn(batch, 4, size, size)


@network(with_extra, given=True, options=({"scale": 2.0},))
class AskedOfTorchScript(nn.Module):
    """Fault B at its shortest."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Sequential(unit(3), unit()), conv(), conv(4, 4, 1)

    def forward(self, x, e, scale=1.0):
        y = self.a(self.first(x))
        if torch.jit.isinstance(e, torch.Tensor):
            y = y + e
        return self.b(y) * scale


@network(with_extra, converts=False)
def asked_of_torchscript_without_examples():
    return AskedOfTorchScript()


@network(counts=(6, 3), merges=True)
class PaddedUnet(nn.Module):
    """Pads what came up to the size of the skip."""

    def __init__(self):
        super().__init__()
        self.enter, self.down, self.last = nn.Sequential(unit(3), unit()), nn.Sequential(unit(), unit()), unit(8, 4)
        self.out = unit()

    def forward(self, x):
        skip = self.enter(x)
        y = F.interpolate(self.down(F.max_pool2d(skip, 2)), scale_factor=2)
        if y.shape != skip.shape:
            dh, dw = skip.shape[2] - y.shape[2], skip.shape[3] - y.shape[3]
            y = F.pad(y, [dw // 2, dw - dw // 2, dh // 2, dh - dh // 2])
        return self.out(self.last(torch.cat([skip, y], 1)))


class Aspp(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([unit(4, 4, 1), unit(dilation=2, padding=2), unit(dilation=3, padding=3)])
        self.pool, self.project = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(4, 4, 1), nn.ReLU()), unit(16, 4, 1)

    def forward(self, x):
        y = [c(x) for c in self.convs]
        y.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.project(torch.cat(y, dim=1))


@network(merges=True, options=({"aux": True},))
class DeepLab(nn.Module):
    """Hands a flag on to a child, and back goes an ordered dict (fault F)."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid = nn.Sequential(unit(3), unit()), Middle()
        self.aspp, self.last = Aspp(), nn.Sequential(unit(), conv(4, 2, 1))

    def forward(self, x, aux=False):
        y = self.mid(self.stem(x), aux)
        y, extra = y if aux else (y, None)
        found = {"out": F.interpolate(self.last(self.aspp(y)), size=x.shape[-2:])}
        return found if extra is None else {**found, "aux": extra}


class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.b, self.c, self.d = conv(), conv(4, 4, 1), unit()

    def forward(self, x, aux):
        x = self.b(x)
        if aux:
            return self.d(x), x
        return self.d(self.c(x))
