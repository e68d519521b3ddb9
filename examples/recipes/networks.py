"""Networks by name: those for 32x32 pictures of the literature, timm's, torchvision's, and anybody's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import safe_open
from timm.models import load_state_dict
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import nmconv

from .batches import CIFAR


def resnet(depth: int, classes: int, width: float = 1.0) -> ResNet:
    """The CIFAR network of *Deep Residual Learning* (arXiv 1512.03385, section 4.2), with 1x1 projections: timm's
    ResNet behind a 3x3 convolution. `depth` is 6n + 2."""
    channels = [round(width * each) for each in (16, 32, 64)]
    net = ResNet(
        BasicBlock, (depth // 6,) * 3, classes, channels=channels, stem_type="deep", stem_width=channels[0] // 2
    )
    net.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
    net.maxpool = net.layer4 = nn.Identity()
    net.init_weights()
    return net


CIFAR_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"cifar_resnet{depth}": lambda classes, depth=depth, **more: resnet(depth, classes, **more)
        for depth in (8, 14, 20, 32)
    }
}


def create(name: str, classes: int, **options: Any) -> nn.Module:
    """A network with new weights.

    Args:
        name: One of `CIFAR_NETWORKS`, a name of timm's or torchvision's, or `package.module:function`.
        classes: How many.
        options: More for what builds it.

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
        f"{name!r} is no network of timm's or torchvision's, nor one of {', '.join(CIFAR_NETWORKS)}: "
        "a function of your own is package.module:function"
    )


def build(name: str, classes: int, weights: Path | None = None, seed: int = 0, **options: Any) -> nn.Module:
    """A network with weights drawn from the seed, or with those of a file.

    The file may be what `nmconv.save` wrote: the network is then converted, merged and fitted as it says. Or it is a
    state dict of the network as built, .pth or .safetensors, perhaps under other names in the same order, and perhaps
    for other classes: then the classifier is a new one, and starts at zero.
    """
    torch.manual_seed(seed)
    model = create(name, classes, **options)
    if weights is None:
        return model
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as file:
            ours = "nmconv" in (file.metadata() or {})
        if ours:
            return nmconv.load(model, weights, inplace=True)
    own, state = model.state_dict(), load_state_dict(str(weights))
    if state.keys() != own.keys():
        state = dict(zip(own, state.values(), strict=True))
    other = {key for key in own if own[key].shape != state[key].shape}
    model.load_state_dict(state | {key: torch.zeros_like(own[key]) for key in other & set(classifier_keys(model))})
    return model


def classifier_keys(model: nn.Module) -> list[str]:
    """The keys of the last linear layer, or last convolution."""
    last = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    return [f"{last}.weight", f"{last}.bias"]
