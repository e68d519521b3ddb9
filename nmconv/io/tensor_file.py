"""Reading a safetensors file; its declarations are checked before any tensor is allocated."""

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
    """Return what must agree between file and model: ``floating``, ``complex``, ``bool`` or ``integer``."""
    if dtype.is_floating_point:
        return "floating"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"


@dataclass(frozen=True)
class Entry:
    """The declaration of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class File:
    """An open file.

    Attributes:
        entries: The declarations of its tensors by name.
        text: The text that :func:`nmconv.save` put into its metadata.

    Raises:
        DamagedFile: If it has no such text, or has tensors of types that torch does not have.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.text: str = _text_in(reader)
        names: list[str] = reader.keys()
        self.entries = {name: _entry(name, reader.get_slice(name)) for name in names}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, which may share memory with the file."""
        tensor: Tensor = self._reader.get_tensor(name)
        return tensor


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[File]:
    """Open a file.

    Raises:
        OSError: If it cannot be opened.
        DamagedFile: If it is not a safetensors file written by :func:`nmconv.save`.
    """
    with open(path, "rb"):
        pass  # since safe_open does not distinguish a missing file from a damaged one
    try:
        reader = safe_open(os.fspath(path), framework="pt")
    except Exception as error:
        raise DamagedFile(f"it is not a complete safetensors file: {error}") from error
    with reader as entered:
        yield File(entered)


def _text_in(reader: Any) -> str:
    metadata: Any = reader.metadata()
    if not metadata or KEY not in metadata:
        raise DamagedFile("it is a safetensors file, but not one that nmconv.save wrote")
    return str(metadata[KEY])


def _entry(name: str, declared: Any) -> Entry:
    code = str(declared.get_dtype())
    if code not in DTYPES:
        raise DamagedFile(f"its tensor {name!r} is of type {code}, which nmconv.save never writes")
    return Entry(tuple(declared.get_shape()), DTYPES[code])
