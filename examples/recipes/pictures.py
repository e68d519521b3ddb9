"""Pictures and their classes: an ImageFolder or a torchvision data set, decoded once or each time."""

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

HELD_OUT = ("test", "val", "valid")  # folders and splits to test on, in the order in which they are looked for


@dataclass(frozen=True)
class Decoded:
    """Pictures in memory, uint8 of shape (n, size, size, channels), and their class numbers (n,)."""

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
    """Pictures that are decoded whenever they are asked for: a data set of (PIL image, class number)."""

    dataset: Dataset[Any]
    labels: Tensor
    size: int = 0  # side to bring them to; 0 for what the model was made for

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
    """Splits in which any first n pictures hold every class as often as any other, as far as there are enough."""

    train: Pictures
    test: Pictures
    classes: tuple[str, ...]
    valid: Pictures | None = None  # held back from the train pictures, for choices

    def to(self, device: torch.device) -> Data:
        """The same with what is decoded on a device."""
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

    Which pictures are chosen is always the same, and a smaller choice lies within a larger one.

    Args:
        root: Of an ImageFolder with train/ and test/ (or val/); or where torchvision finds `dataset`.
        size: Side of the pictures; 0, where they are decoded anew, for what a model was made for.
        images: How many of the train pictures, 0 for all.
        dataset: The name of a class of `torchvision.datasets`.
        held_back: How many train pictures are held back for choices, behind the `images`.
        decode: Decode all now, short side to `size`, then the middle.
        cache: A folder for what is decoded. Without it, an ImageFolder's lies beside its pictures.

    Raises:
        ValueError: If a folder or a data set of that name is not there, or the classes of its splits differ, or there
            are too few pictures.
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
    whole = splits[0]
    images = images or len(whole) - held_back
    if not 0 < images <= len(whole) - held_back:
        raise ValueError(f"{root}: {images} pictures to train on and {held_back} held back, of {len(whole)}")
    valid = whole.after(len(whole) - held_back) if held_back else None
    return Data(whole.first(images), splits[1], tuple(map(str, train.classes)), valid)


def image_folders(root: Path) -> tuple[ImageFolder, ImageFolder]:
    held_out = next((name for name in HELD_OUT if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        raise ValueError(f"{root}: an ImageFolder with train/ and test/ (or val/) is wanted")
    return ImageFolder(str(root / "train")), ImageFolder(str(root / held_out))


def torchvision_data(name: str, root: Path) -> tuple[Any, Any]:
    """The two splits of one of torchvision's data sets, whichever way it names them."""
    cls = getattr(torchvision.datasets, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Dataset)):
        raise ValueError(
            f"{name!r} is no data set of torchvision: give a name of torchvision.datasets, such as CIFAR10"
        )
    takes = inspect.signature(cls).parameters
    if "train" in takes:
        pair = cls(root, train=True), cls(root, train=False)
    elif "split" in takes:
        pair = cls(root, split="train"), first_split(cls, root)
    else:
        raise ValueError(f"torchvision's {name} has no splits to train and to test on")
    if not hasattr(pair[0], "classes"):
        for each in pair:
            each.classes = [str(label) for label in np.unique(labels_of(pair[0]))]
    return pair


def first_split(cls: Any, root: Path) -> Any:
    refused = []
    for name in HELD_OUT:
        try:
            return cls(root, split=name)
        except ValueError as error:  # what torchvision raises for a split that a data set does not have
            refused.append(str(error))
    raise ValueError(f"{cls.__name__} has no split to test on: {refused[0]}")


def labels_of(source: Any) -> np.ndarray:
    """The class numbers, from where most data sets keep them, without decoding a picture."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(source, name):
            return np.asarray(getattr(source, name), dtype=np.int64)
    return np.array([label for _, label in source], dtype=np.int64)


def balanced(labels: np.ndarray) -> np.ndarray:
    """A fixed order in which the classes take turns."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    turn = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        own = shuffled[labels[shuffled] == label]
        turn[own] = np.arange(len(own))
    return np.lexsort((labels, turn))


def decoded(source: Any, size: int, cache: Path | None, name: str) -> np.ndarray:
    """All pictures of a data set, from the cache if they are there."""
    path = None
    if cache is not None:
        known = repr(source)
        if isinstance(source, ImageFolder):
            root = Path(source.root)
            name = root.name
            files = (Path(file) for file, _ in source.samples)
            known = "\n".join(f"{file.relative_to(root)} {file.stat().st_size}" for file in files)
        path = cache / f"{name}-{size}px-{zlib.crc32(known.encode()):08x}.npy"
        if path.exists():
            return np.load(path, mmap_mode="r")
    mode = "L" if source[0][0].mode == "L" else "RGB"
    pixels = np.empty((len(source), size, size, len(mode)), dtype=np.uint8)
    for row, (picture, _) in zip(pixels, (source[i] for i in range(len(source))), strict=True):
        row[:] = np.asarray(middle(picture.convert(mode), size)).reshape(row.shape)
    if path is not None:
        with replacing(path) as file:
            np.save(file, pixels)
    return pixels


def middle(picture: Image.Image, size: int) -> Image.Image:
    """The picture with its short side at `size`, cropped to a square."""
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def limited(data: Data, count: int | None) -> Data:
    """The same with the first `count` of the pictures to train on."""
    return replace(data, train=data.train.first(count))
