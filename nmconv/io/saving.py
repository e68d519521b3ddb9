"""Saving: the state dict, plan and merges of any model, written completely or not at all."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from nmconv.atomic_files import check_folder, write_atomically
from nmconv.errors import FileError, ModelTypeError
from nmconv.io.content import KEY, FileContent, to_text
from nmconv.io.state import state_of
from nmconv.io.tensor_file import DTYPES
from nmconv.merging import get_merges
from nmconv.surgery import check_plain, get_plan, get_slopes

__all__ = ["save"]

_STORABLE = (Tensor, nn.Parameter, getattr(nn, "Buffer", Tensor))


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to one safetensors file: its state dict, and its plan and merges in the metadata.

    The model may be converted, merged, both or neither, in any dtype and on any device. :func:`nmconv.load` reads the
    file. It is written to a temporary file next to ``path``, which replaces it only when complete, so that a failure
    leaves an existing file as it was.

    Args:
        model: A result of :func:`nmconv.convert` or :func:`nmconv.merge`, trained or not, or any other model.
        path: Path of the file, usually ending in ``.safetensors``. An existing file is replaced.

    Raises:
        ModelTypeError: If ``model`` is not an ``nn.Module``, is wrapped or scripted, if its state dict contains what a
            safetensors file cannot hold, or if a part of it was converted or merged separately.
        FileError: If the folder does not exist, or the tensors cannot be written.
        OSError: If the disk is full.

    Example:
        >>> import os, tempfile
        >>> import torch.nn as nn
        >>> import nmconv
        >>> from safetensors import safe_open
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.safetensors")
        ...     nmconv.save(nmconv.convert(model, "2:1"), path)
        ...     with safe_open(path, "pt") as file:
        ...         sorted(file.keys())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    check_plain(model, "save", compiled=True)
    check_folder(path)
    for name, module in model.named_modules():
        plan = get_plan(module)
        if name and (get_merges(module) or (plan is not None and plan.changes_any)):
            raise ModelTypeError(
                f"{name!r} in the model was converted or merged by itself: save it by itself, or convert and merge the "
                "whole model"
            )
    tensors, aliases = _without_aliases(state_of(model))
    slopes = tuple(get_slopes(model).items())
    content = FileContent(type(model).__name__, get_plan(model), get_merges(model), aliases, slopes)
    metadata = {KEY: to_text(content)}

    def write(temporary: str) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise FileError(f"{os.fspath(path)} cannot be written: {error}; is the disk full?") from error

    write_atomically(path, write)


def _without_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[tuple[str, str], ...]]:
    """Return tensors that share no memory, each contiguous, and pairs of a name and the earlier name of its tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: list[tuple[str, str]] = []
    names: dict[Any, str] = {}  # by view
    storages: set[Any] = set()
    for name, value in state.items():
        _check_storable(name, value)
        value = value.detach()
        storage = (value.device, value.untyped_storage().data_ptr())
        view = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype, value.is_neg())
        if value.numel() and view in names:
            aliases.append((name, names[view]))
            continue
        names[view] = name
        is_whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        if not is_whole or storage in storages or value.is_neg():
            value = value.clone(memory_format=torch.contiguous_format).resolve_neg()
        storages.add(storage)
        tensors[name] = value
    return tensors, tuple(aliases)


def _check_storable(name: str, value: Tensor) -> None:
    if type(value) not in _STORABLE or value.layout != torch.strided or value.is_quantized:
        what = type(value).__name__ if type(value) not in _STORABLE else "sparse or quantized tensor"
        raise ModelTypeError(f"{name!r} is a {what}, which a safetensors file cannot hold: save before quantizing")
    if value.dtype not in DTYPES.values() or value.is_conj():
        raise ModelTypeError(f"{name!r} is of type {value.dtype}, which a safetensors file cannot hold")
    if value.is_meta:
        raise ModelTypeError(f"{name!r} is on the meta device and has no numbers to save: load or draw some first")
