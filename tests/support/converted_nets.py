"""Models of both zoos, and one written here, that conversion changes in each of its ways."""

import pytest
import torch
import torch.nn.functional as F
from oracle import dropped
from torch import nn
from zoo import models as zoo

import nmconv


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


# What replacing submodules converts, and what needs blocks rewritten.
SWAPPED = ("timm/resnet18", "timm/mobilenetv2_100", "timm/resnetv2_50", "timm/densenet121", "timm/repvgg_a0")


WRITTEN = ("torchvision/resnet18", "torchvision/googlenet", "timm/dla46x_c", "timm/legacy_seresnet18")


LIGHT = ("timm/resnet18", "timm/mobilenetv2_100", "torchvision/resnet18", "timm/dla46x_c", "net")


SURFACE = (*SWAPPED, *WRITTEN, "timm/efficientnet_lite0", "timm/levit_128s", "timm/hrnet_w18_small", "timm/regnety_002",
           "timm/inception_v4", "timm/efficientformer_l1", "torchvision/mobilenet_v3_small",
           "torchvision/inception_v3", "torchvision/densenet121", "torchvision/fcn_resnet50")  # fmt: skip


HEAVY = (
    "timm/efficientformer_l1",
    "timm/inception_v4",
    "timm/hrnet_w18_small",
    "torchvision/inception_v3",
    "torchvision/fcn_resnet50",
)


RUN = tuple(slow(name) if name in HEAVY else name for name in SURFACE)


class Block(nn.Module):
    """A shared activation called twice, a functional one, dropout by the flag, and a branch for training."""

    def __init__(self, width, act=nn.ReLU):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 1)
        self.act = act()
        self.scale = 2.0

    def forward(self, x, shortcut=None):
        """Three convolutions and a shortcut."""
        y = self.act(self.bn1(self.conv1(x)))
        y = F.dropout(y, 0.1, self.training)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.conv3(y) * self.scale
        if self.training:
            y = y * 1.0
        y += x if shortcut is None else shortcut
        return self.act(y)

    def describe(self):
        return f"{self.conv1.in_channels} wide"


class Net(nn.Module):
    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act(), nn.Conv2d(8, 8, 3, padding=1), act()
        )
        self.blocks = nn.ModuleList([Block(8, act), Block(8, act)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Activated(Net):
    def __init__(self):
        super().__init__(nn.PReLU)


def build(name, device="cpu"):
    torch.manual_seed(0)
    model = {"net": Net, "prelu": Activated}[name]() if name in ("net", "prelu") else zoo.build(name, device)
    if device == "cpu":
        zoo.randomize(model)
    return model.eval()


def picture(size=64, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(4))


def fitting(name):
    return picture(224 if "levit" in name or "efficientformer" in name else 128 if "inception" in name else 64)


def both(name, ratio="2:1", **options):
    """The original, the sites that go, and the converted model."""
    model = build(name)
    converted = nmconv.convert(model, ratio, **options)
    gone = nmconv.get_plan(converted).changes
    assert gone
    return model, gone, converted


def wanted(model, gone, function, *args):
    with dropped(model, gone):
        return function(*args)


def seeded(model, x, training=False):
    model.train(training)
    torch.manual_seed(5)
    return model(x)


def gradients(model, x, training=True):
    model.zero_grad(set_to_none=True)
    output = seeded(model, x, training)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(found, expected):
    assert list(found) == list(expected)
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
