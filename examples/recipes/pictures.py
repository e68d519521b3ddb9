"""Pictures and their classes from an ImageFolder or a torchvision data set, decoded once or on each access."""

from __future__ import annotations

import inspect
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder

from .checkpoint import replacing

TEST_NAMES = ("test", "val", "valid")  # names of the test folder or split, in order of preference


@dataclass(frozen=True)
class Decoded:
    """Pictures in memory, uint8 of shape (n, size, size, channels), and their class indices (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Decoded:
        return Decoded(self.images[:count], self.labels[:count])

    def after(self, count: int) -> Decoded:
        return Decoded(self.images[count:], self.labels[count:])

    def to(self, device: torch.device) -> Decoded:
        return Decoded(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Encoded:
    """Pictures that are decoded on each access: a data set of (PIL image, class index)."""

    dataset: Dataset[Any]
    labels: Tensor
    size: int = 0  # side to resize them to; 0 for the model's own

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Encoded:
        return self._rows(range(len(self))[:count])

    def after(self, count: int) -> Encoded:
        return self._rows(range(len(self))[count:])

    def to(self, device: torch.device) -> Encoded:
        return self

    def _rows(self, rows: range) -> Encoded:
        return Encoded(Subset(self.dataset, rows), self.labels[rows.start : rows.stop], self.size)


Pictures = Decoded | Encoded


@dataclass(frozen=True)
class Data:
    """Splits whose first n pictures are balanced over the classes for any n, as far as there are enough."""

    train: Pictures
    test: Pictures
    classes: tuple[str, ...]
    valid: Pictures | None = None  # held back from the train split, for choices

    def to(self, device: torch.device) -> Data:
        """Return the data with its decoded pictures on a device."""
        valid = None if self.valid is None else self.valid.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), valid=valid)


def load_data(
    root: Path,
    size: int = 32,
    images: int = 0,
    *,
    dataset: str = "",
    held_back: int = 0,
    decode: bool = True,
    cache: Path | None = None,
) -> Data:
    """Open an ImageFolder, or a data set of torchvision.

    The choice of pictures is deterministic, and a smaller choice is a subset of a larger one.

    Args:
        root: Root of an ImageFolder with train/ and test/ (or val/), or of torchvision's `dataset`.
        size: Side of the pictures; with `decode=False`, 0 stands for the model's own.
        images: Number of train pictures, 0 for all.
        dataset: The name of a class of `torchvision.datasets`.
        held_back: Number of train pictures to hold back for choices, taken from the end.
        decode: Decode all pictures now: resize the short side to `size` and crop the center.
        cache: A folder for decoded pictures. By default, those of an ImageFolder are cached beside its pictures.

    Raises:
        ValueError: If the folder or the data set does not exist, the classes of its splits differ, or there are too few
            pictures.
    """
    train, test = torchvision_data(dataset, root) if dataset else image_folders(root)
    if train.classes != test.classes:
        raise ValueError(f"{root}: the splits to train and to test on do not have the same classes")
    splits: list[Pictures] = []
    for name, source in (("train", train), ("test", test)):
        labels = labels_of(source)
        rows = balanced(labels)
        if decode:
            folder = cache or (root if isinstance(source, ImageFolder) else None)
            pixels = torch.from_numpy(decoded(source, size, folder, f"{dataset}{name}")[rows])
            splits.append(Decoded(pixels, torch.from_numpy(labels[rows])))
        else:
            splits.append(Encoded(Subset(source, rows.tolist()), torch.from_numpy(labels[rows]), size))
    train_split = splits[0]
    images = images or len(train_split) - held_back
    if not 0 < images <= len(train_split) - held_back:
        raise ValueError(
            f"{root}: {images} pictures to train on and {held_back} held back, of {len(train_split)}: give fewer"
        )
    valid = train_split.after(len(train_split) - held_back) if held_back else None
    return Data(train_split.first(images), splits[1], tuple(map(str, train.classes)), valid)


def image_folders(root: Path) -> tuple[ImageFolder, ImageFolder]:
    test_name = next((name for name in TEST_NAMES if (root / name).is_dir()), None)
    if test_name is None or not (root / "train").is_dir():
        raise ValueError(f"{root}: give an ImageFolder with train/ and test/ (or val/)")
    return ImageFolder(str(root / "train")), ImageFolder(str(root / test_name))


def torchvision_data(name: str, root: Path) -> tuple[Any, Any]:
    """Return the train and test splits of one of torchvision's data sets, whose constructors name them differently."""
    cls = getattr(torchvision.datasets, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Dataset)):
        raise ValueError(
            f"{name!r} is not a data set of torchvision: give a name of torchvision.datasets, such as CIFAR10"
        )
    parameters = inspect.signature(cls).parameters
    if "train" in parameters:
        pair = cls(root, train=True), cls(root, train=False)
    elif "split" in parameters:
        pair = cls(root, split="train"), first_split(cls, root)
    else:
        raise ValueError(f"torchvision's {name} has no splits to train and to test on: give another data set")
    if not hasattr(pair[0], "classes"):
        for split in pair:
            split.classes = [str(label) for label in np.unique(labels_of(pair[0]))]
    return pair


def first_split(cls: Any, root: Path) -> Any:
    messages = []
    for name in TEST_NAMES:
        try:
            return cls(root, split=name)
        except ValueError as error:  # raised by torchvision for an unknown split
            messages.append(str(error))
    raise ValueError(f"{cls.__name__} has no split to test on ({messages[0]}): give another data set")


def labels_of(source: Any) -> np.ndarray:
    """Return the class indices; most data sets have an attribute for them, so that no picture is decoded."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(source, name):
            return np.asarray(getattr(source, name), dtype=np.int64)
    return np.array([label for _, label in source], dtype=np.int64)


def balanced(labels: np.ndarray) -> np.ndarray:
    """Return a fixed order of the pictures in which the classes take turns."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    turn = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        of_class = shuffled[labels[shuffled] == label]
        turn[of_class] = np.arange(len(of_class))
    return np.lexsort((labels, turn))


def decoded(source: Any, size: int, cache: Path | None, name: str) -> np.ndarray:
    """Return all pictures of a data set, from the cache if possible."""
    path = None
    if cache is not None:
        description = repr(source)
        if isinstance(source, ImageFolder):
            root = Path(source.root)
            name = root.name
            files = (Path(file) for file, _ in source.samples)
            description = "\n".join(f"{file.relative_to(root)} {file.stat().st_size}" for file in files)
        path = cache / f"{name}-{size}px-{zlib.crc32(description.encode()):08x}.npy"
        if path.exists():
            return np.load(path, mmap_mode="r")
    mode = "L" if source[0][0].mode == "L" else "RGB"
    pixels = np.empty((len(source), size, size, len(mode)), dtype=np.uint8)
    for row, (picture, _) in zip(pixels, (source[i] for i in range(len(source))), strict=True):
        row[:] = np.asarray(center_square(picture.convert(mode), size)).reshape(row.shape)
    if path is not None:
        with replacing(path) as file:
            np.save(file, pixels)
    return pixels


def center_square(picture: Image.Image, size: int) -> Image.Image:
    """Resize the picture's short side to `size` and crop the center to a square."""
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def limited(data: Data, count: int | None) -> Data:
    """Return the data with the first `count` train pictures only."""
    return replace(data, train=data.train.first(count))
