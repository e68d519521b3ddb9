"""The settings that a sensitivity table depends on, as text that is the same in every process."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.atomic_files import check_folder
from nmconv.errors import FileError
from nmconv.fitting import Loss
from nmconv.observing import Images
from nmconv.searching.search_space import SearchSpace
from nmconv.searching.table import Sensitivity

__all__ = ["check_settings", "load_or_create", "settings_of", "settings_with_images"]

_MAX_DEPTH = 5  # of nested values that a loss function depends on


def settings_of(space: SearchSpace, image: Tensor, form: str, backend: str | None, loss: Loss | None) -> dict[str, str]:
    """Return the settings that a table must share with a search, whichever images it was measured on."""
    return {
        "form": form,
        "backend": str(backend),
        "loss": _identity_of_loss(loss),
        "weights": _hash_of_weights(space.model),
        "image": "x".join(map(str, image.shape[1:])),
    }


def settings_with_images(
    space: SearchSpace, images: Images, form: str, backend: str | None, loss: Loss | None
) -> dict[str, str]:
    """Return all settings of a table, which measuring must share to be resumed."""
    return {
        **settings_of(space, images.first(), form, backend, loss),
        "max_convs": str(space.max_convs),
        "images": f"{images.count} + {images.held}, {_hash_of_images(images)}",
    }


def check_settings(table: Sensitivity, settings: Mapping[str, str], name: str, way_out: str) -> None:
    """Raise FileError if a table was measured with other settings."""
    for key, value in settings.items():
        if table.setting.get(key) != value:
            raise FileError(f"{name} was measured with {key} {table.setting.get(key)!r}, not {value!r}: {way_out}")


def load_or_create(space: SearchSpace, settings: dict[str, str], path: str | os.PathLike[str] | None) -> Sensitivity:
    """Load the table at a path to resume it, or create an empty one if there is none.

    Raises:
        FileError: If it is the table of another model or of other settings, or the folder does not exist.
    """
    fresh = Sensitivity(space.plan.model, space.plan.fingerprint, settings, {})
    if path is None:
        return fresh
    check_folder(path)
    if not Path(path).exists():
        return fresh
    table = Sensitivity.load(path)
    if table.fingerprint != fresh.fingerprint:
        raise FileError(
            f"{os.fspath(path)} holds the table of a {table.model} with fingerprint {table.fingerprint}, not of this "
            f"{fresh.model} with {fresh.fingerprint}: give another path"
        )
    check_settings(table, settings, os.fspath(path), "give another path")
    return table


def _identity_of_loss(loss: Loss | None) -> str:
    """Return a name that depends on the function's code, defaults, closure, attributes and globals."""
    if loss is None:
        return "default"
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    return f"{name} {_short(hashlib.sha256(repr(_description(loss, _MAX_DEPTH)).encode()))}"


def _description(value: Any, depth: int) -> Any:
    """Return plain data whose repr is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(_bytes_of(value)).hexdigest()]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, (ModuleType, BuiltinFunctionType, type)):
        return getattr(value, "__name__", kind)
    return [kind, *(_description(part, depth - 1) for part in _parts_of(value))] if depth else kind


def _parts_of(value: Any) -> list[Any]:
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, FunctionType):
        return [
            value.__code__,
            value.__defaults__,
            value.__kwdefaults__,
            [cell.cell_contents for cell in value.__closure__ or ()],
            [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__],
        ]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, (list, tuple)):
        return list(value)
    return [vars(value)] if hasattr(value, "__dict__") else []


def _hash_of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        if isinstance(value, Tensor) and value.is_floating_point():
            digest.update(_bytes_of(value))
    return _short(digest)


def _hash_of_images(images: Images) -> str:
    digest = hashlib.sha256()
    for batch, held in images.batches():
        digest.update(f"{held} {tuple(batch.shape[1:])} {batch.dtype}".encode())
        digest.update(_bytes_of(batch))
    return _short(digest)


def _bytes_of(value: Tensor) -> bytes:
    data: bytes = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return data


def _short(digest: Any) -> str:
    text: str = digest.hexdigest()[:8]
    return text
