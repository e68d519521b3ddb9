"""A model's state and a file's: compared before anything is allocated, then the one filled from the other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nmconv.errors import ModelTypeError
from nmconv.io.problems import DamagedFile, ForeignFile
from nmconv.io.replaying import Homes
from nmconv.io.tensor_file import Entry, File, kind_of
from nmconv.surgery import is_slope

__all__ = ["fill", "sources_of", "state_of"]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model's state dict themselves.

    Raises:
        ModelTypeError: If there is anything else in it.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelTypeError(
                f"{name!r} in the model's state dict is a {type(value).__name__}, and a safetensors file holds tensors "
                "only: keep it apart"
            )
        if is_lazy(value):
            raise ModelTypeError(f"{name!r} has no shape yet: run the model once before saving or loading it")
    return state


def sources_of(state: Mapping[str, Tensor], file: File, aliases: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """From every name in the state dict to the name under which the file has the tensor.

    Raises:
        Damaged: If the file contradicts itself.
        Foreign: If a name, shape or kind differs, or what is one tensor in the model is several in the file.
    """
    sources = {name: name for name in file.entries}
    for name, source in aliases:
        if name in sources or source not in file.entries:
            raise DamagedFile(f"its metadata says that {name!r} is {source!r}, which its tensors contradict")
        sources[name] = source
    missing, unexpected = (sorted(one - other) for one, other in _both(state.keys(), sources.keys()))
    if missing or unexpected:
        parts = [f"lacks {_few(missing)}"] * bool(missing) + [f"has {_few(unexpected)} too many"] * bool(unexpected)
        raise ForeignFile(f"it {' and '.join(parts)}")
    tied: dict[int, str] = {}
    for name, value in state.items():
        _check_entry(name, value, file.entries[sources[name]])
        first = tied.setdefault(id(value), name)
        if sources[first] != sources[name] and value.numel():
            raise ForeignFile(f"{first!r} and {name!r} are one tensor in this model and two in it")
    return sources


def fill(model: nn.Module, file: File, sources: Mapping[str, str], homes: Homes) -> None:
    """Load the tensors: into the model's own, in their dtypes and on their devices; new ones where they are on meta.

    Raises:
        Foreign: If the model does not take them as they are.
        ModelTypeError: If it has a buffer whose numbers are nowhere.
    """
    _materialise(model, homes)
    state: Any = OrderedDict((name, file.tensor(source)) for name, source in sources.items())
    state._metadata = getattr(model.state_dict(keep_vars=True), "_metadata", None)  # of what we have: all names agree
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ForeignFile(f"the model does not take its tensors: {error}") from error
    _check_overlaps(model, state)


def _check_overlaps(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Where several tensors of the model share memory, the last one loaded has overwritten the others."""
    sharing: dict[int, dict[str, Tensor]] = {}
    for name, value in state_of(model).items():
        sharing.setdefault(value.untyped_storage()._cdata, {})[name] = value
    for group in sharing.values():
        for name, value in group.items() if len(group) > 1 else ():
            if not torch.equal(_bits(value), _bits(state[name].to(value))):
                raise ForeignFile(
                    f"{', '.join(map(repr, group))} share memory in this model and contradict one another in it"
                )


def _bits(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).contiguous().view(torch.uint8)


def _both(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    yield one, other
    yield other, one


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def _check_entry(name: str, value: Tensor, entry: Entry) -> None:
    if tuple(value.shape) != entry.shape:
        raise ForeignFile(f"{name!r} has the shape {entry.shape} in it and {tuple(value.shape)} here")
    if kind_of(value.dtype) != kind_of(entry.dtype):
        raise ForeignFile(f"{name!r} has the type {entry.dtype} in it and {value.dtype} here")


def _materialise(model: nn.Module, homes: Homes) -> None:
    """Give every tensor on the meta device memory of its own, one for all who share it; the rest stays as it is.

    Raises:
        ModelTypeError: If a buffer is there that no state dict holds: its numbers are nowhere.
    """
    spaces: list[tuple[nn.Module, Any]] = [
        (module, space) for module in model.modules() for space in (module._parameters, module._buffers)
    ]
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one lives as long as its id is a key
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in state_of(model) and not is_slope(name):
            raise ModelTypeError(
                f"the buffer {name!r} is on the meta device and in no state dict, so that no file has its numbers: "
                "build the model on the CPU"
            )
    for module, space in spaces:
        for name, value in space.items():
            if value is not None and value.is_meta:
                if id(value) not in made:
                    made[id(value)] = value, _with_memory(value, homes.get(module, torch.device("cpu")))
                space[name] = made[id(value)][1]


def _with_memory(value: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(value.detach(), device="cpu" if device.type == "meta" else device)
    if not isinstance(value, nn.Parameter):
        return empty
    made = nn.Parameter(empty, value.requires_grad)
    made.__dict__.update(value.__dict__)  # optimizers' marks
    return made
