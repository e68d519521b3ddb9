"""Tables of measurements in JSON files: atomic writes, and reads that check what they find."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from nmconv.atomic_files import write_atomically
from nmconv.errors import FileError

__all__ = ["nan_if_null", "read_json", "write_json"]


def write_json(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Write nested plain data to a file atomically; numbers that are not finite become null.

    Raises:
        FileError: If the folder does not exist.
        OSError: If the file cannot be written.
    """
    text = json.dumps(_finite(data), indent=1, allow_nan=False)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def read_json(path: str | os.PathLike[str], version_key: str, version: int, maker: str) -> dict[str, Any]:
    """Return what :func:`write_json` wrote to a file, without the version.

    Args:
        path: The file.
        version_key: The key of the version; it identifies the kind of table.
        version: The expected version.
        maker: The function that makes such a table, for messages, such as ``nmconv.sensitivity``.

    Raises:
        FileError: If the file is something else, or of another version.
        OSError: If the file cannot be opened.
    """
    name = os.fspath(path)
    with open(name, encoding="utf-8") as file:
        try:
            data = json.load(file)
        except ValueError as error:
            raise FileError(f"{name} is not a table of {maker} ({error}): measure again") from error
    if not isinstance(data, dict) or version_key not in data:
        raise FileError(f"{name} is not a table of {maker} (it has no {version_key!r}): measure again")
    found = data.pop(version_key)
    if found != version:
        raise FileError(
            f"{name} is a table of version {found!r}, and this nmconv reads {version}: measure again with {maker}"
        )
    return data


def nan_if_null(value: Any) -> Any:
    """Return NaN for null, else the value."""
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    """Return nested data with None for numbers that are not finite, and lists for tuples."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
