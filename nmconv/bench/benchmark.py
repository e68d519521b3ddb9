"""The benchmark: original, converted and merged side by side, on each backend and batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nmconv.bench.count import activations_of, network
from nmconv.bench.machine import environment
from nmconv.bench.measure import measured
from nmconv.bench.models import build, settle_norms
from nmconv.bench.results import Cell, Result, Settings
from nmconv.copying import copy_of
from nmconv.errors import NoEffectWarning, OptionError
from nmconv.merging import fold_norms, merge
from nmconv.surgery import convert
from nmconv.timing import BACKENDS, interleaved, require
from nmconv.timing import threads as threads_set

__all__ = ["run"]

_CALIBRATION = 4  # images


def run(
    model: str | nn.Module,
    *,
    ratio: str = "2:1",
    relocate: bool = False,
    hoist_padding: bool = False,
    gate: str = "flops",
    min_gain: float = 1.05,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    size: int = 224,
    threads: int = 1,
    rounds: int = 11,
    seconds: float = 0.2,
    device: str = "cpu",
    weights: str = "",
    channels_last: bool = False,
    progress: Callable[[str], None] = lambda doing: None,
) -> Result:
    """Time a network as it is, converted, and merged: interleaved, norms folded wherever they can be in all three.

    Args:
        model: A timm name, ``torchvision:`` and a name, or a module in eval mode, which is left as it is. Networks
            built by name without weights get norms with statistics of their own.
        ratio: To convert to; ``"none"`` merges the network as it is.
        relocate: As in :func:`nmconv.convert`.
        hoist_padding: As in :func:`nmconv.convert`.
        gate: As in :func:`nmconv.merge`. By ``"latency"`` the network is merged anew for each backend and batch.
        min_gain: As in :func:`nmconv.merge`.
        backends: Of :func:`nmconv.timing.runner`; None is all, and says so where one is not installed.
        batches: Images in a batch.
        size: Height and width of the images, in pixels.
        threads: To compute with.
        rounds: Samples of each timing.
        seconds: Least duration of a sample.
        device: As torch names it.
        weights: Path of a state dict for a network built by name.
        channels_last: Lay networks and images out so in memory (``memory_format=torch.channels_last``), all alike.
        progress: Is told in words what is being done.

    Returns:
        Everything found. What could not be measured is a cell that says why.

    Raises:
        OptionError: For an option that cannot be, an unknown model, a backend asked for that is not installed, or a
            size that the network does not run on.
        FileError: For weights that do not fit.
        NmconvError: As :func:`nmconv.convert` and :func:`nmconv.merge` raise.
    """
    settings = Settings(
        ratio=ratio,
        relocate=relocate,
        hoist_padding=hoist_padding,
        gate=gate,
        min_gain=min_gain,
        backends=tuple(dict.fromkeys(BACKENDS if backends is None else backends)),
        batches=tuple(dict.fromkeys(batches)),
        size=size,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        device=device,
        weights=weights,
        channels_last=channels_last,
    )
    for backend in backends or ():
        require(backend)
    interleaved([], rounds=rounds, seconds=seconds)  # only checks the numbers
    where = _checked(settings)
    notes: list[str] = []
    with threads_set(threads), _noting(notes):
        name = model if isinstance(model, str) else type(model).__name__
        progress(f"building {name}")
        original = _prepared(model, settings, where)
        progress(f"converting {name}")
        converted = original if ratio == "none" else _converted(original, settings)
        owning = activations_of(original), activations_of(converted)
        folded = fold_norms(original), fold_norms(converted)
        image = _images(1, settings, where)
        sizes = [network(module, image, count) for module, count in zip(folded, owning, strict=True)]

        def merged(backend: str, images: Tensor) -> nn.Module:  # norms of what stays alone are folded, too
            return merge(converted, gate=gate, min_gain=min_gain, backend=backend, example_inputs=(images,))

        progress(f"merging {name}")
        shared = None if gate == "latency" else merged("eager", image)

        def cell(backend: str, batch: int) -> Cell:
            progress(f"{name}: {backend}, batch {batch}")
            try:
                require(backend)
                images = _images(batch, settings, where)
                last = merged(backend, images) if shared is None else shared
                counted = network(last, image, owning[1])
                found = measured((*folded, last), counted, images, backend, rounds=rounds, seconds=seconds)
            except Exception as error:  # of whatever backend: the other cells are worth having
                words = " ".join(str(error).split()) or type(error).__name__
                return Cell(backend, batch, None, f"not measured: {words}")
            return Cell(backend, batch, found)

        cells = tuple(cell(backend, batch) for backend in settings.backends for batch in settings.batches)
        notes += [_unmerged(cell, gate) for cell in cells if cell.measured and cell.measured.network == sizes[1]]
    return Result(name, settings, environment(where), sizes[0], sizes[1], cells, tuple(dict.fromkeys(notes)))


def _unmerged(cell: Cell, gate: str) -> str:
    where = f"{cell.backend}, batch {cell.batch}: " if gate == "latency" else ""
    return f"{where}nothing was merged, as nothing passed the gate: merged is converted once more"


def _checked(settings: Settings) -> torch.device:
    """The device, once all numbers are known to be some."""
    for batch in settings.batches or (None,):
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise OptionError(f"batches={settings.batches!r}: give positive whole numbers, such as (1, 8)")
    if isinstance(settings.size, bool) or not isinstance(settings.size, int) or settings.size < 1:
        raise OptionError(f"size={settings.size!r}: give a positive number of pixels, such as 224")
    try:
        device = torch.empty(1, device=settings.device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch compiled without CUDA
        first = str(error).splitlines()[0]
        raise OptionError(f"device={settings.device!r}: there is none here, try 'cpu' ({first})") from error
    if device.type == "meta":
        raise OptionError("device='meta' computes nothing: give one that does, such as 'cpu'")
    return device


def _images(batch: int, settings: Settings, device: torch.device) -> Tensor:
    drawn = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, settings.size, settings.size, generator=drawn)
    return images.to(device, memory_format=_format(settings))


def _format(settings: Settings) -> torch.memory_format:
    return torch.channels_last if settings.channels_last else torch.preserve_format


def _prepared(model: str | nn.Module, settings: Settings, device: torch.device) -> nn.Module:
    """The network on its device, known to run there."""
    if isinstance(model, str):
        module = build(model, settings.weights).to(device)
    elif settings.weights:
        raise OptionError("weights are for a network built by name: load them into the module instead")
    else:
        module = copy_of(model) if settings.channels_last else model
    if settings.channels_last:
        module = module.to(memory_format=torch.channels_last)
    images = _images(_CALIBRATION, settings, device)
    try:
        if isinstance(model, str) and not settings.weights:
            settle_norms(module, images)
        with torch.no_grad():
            module(images[:1])
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OptionError(
            f"size={settings.size}: the network does not run on images of shape {tuple(images.shape[1:])} on "
            f"{device}: {first}"
        ) from error
    return module


def _converted(model: nn.Module, settings: Settings) -> nn.Module:
    return convert(model, settings.ratio, relocate=settings.relocate, hoist_padding=settings.hoist_padding)


@contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Warnings that something had no effect become notes; others are given anew afterwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoEffectWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, NoEffectWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
