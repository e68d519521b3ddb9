"""Reading a safetensors file: what it declares is looked at before any tensor is made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nmconv.io.content import KEY
from nmconv.io.problems import DamagedFile

__all__ = ["DTYPES", "Entry", "File", "kind_of", "opened"]

_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items()}


def kind_of(dtype: torch.dtype) -> str:
    """What must agree between file and model: ``floating``, ``complex``, ``bool`` or ``integer``."""
    if dtype.is_floating_point:
        return "floating"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"


@dataclass(frozen=True)
class Entry:
    """What the file declares of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class File:
    """An open file.

    Attributes:
        entries: Its tensors by name.
        text: Its metadata of ours.

    Raises:
        Damaged: If it has none of ours, or tensors that torch does not have.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.text: str = _text(reader)
        names: list[str] = reader.keys()
        self.entries = {name: _entry(name, reader.get_slice(name)) for name in names}

    def tensor(self, name: str) -> Tensor:
        """The tensor; it may share memory with the file."""
        found: Tensor = self._reader.get_tensor(name)
        return found


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[File]:
    """The file, open.

    Raises:
        OSError: If it cannot be opened.
        Damaged: If it is no safetensors file of ours.
    """
    with open(path, "rb"):
        pass  # the reader's own errors do not tell a missing file from a bad one
    try:
        reader = safe_open(os.fspath(path), framework="pt")
    except Exception as error:
        raise DamagedFile(f"it is no whole safetensors file: {error}") from error
    with reader as entered:
        yield File(entered)


def _text(reader: Any) -> str:
    metadata: Any = reader.metadata()
    if not metadata or KEY not in metadata:
        raise DamagedFile("it is a safetensors file, but not one that nmconv.save wrote")
    return str(metadata[KEY])


def _entry(name: str, held: Any) -> Entry:
    code = str(held.get_dtype())
    if code not in DTYPES:
        raise DamagedFile(f"its tensor {name!r} is of type {code}, which no state dict of ours holds")
    return Entry(tuple(held.get_shape()), DTYPES[code])
