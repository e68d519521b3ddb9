"""Images: read once from whatever the user has, split by index into what is fitted and what is held out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from nmconv.algebra import is_finite
from nmconv.errors import FitError, NmconvError, OptionError

__all__ = ["Images", "check_finite", "check_takes", "home_of", "read_batches", "read_images", "taking"]

_BATCH = 64  # images
_EMPTY = "data holds no images: give a loader or an iterable that has not been read to its end"
_MOST = 4 * 2**30  # bytes of images kept in memory; more are read again by index where the data can do that


@dataclass(frozen=True, eq=False)
class Images:
    """Batches of inputs, each all fitted or all held out.

    Attributes:
        source: Where batches come from: tensors, or what reads them again.
        count: Images that are fitted.
        held: Images that are held out.
        home: Device, and dtype of floating-point images.
    """

    source: Any
    count: int
    held: int
    home: tuple[torch.device, torch.dtype]

    def batches(self, held: bool | None = None) -> Iterator[tuple[Tensor, bool]]:
        """Batches on the model's device and in its dtype, and whether each is held out.

        Args:
            held: Only what is held out, or only what is fitted; None for all.
        """
        device, dtype = self.home
        for batch, out in self.source():
            if held is None or out is held:
                # Copies: some models overwrite their input.
                yield batch.to(device, dtype if batch.is_floating_point() else batch.dtype, copy=True), out

    def first(self) -> Tensor:
        """One image, as a batch."""
        batch, _ = next(self.batches())
        return batch[:1]


def home_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's first floating-point parameter."""
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            return value.device, value.dtype
    return torch.device("cpu"), torch.float32


def read_images(data: Any, model: nn.Module, *, holdout: float = 0.0, key: str | None = None) -> Images:
    """Read all data once.

    Args:
        data: A tensor ``[images, ...]``, or a loader or iterable of batches: tensors, (x, y) pairs, or dicts; or what
            this function returned before.
        model: Gives device and dtype.
        holdout: Which part of the images is held out, spread evenly over them.
        key: Where batches are dicts: under which key the images are.

    Raises:
        OptionError: If there are no images, or they are something else.
    """
    if isinstance(data, Images):
        return data
    home = home_of(model)
    split = _Split(holdout)
    kept = _Kept()
    data = _in_batches(data)
    again = _reader(data, key)
    for batch, _ in _batches(data, key):
        for part, held in split.take(batch):
            kept.add(part, held)
        if kept.size > _MOST and again is not None:
            return again(holdout, home)
    if not split.index:
        raise OptionError(_EMPTY)
    if holdout and not split.held:
        raise OptionError(
            f"data holds {split.index} images, too few to hold out {holdout} of them: give more, or another holdout"
        )
    batches = kept.batches()
    return Images(lambda: iter(batches), split.index - split.held, split.held, home)


