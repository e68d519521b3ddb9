"""A checkpoint on disk: one whole file, and the one before it."""

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
    """A file to write, which takes its place at `path` once it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def write(path: Path, state: dict[str, Any]) -> None:
    """Write the state behind its SHA-256, and keep the file that was there as the previous one.

    Whenever the process is killed, a whole file is left at `path` or at `previous(path)`.
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
    """Whether a file's content is all that was written."""
    return hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """A short text that tells weights from others."""
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest whole state, or None where there is no file at all.

    Raises:
        ValueError: If there are files, and none is whole.
    """
    files = [each for each in (path, previous(path)) if each.exists()]
    for each in files:
        content = each.read_bytes()
        if is_whole(content):
            return torch.load(io.BytesIO(content[DIGEST:]), map_location=device, weights_only=True)
        print(f"{each} is damaged, and not used", flush=True)
    if files:
        raise ValueError(f"no checkpoint in {path.parent} is whole: delete {', '.join(map(str, files))} to begin anew")
    return None
