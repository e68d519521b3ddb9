"""The contents of a file besides its tensors, as one JSON text in the file's metadata."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from nmconv.errors import PlanError
from nmconv.io.problems import DamagedFile, UnsupportedFormat
from nmconv.merging import Merge
from nmconv.planning import Plan, from_plain

__all__ = ["KEY", "FileContent", "from_text", "to_text"]

KEY = "nmconv"  # of the text in the file's metadata
_FORMAT = 6
_MAX_LENGTH = 2**24  # in characters; a model of a thousand sites takes less than one million


@dataclass(frozen=True)
class FileContent:
    """The contents of a file besides its tensors.

    Attributes:
        model: Class name of the model, for messages.
        plan: The plan that the model was converted by, or None.
        merges: What was merged, one tuple for each call of merge.
        aliases: Pairs of a name in the state dict and the name under which the file has its tensor.
        slopes: For a gradual model, pairs of a site's id and its slope.
    """

    model: str
    plan: Plan | None
    merges: tuple[tuple[Merge, ...], ...]
    aliases: tuple[tuple[str, str], ...]
    slopes: tuple[tuple[str, float], ...] = ()


def to_text(content: FileContent) -> str:
    """Return the content as JSON."""
    from nmconv import __version__

    plan = None if content.plan is None else json.loads(content.plan.to_json())
    fields = {
        "model": content.model,
        "plan": plan,
        "merges": [[asdict(merge) for merge in merges] for merges in content.merges],
        "aliases": content.aliases,
    }
    if content.slopes:
        fields["slopes"] = content.slopes
    return json.dumps({"format": _FORMAT, "nmconv": __version__, **fields})


def from_text(text: str) -> FileContent:
    """Parse the result of :func:`to_text`; types are checked, values are not.

    Raises:
        UnsupportedFormat: If it has another format version.
        DamagedFile: If it is anything else.
    """
    if len(text) > _MAX_LENGTH:
        raise DamagedFile(f"its metadata has {len(text)} characters, more than any model needs ({_MAX_LENGTH})")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"its metadata is not JSON: {error}") from error
    if not isinstance(data, dict) or type(data.get("format")) is not int:
        raise DamagedFile("its metadata has no format")
    if data["format"] != _FORMAT:
        raise UnsupportedFormat(f"it has format {data['format']}, and this nmconv reads {_FORMAT}{_writer(data)}")
    expected = {"format", "nmconv", "model", "plan", "merges", "aliases"}
    if data.keys() - {"slopes"} != expected:
        raise DamagedFile(f"its metadata has missing or unknown fields: expected are {', '.join(sorted(expected))}")
    try:
        plan = None if data["plan"] is None else Plan.from_json(json.dumps(data["plan"]))
        return FileContent(
            model=from_plain(str, data["model"], "model"),
            plan=plan,
            merges=from_plain(tuple[tuple[Merge, ...], ...], data["merges"], "merges"),
            aliases=from_plain(tuple[tuple[str, str], ...], data["aliases"], "aliases"),
            slopes=from_plain(tuple[tuple[str, float], ...], data.get("slopes", []), "slopes"),
        )
    except (PlanError, TypeError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{error}{_writer(data)}") from error


def _writer(data: dict[str, Any]) -> str:
    """Return a note on the version that wrote the file, or ""."""
    version = data.get("nmconv")
    is_version = isinstance(version, str) and re.fullmatch(r"\d+(\.\w{1,20}){0,5}", version, re.ASCII)
    return f" (it was written by nmconv {version})" if is_version else ""
