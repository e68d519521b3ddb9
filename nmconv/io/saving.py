"""Saving: state dict, plan and merges of any model, written as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from nmconv.errors import FileError, ModelTypeError
from nmconv.io.content import KEY, Content, to_text
from nmconv.io.state import state_of
from nmconv.io.tensor_file import DTYPES
from nmconv.merging import get_merges
from nmconv.surgery import check_plain, get_plan, get_slopes

__all__ = ["save"]

_PLAIN = (Tensor, nn.Parameter, getattr(nn, "Buffer", Tensor))


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to one safetensors file: its state dict, and in the metadata its plan and its merges.

    Any model will do: converted, merged, both or neither, in any dtype and on any device. :func:`nmconv.load` reads it.
    The file is written beside ``path`` first and takes its place when it is whole, so that a failure leaves what was
    there before.

    Args:
        model: What :func:`nmconv.convert` or :func:`nmconv.merge` returned, trained or not.
        path: Where to; ``.safetensors`` is the usual ending. An existing file is replaced.

    Raises:
        ModelTypeError: If it is no module, or wrapped or scripted; if its state dict holds what a safetensors file
            cannot; or if a part of it was converted or merged by itself.
        FileError: If the tensors cannot be written.
        OSError: If the folder does not exist or the disk is full.
    """
    check_plain(model, "save", compiled=True)
    for name, module in model.named_modules():
        plan = get_plan(module)
        if name and (get_merges(module) or (plan is not None and plan.changes_any)):
            raise ModelTypeError(
                f"{name!r} in the model was converted or merged by itself: save it by itself, or convert and merge the "
                "whole model"
            )
    tensors, aliases = _distinct(state_of(model))
    content = Content(
        type(model).__name__, get_plan(model), get_merges(model), aliases, tuple(get_slopes(model).items())
    )
    metadata = {KEY: to_text(content)}

    def write(temporary: str) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise FileError(f"{os.fspath(path)} cannot be written: {error}; is the disk full?") from error

    _replacing(os.path.realpath(path), write)


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[tuple[str, str], ...]]:
    """Tensors that share no memory, each whole and contiguous; and which names are others' tensors."""
    tensors: dict[str, Tensor] = {}
    aliases: list[tuple[str, str]] = []
    known: dict[Any, str] = {}
    storages: set[Any] = set()
    for name, value in state.items():
        _check_storable(name, value)
        value = value.detach()
        storage = (value.device, value.untyped_storage().data_ptr())
        view = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype, value.is_neg())
        if value.numel() and view in known:
            aliases.append((name, known[view]))
            continue
        known[view] = name
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        if not whole or storage in storages or value.is_neg():
            value = value.clone(memory_format=torch.contiguous_format).resolve_neg()
        storages.add(storage)
        tensors[name] = value
    return tensors, tuple(aliases)


def _check_storable(name: str, value: Tensor) -> None:
    if type(value) not in _PLAIN or value.layout != torch.strided or value.is_quantized:
        what = type(value).__name__ if type(value) not in _PLAIN else "sparse or quantized tensor"
        raise ModelTypeError(f"{name!r} is a {what}, which a safetensors file cannot hold: save before quantizing")
    if value.dtype not in DTYPES.values() or value.is_conj():
        raise ModelTypeError(f"{name!r} is of type {value.dtype}, which a safetensors file cannot hold")
    if value.is_meta:
        raise ModelTypeError(f"{name!r} is on the meta device and has no numbers to save: load or draw some first")


def _replacing(path: str, write: Callable[[str], None]) -> None:
    """Let ``write`` make a temporary file beside ``path``, and put it in the place of what is there."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".nmconv-{secrets.token_hex(8)}.tmp")
    mode = None
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(os.stat(path).st_mode)
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        usual = stat.S_IMODE(os.stat(temporary).st_mode)
        write(temporary)
        os.chmod(temporary, usual if mode is None else mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
