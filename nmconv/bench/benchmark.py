"""The benchmark: original, converted and merged network on each backend with each batch size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from nmconv.bench.count import count_activations, network_size
from nmconv.bench.machine import environment
from nmconv.bench.measure import measure_latencies
from nmconv.bench.models import build, randomize_norms
from nmconv.bench.results import Cell, Result, Settings
from nmconv.copying import copy_model
from nmconv.errors import NoEffectWarning, OptionError
from nmconv.merging import fold_norms, merge
from nmconv.surgery import convert
from nmconv.timing import BACKENDS, check_backend, thread_count, time_interleaved

__all__ = ["run"]

_CALIBRATION_IMAGES = 4


def run(model: str | nn.Module, settings: Settings, progress: Callable[[str], None] = lambda message: None) -> Result:
    """Time the original, converted and merged network interleaved, all three with norms folded where possible.

    Args:
        model: A timm name, ``torchvision:`` and a name, or a module in eval mode, which is left unchanged. A network
            built by name without weights gets randomized norms.
        settings: What to measure, and how.
        progress: Called with a message at the start of each stage.

    Returns:
        The result. A cell that could not be measured holds the reason.

    Raises:
        OptionError: If a setting is invalid, the model is unknown, a requested backend is not installed, or the
            network does not run on images of this size.
        FileError: If the weights do not fit.
        NmconvError: As raised by :func:`nmconv.convert` and :func:`nmconv.merge`.
    """
    for backend in settings.backends:
        check_backend(backend)
    settings = replace(
        settings,
        backends=tuple(dict.fromkeys(settings.backends or BACKENDS)),
        batches=tuple(dict.fromkeys(settings.batches)),
    )
    rounds, seconds, gate = settings.rounds, settings.seconds, settings.gate
    time_interleaved([], rounds=rounds, seconds=seconds)  # only checks rounds and seconds
    torch_device = _check_settings(settings)
    notes: list[str] = []
    with thread_count(settings.threads), _no_effect_warnings_as(notes):
        name = model if isinstance(model, str) else type(model).__name__
        progress(f"building {name}")
        original = _build_and_check(model, settings, torch_device)
        progress(f"converting {name}")
        converted = original if settings.ratio == "none" else _convert(original, settings)
        activations = count_activations(original), count_activations(converted)
        folded = fold_norms(original), fold_norms(converted)
        image = _random_images(1, settings, torch_device)
        sizes = [network_size(module, image, count) for module, count in zip(folded, activations, strict=True)]

        def merge_for(backend: str, images: Tensor) -> nn.Module:  # also folds the norms of what is not merged
            return merge(converted, gate=gate, min_gain=settings.min_gain, backend=backend, example_inputs=(images,))

        progress(f"merging {name}")
        merged_once = None if gate == "latency" else merge_for("eager", image)

        def measure_cell(backend: str, batch: int) -> Cell:
            progress(f"{name}: {backend}, batch {batch}")
            try:
                check_backend(backend)
                images = _random_images(batch, settings, torch_device)
                merged = merge_for(backend, images) if merged_once is None else merged_once
                merged_size = network_size(merged, image, activations[1])
                latencies = measure_latencies(
                    (*folded, merged), merged_size, images, backend, rounds=rounds, seconds=seconds
                )
            except Exception as error:  # a backend can raise anything, and the other cells are still worth measuring
                reason = " ".join(str(error).split()) or type(error).__name__
                return Cell(backend, batch, None, f"not measured: {reason}")
            return Cell(backend, batch, latencies)

        cells = tuple(measure_cell(backend, batch) for backend in settings.backends for batch in settings.batches)
        notes += [_unmerged_note(cell, gate) for cell in cells if cell.measured and cell.measured.network == sizes[1]]
    machine = environment(torch_device)
    return Result(name, settings, machine, sizes[0], sizes[1], cells, tuple(dict.fromkeys(notes)))


def _unmerged_note(cell: Cell, gate: str) -> str:
    where = f"{cell.backend}, batch {cell.batch}: " if gate == "latency" else ""
    return f"{where}nothing was merged, as nothing passed the gate: merged is converted once more"


def _check_settings(settings: Settings) -> torch.device:
    """Return the device, or raise OptionError if batches, size or device are invalid."""
    for batch in settings.batches or (None,):
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise OptionError(f"batches={settings.batches!r}: give positive whole numbers, such as (1, 8)")
    if isinstance(settings.size, bool) or not isinstance(settings.size, int) or settings.size < 1:
        raise OptionError(f"size={settings.size!r}: give a positive number of pixels, such as 224")
    try:
        device = torch.empty(1, device=settings.device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch compiled without CUDA
        first_line = str(error).splitlines()[0]
        raise OptionError(f"device={settings.device!r}: there is none here, try 'cpu' ({first_line})") from error
    if device.type == "meta":
        raise OptionError("device='meta' computes nothing: give one that does, such as 'cpu'")
    return device


def _random_images(batch: int, settings: Settings, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, settings.size, settings.size, generator=generator)
    memory_format = torch.channels_last if settings.channels_last else torch.preserve_format
    return images.to(device, memory_format=memory_format)


def _build_and_check(model: str | nn.Module, settings: Settings, device: torch.device) -> nn.Module:
    """Return the network on its device, or raise OptionError if it does not run there."""
    if isinstance(model, str):
        module = build(model, settings.weights).to(device)
    elif settings.weights:
        raise OptionError(
            f"weights={settings.weights!r} are for a network built by name: load them into this {type(model).__name__}"
        )
    else:
        module = copy_model(model) if settings.channels_last else model
    if settings.channels_last:
        module = module.to(memory_format=torch.channels_last)
    images = _random_images(_CALIBRATION_IMAGES, settings, device)
    try:
        if isinstance(model, str) and not settings.weights:
            randomize_norms(module, images)
        with torch.no_grad():
            module(images[:1])
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OptionError(
            f"size={settings.size}: the network does not run on images of shape {tuple(images.shape[1:])} on "
            f"{device}: {first_line}"
        ) from error
    return module


def _convert(model: nn.Module, settings: Settings) -> nn.Module:
    return convert(
        model, settings.ratio, keep="boundary", relocate=settings.relocate, hoist_padding=settings.hoist_padding
    )


@contextmanager
def _no_effect_warnings_as(notes: list[str]) -> Iterator[None]:
    """Append the messages of NoEffectWarnings to ``notes``; issue other warnings again on exit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoEffectWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, NoEffectWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
