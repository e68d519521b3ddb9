"""Networks by name: those of the literature for 32x32 pictures, timm's, torchvision's, and the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import safe_open
from timm.models import load_state_dict
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d

import nmconv

from .batches import CIFAR


def resnet(depth: int, classes: int, width: float = 1.0) -> ResNet:
    """Build the CIFAR network of *Deep Residual Learning* (arXiv 1512.03385, section 4.2), with 1x1 projections, from
    timm's ResNet with a 3x3 stem. `depth` is 6n + 2."""
    channels = [round(width * each) for each in (16, 32, 64)]
    model = ResNet(
        BasicBlock, (depth // 6,) * 3, classes, channels=channels, stem_type="deep", stem_width=channels[0] // 2
    )
    model.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
    model.maxpool = model.layer4 = nn.Identity()
    model.init_weights()
    return model


def vgg11_bn(classes: int) -> nn.Module:
    """Build torchvision's VGG-11 with norms and one linear layer instead of three, as common for 32x32 pictures."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    model = torchvision.models.VGG(layers, classes)
    model.avgpool, model.classifier = nn.Identity(), nn.Linear(512, classes)
    return model


def alexnet(classes: int) -> nn.Module:
    """Build torchvision's AlexNet with more padding, smaller pools and one linear layer, for 32x32 pictures."""
    model = torchvision.models.alexnet(num_classes=classes)
    model.features[0].padding = (5, 5)
    for layer in model.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.kernel_size = 2
    model.avgpool, model.classifier = nn.Identity(), nn.Linear(256, classes)
    return model


def densenet(classes: int) -> nn.Module:
    """Build DenseNet-BC with 100 layers and growth rate 12 (arXiv 1608.06993, section 4), with a 3x3 stem."""
    model = torchvision.models.DenseNet(12, (16, 16, 16), 24, num_classes=classes)
    model.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        delattr(model.features, name)
    return model


def mobilenetv2(classes: int) -> nn.Module:
    """Build timm's MobileNetV2 with three strides instead of five, for 32x32 pictures."""
    model = timm.create_model("mobilenetv2_100", num_classes=classes)
    model.conv_stem.stride = (1, 1)
    model.blocks[1][0].conv_dw.stride = (1, 1)
    return model


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 beside a max pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = BasicConv2d(inputs, outputs, kernel_size=3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.pool(x)], 1)


class Branches(nn.Module):
    """A 1x1 convolution beside a 3x3 one."""

    def __init__(self, inputs: int, one: int, three: int) -> None:
        super().__init__()
        self.one = BasicConv2d(inputs, one, kernel_size=1)
        self.three = BasicConv2d(inputs, three, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x)], 1)


def inception(classes: int) -> nn.Module:
    """Build the small Inception of arXiv 1611.03530, figure 3, from torchvision's BasicConv2d."""
    layers: list[nn.Module] = [BasicConv2d(3, 96, kernel_size=3, padding=1)]
    channels = 96
    for part in ([(32, 32), (32, 48), 80], [(112, 48), (96, 64), (80, 80), (48, 96), 96], [(176, 160), (176, 160)]):
        for each in part:
            layers.append(Branches(channels, *each) if isinstance(each, tuple) else Downsample(channels, each))
            channels = sum(each) if isinstance(each, tuple) else channels + each
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


CIFAR_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"cifar_resnet{depth}": partial(resnet, depth) for depth in (8, 14, 20, 32)},
    "cifar_vgg11_bn": vgg11_bn,
    "cifar_alexnet": alexnet,
    "cifar_densenet": densenet,
    "cifar_mobilenetv2": mobilenetv2,
    "cifar_inception": inception,
}


def create(name: str, classes: int, **options: Any) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: One of `CIFAR_NETWORKS`, a name of timm's or torchvision's, or `package.module:function`.
        classes: Number of classes.
        options: More arguments of the function that builds it.

    Raises:
        ValueError: If there is no such network.
    """
    if name in CIFAR_NETWORKS:
        model = CIFAR_NETWORKS[name](classes, **options)
        model.pretrained_cfg = CIFAR
        return model
    if ":" in name:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)(num_classes=classes, **options)
    if timm.is_model(name):
        return timm.create_model(name, num_classes=classes, **options)
    if name in torchvision.models.list_models():
        return torchvision.models.get_model(name, num_classes=classes, **options)
    raise ValueError(
        f"{name!r} is not a network of timm's or torchvision's, nor one of {', '.join(CIFAR_NETWORKS)}: "
        "name a function of your own as package.module:function"
    )


def build(name: str, classes: int, weights: Path | None = None, seed: int = 0, **options: Any) -> nn.Module:
    """Build a network with weights drawn from the seed, or with those of a file.

    The file may come from `nmconv.save`: the network is then converted, merged and fitted as recorded there. Or it is a
    state dict of the network as built, .pth or .safetensors. Its keys may differ if they have the same order, and its
    classes may differ: the classifier then starts at zero.
    """
    torch.manual_seed(seed)
    model = create(name, classes, **options)
    if weights is None:
        return model
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as file:
            is_nmconv_file = "nmconv" in (file.metadata() or {})
        if is_nmconv_file:
            return nmconv.load(model, weights, inplace=True)
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file")
    own, state = model.state_dict(), load_state_dict(str(weights))
    if len(state) != len(own):
        raise ValueError(
            f"{weights} holds {len(state)} tensors, and {name} has {len(own)}: give weights of this network"
        )
    if state.keys() != own.keys():
        state = dict(zip(own, state.values(), strict=True))
    reshaped = {key for key in own if own[key].shape != state[key].shape}
    model.load_state_dict(state | {key: torch.zeros_like(own[key]) for key in reshaped & set(classifier_keys(model))})
    return model


def classifier_keys(model: nn.Module) -> list[str]:
    """Return the keys of the last linear layer or convolution."""
    last = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    return [f"{last}.weight", f"{last}.bias"]
