"""Images: read once from the user's data, split by index into those that are fitted and those held out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from nmconv.algebra import is_finite
from nmconv.errors import FitError, NmconvError, OptionError

__all__ = [
    "Images",
    "check_accepts",
    "check_finite",
    "device_and_dtype_of",
    "input_errors_as_fit_errors",
    "read_batches",
    "read_images",
    "to_device_and_dtype",
]

_BATCH = 64  # images
_MAX_BYTES = 4 * 2**30  # of images in memory; beyond that, they are read again by index where possible
_EMPTY = "data holds no images: give a loader or an iterable that has not been read to its end"
DeviceAndDtype = tuple[torch.device, torch.dtype]


@dataclass(frozen=True, eq=False)
class Images:
    """Batches of inputs; in each, all images are fitted or all are held out.

    Attributes:
        source: Returns an iterator over pairs of a batch and whether it is held out.
        count: Number of images that are fitted.
        held: Number of images that are held out.
        device_and_dtype: The device of the batches, and the dtype of floating-point batches.
    """

    source: Callable[[], Iterator[tuple[Tensor, bool]]]
    count: int
    held: int
    device_and_dtype: DeviceAndDtype

    def batches(self, held: bool | None = None) -> Iterator[tuple[Tensor, bool]]:
        """Yield copies of the batches on the model's device and in its dtype, and whether each is held out.

        Args:
            held: Only the images held out (True), or only those fitted (False); None for all.
        """
        for batch, is_held in self.source():
            if held is None or is_held is held:
                yield to_device_and_dtype(batch, self.device_and_dtype, copy=True), is_held

    def first(self) -> Tensor:
        """Return one image, as a batch."""
        batch, _ = next(self.batches())
        return batch[:1]


def device_and_dtype_of(model: nn.Module) -> DeviceAndDtype:
    """Return device and dtype of a model's first floating-point parameter or buffer."""
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            return value.device, value.dtype
    return torch.device("cpu"), torch.float32


def to_device_and_dtype(images: Tensor, device_and_dtype: DeviceAndDtype, *, copy: bool = False) -> Tensor:
    """Move images to a device, and floating-point images to a dtype.

    Args:
        images: ``[images, ...]``.
        device_and_dtype: From :func:`device_and_dtype_of`.
        copy: Whether to copy them in any case, as some models overwrite their input.
    """
    device, dtype = device_and_dtype
    return images.to(device, dtype if images.is_floating_point() else images.dtype, copy=copy)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_images(data: Any, model: nn.Module, *, holdout: float = 0.0, key: str | None = None) -> Images:
    """Read all data once.

    Args:
        data: A tensor ``[images, ...]``, or a loader or iterable of batches: tensors, (x, y) pairs, or dicts; or a
            result of this function.
        model: Determines device and dtype.
        holdout: The fraction of the images that is held out, evenly spaced.
        key: Where batches are dicts: the key of the images.

    Raises:
        OptionError: If there are no images, or the data is something else.
    """
    if isinstance(data, Images):
        return data
    device_and_dtype = device_and_dtype_of(model)
    split = _HoldoutSplit(holdout)
    memory = _ImagesInMemory()
    data = _in_batches(data)
    read_again = _reader_by_index(data, key)
    for batch, _ in _batches(data, key):
        for part, held in split.of_batch(batch):
            memory.add(part, held)
        if memory.size > _MAX_BYTES and read_again is not None:
            return read_again(holdout, device_and_dtype)
    if not split.count:
        raise OptionError(_EMPTY)
    batches = memory.batches()
    if holdout and not split.held:
        shape = tuple(batches[0][0].shape[1:])
        advice = "give more, or another holdout" if len(shape) > 2 else "is the batch axis missing?"
        raise OptionError(
            f"data holds {split.count} images of shape {shape}, too few to hold out {holdout} of them: {advice}"
        )
    return Images(lambda: iter(batches), split.count - split.held, split.held, device_and_dtype)


