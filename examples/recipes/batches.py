"""Batches that depend only on (seed, epoch, index): not on workers, processes, or earlier random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import Mixup, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .pictures import Decoded, Encoded, Pictures
from .recipe import Recipe

CIFAR = {"input_size": (3, 32, 32), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Share:
    """One process's share of an update: the forward passes `rank`, `rank + processes`, ..."""

    rank: int = 0
    processes: int = 1
    workers: int = 0  # subprocesses that decode pictures


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed all generators from the numbers; on exit, restore the state of those on the CPU."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # only in the training process, not in the decoding workers
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def inputs(model: nn.Module, images: Tensor) -> Tensor:
    """Convert uint8 images (n, height, width, channels) to the model's input: floats (n, channels, height, width),
    channels last in memory, normalized by the mean and deviation in timm's configuration, on the model's device."""
    weight = next(model.parameters())
    config = getattr(model, "pretrained_cfg", None) or CIFAR
    mean, std = (torch.tensor(config[key], device=weight.device) * 255 for key in ("mean", "std"))
    if images.shape[3] == 1:
        mean, std = mean.mean(), std.mean()
    pixels = ((images.to(weight.device, weight.dtype) - mean) / std).permute(0, 3, 1, 2)
    return pixels.expand(-1, weight.shape[1], -1, -1) if pixels.shape[1] == 1 and weight.dim() == 4 else pixels


def batches(
    model: nn.Module, pictures: Pictures, recipe: Recipe, epoch: int, start: int, share: Share
) -> Iterator[Batch]:
    """Yield this process's batches of an epoch from update `start` on, `recipe.accumulate` per update."""
    order = np.random.default_rng((recipe.seed, epoch)).permutation(len(pictures))
    size = recipe.batch_size // (share.processes * recipe.accumulate)
    updates = len(pictures) // recipe.batch_size
    all_rows = order[: updates * recipe.batch_size].reshape(updates, recipe.accumulate, share.processes, size)
    rows = all_rows[start:, :, share.rank].reshape(-1, size)
    if isinstance(pictures, Decoded):
        yield from shifted(model, pictures, recipe, epoch, rows)
    else:
        yield from transformed(model, pictures, recipe, epoch, rows.tolist(), share.workers)


def shifted(model: nn.Module, pictures: Decoded, recipe: Recipe, epoch: int, rows: np.ndarray) -> Iterator[Batch]:
    """Yield batches of pictures, each shifted by up to an eighth of its side and randomly mirrored."""
    count, size = pictures.images.shape[:2]
    max_shift = size // 8 if recipe.augment == "shift" else 0
    rng = np.random.default_rng((recipe.seed, epoch, 1))
    shift = torch.from_numpy(rng.integers(-max_shift, max_shift, (2, count, 1), endpoint=True))
    mirror = torch.from_numpy(rng.random((count, 1)) < (0.5 if recipe.augment == "shift" else 0))
    side, device = torch.arange(size), pictures.images.device
    for batch in torch.from_numpy(rows):
        y, x = (side + shift[:, batch]).clamp(0, size - 1)
        x = torch.where(mirror[batch], x.flip(1), x)
        batch, y, x = (index.to(device) for index in (batch, y, x))
        images = pictures.images[batch[:, None, None], y[:, :, None], x[:, None, :]]
        yield inputs(model, images), pictures.labels[batch].to(next(model.parameters()).device)


class Transformed(Dataset[tuple[Tensor, int]]):
    """Pictures transformed by timm, each with its own seed."""

    def __init__(self, pictures: Encoded, transform: Any, *numbers: int) -> None:
        self.dataset, self.transform, self.numbers = pictures.dataset, transform, numbers

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.dataset[index]
        with seeded(*self.numbers, index):
            return self.transform(picture.convert("RGB")), label


def transformed(
    model: nn.Module, pictures: Encoded, recipe: Recipe | None, epoch: int, rows: list[list[int]], workers: int
) -> Iterator[Batch]:
    """Decode pictures and augment them with timm as the recipe says; without a recipe, transform for validation."""
    size = {"input_size": (3, pictures.size, pictures.size)} if pictures.size else {}
    config = resolve_data_config(size, model=model)
    options = {"hflip": 0.5, "auto_augment": recipe.auto_augment or None, "re_prob": recipe.erase} if recipe else {}
    training = recipe is not None and recipe.augment == "timm"
    transform = create_transform(**config, **(options if training else {}), is_training=training)
    dataset = Transformed(pictures, transform, recipe.seed if recipe else 0, epoch)
    device = next(model.parameters()).device
    pin = device.type == "cuda"
    with seeded(0):  # the loader draws a seed
        loader = DataLoader(dataset, batch_sampler=rows, num_workers=workers, pin_memory=pin)
        batches = iter(loader)
    for images, labels in batches:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        yield images, labels.to(device, non_blocking=True)


def in_order(model: nn.Module, pictures: Pictures, batch_size: int, share: Share) -> Iterator[Batch]:
    """Yield this process's share of the pictures in order, without augmentation."""
    rows = np.arange(len(pictures))[share.rank :: share.processes]
    if isinstance(pictures, Encoded):
        parts = [part.tolist() for part in torch.from_numpy(rows).split(batch_size)]
        yield from transformed(model, pictures, None, 0, parts, share.workers)
        return
    for batch in torch.from_numpy(rows).split(batch_size):
        yield inputs(model, pictures.images[batch]), pictures.labels[batch].to(next(model.parameters()).device)


def mixed(images: Tensor, labels: Tensor, recipe: Recipe, classes: int, *numbers: int) -> Batch:
    """Apply timm's mixup and CutMix, and return class probabilities for labels; if both are off, return the batch.

    timm draws from numpy's global state, which is seeded here from the recipe's seed and the numbers.
    """
    if not recipe.mixup and not recipe.cutmix:
        return images, labels
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
    with seeded(recipe.seed, *numbers):
        return mix(images.clone(), labels)  # in place
