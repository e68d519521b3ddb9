"""Batches that depend on (seed, epoch, index) alone: not on workers, processes, or what was drawn before."""

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
    """What one process does of an update: its forward passes number `rank`, `rank + processes`, ..."""

    rank: int = 0
    processes: int = 1
    workers: int = 0  # processes of its own that decode pictures


@contextmanager
def chance(*numbers: int) -> Iterator[None]:
    """Random numbers that depend on these numbers alone; those of the caller go on afterwards, those of a GPU aside."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # in the process that trains; workers that decode have no GPU
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def inputs(model: nn.Module, images: Tensor) -> Tensor:
    """uint8 (n, height, width, channels) as the model takes it: floats (n, channels, height, width), channels last in
    memory, with its own mean and deviation (timm's configuration), on its device."""
    first = next(model.parameters())
    config = getattr(model, "pretrained_cfg", None) or CIFAR
    mean, std = (torch.tensor(config[key], device=first.device) * 255 for key in ("mean", "std"))
    if images.shape[3] == 1:
        mean, std = mean.mean(), std.mean()
    pixels = ((images.to(first.device, first.dtype) - mean) / std).permute(0, 3, 1, 2)
    return pixels.expand(-1, first.shape[1], -1, -1) if pixels.shape[1] == 1 and first.dim() == 4 else pixels


def batches(
    model: nn.Module, pictures: Pictures, recipe: Recipe, epoch: int, start: int, share: Share
) -> Iterator[Batch]:
    """This process's batches of an epoch, from update number `start` on: `recipe.accumulate` for each update."""
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
    """Each picture shifted by up to an eighth of its side, and mirrored or not."""
    count, size = pictures.images.shape[:2]
    most = size // 8 if recipe.augment == "shift" else 0
    rng = np.random.default_rng((recipe.seed, epoch, 1))
    shift = torch.from_numpy(rng.integers(-most, most, (2, count, 1), endpoint=True))
    mirror = torch.from_numpy(rng.random((count, 1)) < (0.5 if recipe.augment == "shift" else 0))
    side, device = torch.arange(size), pictures.images.device
    for each in torch.from_numpy(rows):
        y, x = (side + shift[:, each]).clamp(0, size - 1)
        x = torch.where(mirror[each], x.flip(1), x)
        each, y, x = (index.to(device) for index in (each, y, x))
        images = pictures.images[each[:, None, None], y[:, :, None], x[:, None, :]]
        yield inputs(model, images), pictures.labels[each].to(next(model.parameters()).device)


class Transformed(Dataset[tuple[Tensor, int]]):
    """Pictures as timm's transforms make them, each with random numbers of its own."""

    def __init__(self, pictures: Encoded, transform: Any, *numbers: int) -> None:
        self.dataset, self.transform, self.numbers = pictures.dataset, transform, numbers

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.dataset[index]
        with chance(*self.numbers, index):
            return self.transform(picture.convert("RGB")), label


def transformed(
    model: nn.Module, pictures: Encoded, recipe: Recipe | None, epoch: int, rows: list[list[int]], workers: int
) -> Iterator[Batch]:
    """Pictures decoded anew, augmented by timm as the recipe says; without a recipe, as timm validates."""
    size = {"input_size": (3, pictures.size, pictures.size)} if pictures.size else {}
    config = resolve_data_config(size, model=model)
    options = {"hflip": 0.5, "auto_augment": recipe.auto_augment or None, "re_prob": recipe.erase} if recipe else {}
    training = recipe is not None and recipe.augment == "timm"
    transform = create_transform(**config, **(options if training else {}), is_training=training)
    dataset = Transformed(pictures, transform, recipe.seed if recipe else 0, epoch)
    device = next(model.parameters()).device
    pin = device.type == "cuda"
    with chance(0):  # a loader draws a seed
        loader = DataLoader(dataset, batch_sampler=rows, num_workers=workers, pin_memory=pin)
        batches = iter(loader)
    for images, labels in batches:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        yield images, labels.to(device, non_blocking=True)


def in_order(model: nn.Module, pictures: Pictures, batch_size: int, share: Share) -> Iterator[Batch]:
    """This process's part of the pictures, as they are."""
    rows = np.arange(len(pictures))[share.rank :: share.processes]
    if isinstance(pictures, Encoded):
        parts = [part.tolist() for part in torch.from_numpy(rows).split(batch_size)]
        yield from transformed(model, pictures, None, 0, parts, share.workers)
        return
    for each in torch.from_numpy(rows).split(batch_size):
        yield inputs(model, pictures.images[each]), pictures.labels[each].to(next(model.parameters()).device)


def mixed(images: Tensor, labels: Tensor, recipe: Recipe, classes: int, *numbers: int) -> Batch:
    """The batch as timm's mixup and CutMix leave it, with the classes' shares for labels; as it is where both are off.

    timm draws from numpy's global state: here that depends on the seed and these numbers alone.
    """
    if not recipe.mixup and not recipe.cutmix:
        return images, labels
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
    with chance(recipe.seed, *numbers):
        return mix(images.clone(), labels)  # in place
