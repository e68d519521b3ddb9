"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress

from nmconv.errors import FileError

__all__ = ["check_folder", "write_atomically"]


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise FileError if the folder of a file does not exist."""
    if not os.path.isdir(os.path.dirname(os.path.realpath(path))):
        raise FileError(f"{os.fspath(path)!r} cannot be written: its folder does not exist; create it first")


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, which then replaces ``path``, synchronized to the disk.

    Whatever ``write`` raises, an existing file stays as it was. Links are followed, and an existing file's mode stays.

    Raises:
        FileError: If the folder does not exist.
        OSError: If the disk is full, or the folder cannot be written to.
    """
    check_folder(path)
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".nmconv-{secrets.token_hex(8)}.tmp")
    mode = None
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(os.stat(path).st_mode)
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        default_mode = stat.S_IMODE(os.stat(temporary).st_mode)
        write(temporary)
        os.chmod(temporary, default_mode if mode is None else mode)
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