def read_batches(data: Any, key: str | None = None) -> Iterator[tuple[Tensor, Any]]:
    """Yield batches as they are read, without keeping them, each with the additional argument of the loss.

    Args:
        data: As for :func:`read_images`.
        key: As for :func:`read_images`.

    Yields:
        The images; and y of an (x, y) pair, a dict as a whole, else None.

    Raises:
        OptionError: If there are no images, or the data is something else.
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
        return DataLoader(data, _BATCH, collate_fn=_collate)
    return data


def _collate(items: Any) -> Any:
    try:
        return default_collate(items)
    except TypeError as error:
        raise OptionError(
            f"data's items cannot be put into batches ({error}): add a transform that turns them into tensors"
        ) from error


def _batches(data: Any, key: str | None) -> Iterator[tuple[Tensor, Any]]:
    if isinstance(data, (str, bytes, Mapping, Tensor)) or not isinstance(data, Iterable):
        raise OptionError(f"data={data!r:.80}: give a tensor of images, or a loader or iterable of batches")
    for batch in data:
        is_pair = isinstance(batch, (tuple, list)) and len(batch) > 1
        yield _images_of(batch, key), batch[1] if is_pair else batch if isinstance(batch, Mapping) else None


def _images_of(batch: Any, key: str | None) -> Tensor:
    """Return the images of a batch: ``[images, channels, *sizes]``."""
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


# -- splitting and keeping --------------------------------------------------------------------------------------------


def _is_held(index: int, holdout: float) -> bool:
    """Return whether an image is held out: evenly spaced, so that data sorted by class is split alike."""
    return int((index + 1) * holdout) > int(index * holdout)


class _HoldoutSplit:
    """Splits batches by the index of each image."""

    def __init__(self, holdout: float) -> None:
        self._holdout = holdout
        self.count = 0
        self.held = 0

    def of_batch(self, batch: Tensor) -> list[tuple[Tensor, bool]]:
        held = [_is_held(self.count + index, self._holdout) for index in range(len(batch))]
        self.count += len(batch)
        self.held += sum(held)
        mask = torch.tensor(held, dtype=torch.bool).to(batch.device)
        parts = [(batch[~mask], False), (batch[mask], True)]
        return [(part, is_held) for part, is_held in parts if len(part)]


class _ImagesInMemory:
    """Batches in memory; small ones of equal shape, dtype and device are concatenated."""

    def __init__(self) -> None:
        self.size = 0
        self._batches: list[tuple[list[Tensor], bool]] = []
        self._open: dict[Any, list[Tensor]] = {}  # the last batch of each kind

    def add(self, part: Tensor, held: bool) -> None:
        self.size += part.numel() * part.element_size()
        kind = (held, part.shape[1:], part.dtype, part.device)
        if kind not in self._open or sum(map(len, self._open[kind])) + len(part) > _BATCH:
            self._open[kind] = []
            self._batches.append((self._open[kind], held))
        self._open[kind].append(part)

    def batches(self) -> list[tuple[Tensor, bool]]:
        return [(torch.cat(parts) if len(parts) > 1 else parts[0], held) for parts, held in self._batches]


def _reader_by_index(data: Any, key: str | None) -> Callable[[float, DeviceAndDtype], Images] | None:
    """Return a function that returns Images which read a loader's data set by index; None where that is impossible."""
    if not isinstance(data, DataLoader) or data.collate_fn is None or isinstance(data.dataset, IterableDataset):
        return None
    sampler = data.batch_sampler
    if sampler is None:  # the data set's items are batches, of any number of images
        return None
    collate: Any = data.collate_fn
    dataset: Any = data.dataset
    if not hasattr(dataset, "__getitem__"):
        return None

    def images_by_index(holdout: float, device_and_dtype: DeviceAndDtype) -> Images:
        indices: tuple[list[int], list[int]] = ([], [])  # fitted, held out
        for number, index in enumerate(sorted(itertools.chain.from_iterable(sampler))):
            indices[_is_held(number, holdout)].append(index)
        size = data.batch_size or _BATCH

        def read() -> Iterator[tuple[Tensor, bool]]:
            for held, part in zip((False, True), indices, strict=True):
                for start in range(0, len(part), size):
                    yield _images_of(collate([dataset[index] for index in part[start : start + size]]), key), held

        _check_repeatable(read, min(size, len(indices[0]) or len(indices[1])), dataset)
        return Images(read, len(indices[0]), len(indices[1]), device_and_dtype)

    return images_by_index


def _check_repeatable(read: Callable[[], Iterator[tuple[Tensor, bool]]], count: int, dataset: Any) -> None:
    """Raise OptionError if reading the first batch twice gives different images, or not ``count`` of them."""
    first, again = (next(read())[0] for _ in range(2))
    if len(first) != count:
        raise OptionError(
            f"data is too large to keep in memory, and its collate_fn makes {len(first)} images of {count}: give a "
            "collate_fn that makes one image of each, or fewer images"
        )
    if not torch.equal(first, again):
        raise OptionError(
            f"data is too large to keep in memory, and its {type(dataset).__name__} returns other images each time: "
            "give it transforms without randomness, or fewer images"
        )


# -- checking ---------------------------------------------------------------------------------------------------------


@contextmanager
def input_errors_as_fit_errors(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Turn the errors of a model that does not accept these images into a FitError."""
    try:
        yield
    except (NmconvError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise FitError(
            f"this {type(model).__name__} does not accept images of shape {tuple(images.shape)} ({error}): give "
            "batches of images [images, channels, ...]; wrap a model of several inputs in a module that takes one"
        ) from error


def check_accepts(model: nn.Module, images: Images) -> None:
    """Raise FitError if the model fails on the first image."""
    image = images.first()
    with torch.no_grad(), input_errors_as_fit_errors(model, image):
        model(image)


def check_finite(values: Tensor, what: str) -> None:
    """Raise FitError if a value is infinite or NaN."""
    if not is_finite(values):
        raise FitError(
            f"{what} is not finite on these images: look for infinities and NaN in the images and the weights, or use "
            "a dtype with a larger range"
        )
