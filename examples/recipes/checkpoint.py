"""Checkpoints on disk: the newest file and the one before it."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

DIGEST = hashlib.sha256().digest_size


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; on exit, sync it to disk and move it to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def previous(path: Path) -> Path:
    """Return the path of the checkpoint before the one at `path`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def write(path: Path, state: dict[str, Any]) -> None:
    """Write the state's SHA-256 and the state, and keep the existing file as the previous one.

    Whenever the process is killed, there is a complete file at `path` or at `previous(path)`.
    """
    content = io.BytesIO()
    torch.save(state, content)
    with replacing(path) as file:
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
        if path.exists() and is_whole(path.read_bytes()):
            os.replace(path, previous(path))


def is_whole(content: bytes) -> bool:
    """Return whether a file's content matches its SHA-256."""
    return hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of the weights."""
    sha = hashlib.sha256()
    for name, value in state.items():
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Return the newest complete state, or None if there is no file.

    Raises:
        ValueError: If there are files, but no complete one.
    """
    files = [each for each in (path, previous(path)) if each.exists()]
    for file in files:
        content = file.read_bytes()
        if is_whole(content):
            return torch.load(io.BytesIO(content[DIGEST:]), map_location=device, weights_only=True)
        print(f"{file} is damaged and is not used", flush=True)
    if files:
        raise ValueError(
            f"no checkpoint in {path.parent} is complete: delete {', '.join(map(str, files))} to start again"
        )
    return None
