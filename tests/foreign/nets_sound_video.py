"""Sound and video: weight norm old and new, masks of lengths, checkpoints, lists of clips, shifts in time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

from .networks import clip, network, sound


class Chomp(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, inputs, dilation, norm):
        super().__init__()
        pad = 2 * dilation
        self.conv1 = norm(nn.Conv1d(inputs, 4, 3, padding=pad, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(4, 4, 3, padding=pad, dilation=dilation))
        parts = (self.conv1, Chomp(pad), nn.ReLU(), nn.Dropout(0.2), self.conv2, Chomp(pad), nn.ReLU(), nn.Dropout(0.2))
        self.net, self.relu = nn.Sequential(*parts), nn.ReLU()
        self.downsample = nn.Conv1d(inputs, 4, 1) if inputs != 4 else None

    def forward(self, x):
        return self.relu(self.net(x) + (x if self.downsample is None else self.downsample(x)))


def old_norm(layer):
    return nn.utils.weight_norm(layer)


def new_norm(layer):
    return nn.utils.parametrizations.weight_norm(layer)


@network(sound(2), given=True, converts=False, copies=False)
def tcn_with_the_old_weight_norm():
    return nn.Sequential(TemporalBlock(2, 1, old_norm), TemporalBlock(4, 2, old_norm))


@network(sound(2), given=True, converts=False)
def tcn_with_the_new_weight_norm():
    return nn.Sequential(TemporalBlock(2, 1, new_norm), TemporalBlock(4, 2, new_norm))


class WaveNet(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.start = norm(nn.Conv1d(1, 4, 1))
        self.dilated = nn.ModuleList(norm(nn.Conv1d(4, 8, 3, padding=2**at, dilation=2**at)) for at in range(3))
        self.skips = nn.ModuleList(norm(nn.Conv1d(4, 8, 1)) for _ in range(3))
        self.last = nn.Sequential(nn.ReLU(), norm(nn.Conv1d(4, 4, 1)), nn.ReLU(), norm(nn.Conv1d(4, 2, 1)))

    def forward(self, x):
        x, total = self.start(x), 0
        for dilated, skip in zip(self.dilated, self.skips, strict=True):
            a, b = dilated(x).chunk(2, dim=1)
            r, s = skip(torch.tanh(a) * torch.sigmoid(b)).chunk(2, dim=1)
            x, total = x + r, total + s
        return self.last(total)


@network(sound(), given=True, converts=False, copies=False)
def wavenet_with_the_old_weight_norm():
    return WaveNet(old_norm)


@network(sound(), given=True, converts=False)
def wavenet_with_the_new_weight_norm():
    return WaveNet(new_norm)


class MaskedConv(nn.Conv1d):
    """QuartzNet's: beyond a sound's end everything is nothing."""

    def forward(self, x, lens):
        mask = torch.arange(x.shape[-1], device=x.device)[None, :] >= lens[:, None]
        x = super().forward(x.masked_fill(mask[:, None, :], 0))
        lens = (lens + 2 * self.padding[0] - self.dilation[0] * (self.kernel_size[0] - 1) - 1) // self.stride[0] + 1
        return x, lens


class Quartz(nn.Module):
    def __init__(self):
        super().__init__()
        depth, point = MaskedConv(2, 2, 3, padding=1, groups=2), MaskedConv(2, 4, 1)
        more = MaskedConv(4, 4, 3, padding=1)
        self.mconv = nn.ModuleList(
            [depth, point, nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.1), more, nn.BatchNorm1d(4), nn.ReLU()]
        )

    def forward(self, x, lens):
        for layer in self.mconv:
            if isinstance(layer, MaskedConv):
                x, lens = layer(x, lens)
            else:
                x = layer(x)
        return x, lens


def masked(batch, size):
    return torch.randn(batch, 2, 2 * size), torch.arange(batch) * 3 + size


@network(masked, given=True, converts=False)
def quartznet():
    return Quartz()


@network(sound(), given=True, counts=(4, 2))
class SoundClassifier(nn.Module):
    """M5, one channel of samples."""

    def __init__(self):
        super().__init__()
        layers = []
        for at in range(4):
            layers += [nn.Conv1d(4 if at else 1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU()]
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return F.log_softmax(self.body(x).mean(-1), dim=1)


def factored(inputs=4):
    space, time = nn.Conv3d(inputs, 4, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))
    return nn.Sequential(space, nn.BatchNorm3d(4), nn.ReLU(), time)


class R2Plus1d(nn.Module):
    """R(2+1)D, its blocks computed again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Sequential(factored(3), nn.BatchNorm3d(4), nn.ReLU())
        self.block = nn.Sequential(factored(), nn.BatchNorm3d(4), nn.ReLU(), factored(), nn.BatchNorm3d(4))
        self.relu, self.fc = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        y = checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.fc(self.relu(x + y).mean((2, 3, 4)))


@network(clip(), given=True, counts=(6, 3), sizes=(8, 7))
def r2plus1d_checkpointed():
    return R2Plus1d(False)


@network(clip(), given=True, counts=(6, 3), sizes=(8, 7))
def r2plus1d_checkpointed_reentrant():
    return R2Plus1d(True)


@network(counts=(3, 2), merges=True)
class CheckpointedLambda(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3 if at == 0 else 4, 4, 3, padding=1) for at in range(3))
        self.r, self.s, self.t = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = checkpoint.checkpoint(lambda y: self.s(self.b(self.r(self.a(y)))), x, use_reentrant=False)
        return self.t(self.c(x))


def two_speeds(batch, size):
    return ([torch.randn(batch, 3, 2, size, size), torch.randn(batch, 3, 8, size, size)],)


@network(two_speeds, given=True, sizes=(8, 7), converts=False)
class SlowFast(nn.Module):
    """Two clips in a list, which the network changes."""

    def __init__(self):
        super().__init__()
        self.slow = nn.ModuleList([self.stage(3), self.stage(8)])
        self.fast = nn.ModuleList([self.stage(3), self.stage(4)])
        self.lateral = nn.Conv3d(4, 4, (5, 1, 1), (4, 1, 1), (2, 0, 0))

    def stage(self, inputs):
        one, two = nn.Conv3d(inputs, 4, 3, padding=1), nn.Conv3d(4, 4, 1)
        return nn.Sequential(one, nn.BatchNorm3d(4), nn.ReLU(), two, nn.BatchNorm3d(4), nn.ReLU())

    def forward(self, x):
        x[0], x[1] = self.slow[0](x[0]), self.fast[0](x[1])
        x[0] = torch.cat([x[0], self.lateral(x[1])], 1)
        x = [self.slow[1](x[0]), self.fast[1](x[1])]
        return torch.cat([each.mean((2, 3, 4)) for each in x], 1)


@network(clip(), given=True, sizes=(8, 7), converts=False)
class TemporalShift(nn.Module):
    """TSM: writes into slices of a tensor of zeros."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3 if at == 0 else 4, 4, 3, padding=1) for at in range(3))

    def shift(self, x):
        out = torch.zeros_like(x)
        out[:-1, :1], out[1:, 1:2], out[:, 2:] = x[1:, :1], x[:-1, 1:2], x[:, 2:]
        return out

    def forward(self, x):
        b, c, t, h, w = x.size()
        x = F.relu(self.a(x.transpose(1, 2).reshape(b * t, c, h, w)))
        return F.relu(self.c(self.shift(F.relu(self.b(self.shift(x)))))).view(b, t, -1).mean(1)