class _Kept:
    """Batches in memory, small ones of one kind put together."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[tuple[list[Tensor], bool]] = []
        self._open: dict[Any, list[Tensor]] = {}

    def add(self, part: Tensor, held: bool) -> None:
        self.size += part.numel() * part.element_size()
        kind = (held, part.shape[1:], part.dtype, part.device)
        if sum(map(len, self._open.get(kind, []))) + len(part) > _BATCH or kind not in self._open:
            self._open[kind] = []
            self._parts.append((self._open[kind], held))
        self._open[kind].append(part)

    def batches(self) -> list[tuple[Tensor, bool]]:
        return [(torch.cat(parts) if len(parts) > 1 else parts[0], held) for parts, held in self._parts]


def _is_held(index: int, holdout: float) -> bool:
    """Evenly spaced, so that data sorted by class is split alike."""
    return int((index + 1) * holdout) > int(index * holdout)


class _Split:
    """Divides batches by the number of each image."""

    def __init__(self, holdout: float) -> None:
        self._holdout = holdout
        self.index = 0
        self.held = 0

    def take(self, batch: Tensor) -> list[tuple[Tensor, bool]]:
        out = torch.tensor([_is_held(self.index + at, self._holdout) for at in range(len(batch))], dtype=torch.bool)
        self.index += len(batch)
        self.held += int(out.sum())
        where = out.to(batch.device)
        parts = [(batch[~where], False), (batch[where], True)]
        return [(part, held) for part, held in parts if len(part)]


def read_batches(data: Any, key: str | None = None) -> Iterator[tuple[Tensor, Any]]:
    """Batches as they come, none of them kept, each with what the loss is to be given besides the output.

    Args:
        data: As for :func:`read_images`.
        key: The same.

    Yields:
        Images, and y of an (x, y) pair; of a dict the whole of it; else None.

    Raises:
        OptionError: If there are no images, or they are something else.
    """
    empty = True
    for images, target in _batches(_in_batches(data), key):
        if len(images):
            empty = False
            yield images, target
    if empty:
        raise OptionError(_EMPTY)


def _in_batches(data: Any) -> Any:
    if isinstance(data, Tensor) and data.dim():
        return data.split(_BATCH)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, _BATCH, collate_fn=_collated)
    return data


def _batches(data: Any, key: str | None) -> Iterator[tuple[Tensor, Any]]:
    if isinstance(data, (str, bytes, Mapping, Tensor)) or not isinstance(data, Iterable):
        raise OptionError(f"data={data!r:.80}: give a tensor of images, or a loader or iterable of batches")
    for batch in data:
        pair = isinstance(batch, (tuple, list)) and len(batch) > 1
        yield _images_of(batch, key), batch[1] if pair else batch if isinstance(batch, Mapping) else None


def _collated(parts: Any) -> Any:
    try:
        return default_collate(parts)
    except TypeError as error:
        raise OptionError(
            f"data's items cannot be put into batches ({error}): give transforms that make tensors of them"
        ) from error


def _images_of(batch: Any, key: str | None) -> Tensor:
    """The images of a batch: ``[images, channels, *sizes]``."""
    if isinstance(batch, Mapping):
        if key not in batch:
            raise OptionError(f"batches are dicts with {', '.join(map(repr, batch))}: name the images' by key=")
        batch = batch[key]
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor) or batch.dim() < 2:
        what = f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
        raise OptionError(f"data gives {what} where a batch of images is expected: a tensor [images, channels, ...]")
    return batch.detach()


def _reader(data: Any, key: str | None) -> Any:
    """What makes images of a loader that reads its data set again by index, or None where that cannot be done."""
    if not isinstance(data, DataLoader) or data.collate_fn is None or isinstance(data.dataset, IterableDataset):
        return None
    sampler = data.batch_sampler
    if sampler is None:  # its items are batches, of any number of images
        return None
    collate: Any = data.collate_fn
    dataset: Any = data.dataset
    if not hasattr(dataset, "__getitem__"):
        return None

    def made(holdout: float, home: Any) -> Images:
        order = itertools.chain.from_iterable(sampler)
        wanted: tuple[list[int], list[int]] = ([], [])
        for number, index in enumerate(sorted(order)):
            wanted[_is_held(number, holdout)].append(index)
        step = data.batch_size or _BATCH

        def read() -> Iterator[tuple[Tensor, bool]]:
            for held, indices in zip((False, True), wanted, strict=True):
                for start in range(0, len(indices), step):
                    yield _images_of(collate([dataset[at] for at in indices[start : start + step]]), key), held

        one, two = (next(read())[0] for _ in range(2))
        asked = min(step, len(wanted[0]) or len(wanted[1]))
        if len(one) != asked:
            raise OptionError(
                f"data is too large to keep, and its collate_fn makes {len(one)} images of {asked}: give one that "
                "makes one of each, or fewer images"
            )
        if not torch.equal(one, two):
            raise OptionError(
                f"data is too large to keep, and its data set gives other images each time ({type(dataset).__name__}): "
                "give it transforms that draw nothing at random, or fewer images"
            )
        return Images(read, len(wanted[0]), len(wanted[1]), home)

    return made


@contextmanager
def taking(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Turn what a model raises on images that are not for it into a FitError."""
    try:
        yield
    except (NmconvError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise FitError(
            f"this {type(model).__name__} does not take images of shape {tuple(images.shape)} ({error}): give "
            "batches of images [images, channels, ...]; wrap a model of several inputs in a module that takes one"
        ) from error


def check_takes(model: nn.Module, images: Images) -> None:
    """Refuse images that the model fails on, with FitError; looks at one."""
    image = images.first()
    with torch.no_grad(), taking(model, image):
        model(image)


def check_finite(values: Tensor, what: str) -> None:
    """Refuse values that are not, with FitError."""
    if not is_finite(values):
        raise FitError(f"{what} is not finite on these images")
