"""Classifiers and what grew out of them: shared gates, slices, settings that decide, sequences after convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .networks import conv, network, unit


class LightConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.bn = conv(4, 4, 1, bias=False), conv(groups=4, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.conv2(self.conv1(x))))


class SharedGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), conv(4, 2, 1), conv(2, 4, 1)
        self.relu, self.gate_activation = nn.ReLU(inplace=True), nn.Sigmoid()

    def forward(self, x):
        return x * self.gate_activation(self.fc2(self.relu(self.fc1(self.pool(x)))))


class OsBlock(nn.Module):
    """OSNet: streams of several depths, one gate for all of them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv3 = unit(), nn.Sequential(conv(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.a, self.b = LightConv(), nn.Sequential(LightConv(), LightConv())
        self.gate, self.relu = SharedGate(), nn.ReLU(inplace=True)

    def forward(self, x):
        x1 = self.conv1(x)
        return self.relu(self.conv3(self.gate(self.a(x1)) + self.gate(self.b(x1))) + x)


@network(merges_plain=True)
def osnet():
    return nn.Sequential(unit(3), unit(), OsBlock(), OsBlock(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


class Ghost(nn.Module):
    """GhostNet: half of the maps are cheap, and a slice takes what is wanted."""

    def __init__(self, inputs, outputs, act=True):
        super().__init__()
        self.outputs, half = outputs, (outputs + 1) // 2
        acts = [nn.ReLU() if act else nn.Sequential() for _ in range(2)]
        self.primary = nn.Sequential(conv(inputs, half, 1, bias=False), nn.BatchNorm2d(half), acts[0])
        self.cheap = nn.Sequential(conv(half, half, groups=half, bias=False), nn.BatchNorm2d(half), acts[1])

    def forward(self, x):
        x1 = self.primary(x)
        return torch.cat([x1, self.cheap(x1)], dim=1)[:, : self.outputs, :, :]


class GhostBottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.ghost1, self.ghost2 = Ghost(4, 7), Ghost(7, 4, act=False)

    def forward(self, x):
        return self.ghost2(self.ghost1(x)) + x


@network()
def ghostnet():
    return nn.Sequential(unit(3), unit(), GhostBottleneck(), GhostBottleneck(), unit(4, 6, 1))


@network()
class SlicedBranch(nn.Module):
    """Fault K's shape: a residual branch that ends in a slice."""

    def __init__(self):
        super().__init__()
        self.stem, self.p, self.b = unit(3), unit(), unit()

    def forward(self, x):
        x = self.stem(x)
        p = self.p(x)
        return torch.cat([p, self.b(p)], 1)[:, :4] + x


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.act = nn.Sequential(unit(), conv(), nn.BatchNorm2d(4)), nn.ReLU()

    def forward(self, x):
        return self.act(self.body(x) + x)


@network(counts=(6, 3), merges=True)
def residual():
    """Fault Q's shape: branches that a search may leave out. Chains of two: the stem, and each branch with its sum."""
    return nn.Sequential(unit(3), unit(), Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@network(counts=(4, 2), merges=True)
class Crnn(nn.Module):
    """Columns of a picture as a sequence."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(unit(3), unit(), nn.MaxPool2d((2, 1)), unit(), unit())
        self.rnn, self.fc = nn.LSTM(4, 3, bidirectional=True), nn.Linear(6, 5)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(self.cnn(x), (1, None)).squeeze(2).permute(2, 0, 1)
        self.rnn.flatten_parameters()
        y, _ = self.rnn(y)
        steps, batch, features = y.size()
        return F.log_softmax(self.fc(y.reshape(steps * batch, features)).view(steps, batch, -1), 2)


class HfLayer(nn.Module):
    def __init__(self, inputs=4):
        super().__init__()
        self.convolution, self.normalization, self.activation = conv(inputs), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, hidden_state):
        return self.activation(self.normalization(self.convolution(hidden_state)))


class Hf(nn.Module):
    """Hugging Face's way: everything is optional, and an ordered dict comes back (fault L)."""

    def __init__(self):
        super().__init__()
        self.num_channels = 3
        self.layers = nn.ModuleList([HfLayer(3), HfLayer(), HfLayer(), HfLayer()])

    def forward(self, pixel_values=None, output_hidden_states=None, return_dict=None):
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError("Make sure that the channel dimension of the pixel values match the configuration.")
        states = ()
        for layer in self.layers:
            states = (*states, pixel_values) if output_hidden_states else None
            pixel_values = layer(pixel_values)
        if return_dict is False:
            return (pixel_values, states) if states is not None else (pixel_values,)
        return {"last_hidden_state": pixel_values, "hidden_states": states}


HF_OPTIONS = (
    {"output_hidden_states": True},
    {"return_dict": False},
    {"output_hidden_states": True, "return_dict": False},
)


@network(given=True, options=HF_OPTIONS, counts=(4, 2))
def hugging_face():
    return Hf()


@network(options=HF_OPTIONS, converts=False)
def hugging_face_without_examples():
    return Hf()


class RepVgg(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.id = nn.BatchNorm2d(channels)
        self.dense = nn.Sequential(conv(bias=False), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(conv(4, 4, 1, bias=False), nn.BatchNorm2d(channels))
        self.act = nn.ReLU()

    def forward(self, x):
        if self.id is None:
            return self.act(self.dense(x) + self.point(x))
        return self.act(self.dense(x) + self.point(x) + self.id(x))


@network(counts=(5, 3), merges=True, merges_plain=True)
def repvgg():
    return nn.Sequential(unit(3), RepVgg(), RepVgg(), RepVgg(), RepVgg(), nn.Flatten(2))


@network(counts=(4, 2), merges=True)
class Flattened(nn.Module):
    """Functional activations in a loop, and one that is a method."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(3), conv(), conv(), conv()])

    def forward(self, x):
        for at, c in enumerate(self.convs):
            x = c(x).relu() if at % 2 else F.relu(c(x), inplace=at > 1)
        return x.flatten(1).sum(1)


@network()
class Squeezed(nn.Module):
    """SqueezeNet's fire and a squeeze-excite, whose activation is a gate's."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.one, self.three = unit(3, 4, 1), unit(4, 4, 1), unit()
        self.se, self.last = nn.Sequential(conv(8, 2, 1), nn.SiLU(), conv(2, 8, 1)), nn.Sequential(unit(8, 4), unit())

    def forward(self, x):
        x = self.squeeze(x)
        x = torch.cat((self.one(x), self.three(x)), 1)
        return self.last(x * self.se(x.mean((2, 3), keepdim=True)).sigmoid())


@network(converts=False)
class ByHand(nn.Module):
    """Fault M's shape: activations made by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3), conv(), conv()

    def forward(self, x):
        x = self.a(x)
        x = self.b(x * torch.sigmoid(x))
        return self.c(x * (x > 0)).clamp_min(0)


@network(converts=False)
class SizesOneByOne(nn.Module):
    """Fault J's shape: sizes as arguments of their own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(unit(3), unit(), unit(), unit())

    def forward(self, x):
        b, _, h, w = x.shape
        y = self.body(torch.as_tensor(x)) + torch.zeros(b, 4, h, w, dtype=x.dtype)
        return F.interpolate(y, size=(round(h * 0.5), round(w * 0.5))) * torch.tensor([0.5, h]).sum()
