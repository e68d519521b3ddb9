"""A model's state dict and a file's tensors: compared before anything is allocated, then loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nmconv.errors import ModelTypeError
from nmconv.io.problems import DamagedFile, ForeignFile
from nmconv.io.replaying import TargetDevices
from nmconv.io.tensor_file import Entry, File, kind_of
from nmconv.surgery import is_slope

__all__ = ["fill", "sources_of", "state_of"]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state dict with the tensors themselves instead of detached ones.

    Raises:
        ModelTypeError: If it contains anything but tensors, or a lazy parameter.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelTypeError(
                f"{name!r} in the model's state dict is a {type(value).__name__}, and a safetensors file holds only "
                "tensors: save it separately"
            )
        if is_lazy(value):
            raise ModelTypeError(f"{name!r} has no shape yet: run the model once before saving or loading it")
    return state


def sources_of(state: Mapping[str, Tensor], file: File, aliases: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Return for every name in the state dict the name under which the file has its tensor.

    Args:
        state: The model's state dict.
        file: The file.
        aliases: Pairs of a name in the state dict and the name in the file, where they differ.

    Raises:
        DamagedFile: If the file contradicts itself.
        ForeignFile: If a name, shape or kind differs, or if one tensor of the model is several in the file.
    """
    sources = {name: name for name in file.entries}
    for name, source in aliases:
        if name in sources or source not in file.entries:
            raise DamagedFile(f"its metadata says that {name!r} is {source!r}, which contradicts its tensors")
        sources[name] = source
    missing, unexpected = sorted(state.keys() - sources.keys()), sorted(sources.keys() - state.keys())
    if missing or unexpected:
        parts = [f"lacks {_few(missing)}"] * bool(missing) + [f"has {_few(unexpected)} too many"] * bool(unexpected)
        raise ForeignFile(f"it {' and '.join(parts)}")
    first_names: dict[int, str] = {}  # by id of a tensor
    for name, value in state.items():
        _check_entry(name, value, file.entries[sources[name]])
        first = first_names.setdefault(id(value), name)
        if sources[first] != sources[name] and value.numel():
            raise ForeignFile(f"{first!r} and {name!r} are one tensor in this model and two in it")
    return sources


def fill(model: nn.Module, file: File, sources: Mapping[str, str], devices: TargetDevices) -> None:
    """Load the tensors into the model's own, in their dtypes and on their devices; allocate those on the meta device.

    Args:
        model: The model, changed in place.
        file: The file.
        sources: From :func:`sources_of`.
        devices: For modules on the meta device, where their tensors belong; by default the CPU.

    Raises:
        ForeignFile: If the model does not take the tensors.
        ModelTypeError: If a buffer on the meta device is in no state dict.
    """
    _materialize(model, devices)
    state: Any = OrderedDict((name, file.tensor(source)) for name, source in sources.items())
    # The versions of the model's modules.
    state._metadata = getattr(model.state_dict(keep_vars=True), "_metadata", None)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ForeignFile(f"the model does not take its tensors: {error}") from error
    _check_overlaps(model, state)


def _check_overlaps(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ForeignFile if tensors that share memory have overwritten each other with other values."""
    sharing: dict[int, dict[str, Tensor]] = {}
    for name, value in state_of(model).items():
        sharing.setdefault(value.untyped_storage()._cdata, {})[name] = value
    for group in sharing.values():
        for name, value in group.items() if len(group) > 1 else ():
            if not torch.equal(_bytes(value), _bytes(state[name].to(value))):
                raise ForeignFile(
                    f"{', '.join(map(repr, group))} share memory in this model and contradict one another in it"
                )


def _bytes(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).contiguous().view(torch.uint8)


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def _check_entry(name: str, value: Tensor, entry: Entry) -> None:
    if tuple(value.shape) != entry.shape:
        raise ForeignFile(f"{name!r} has the shape {entry.shape} in it and {tuple(value.shape)} here")
    if kind_of(value.dtype) != kind_of(entry.dtype):
        raise ForeignFile(f"{name!r} has the type {entry.dtype} in it and {value.dtype} here")


def _materialize(model: nn.Module, devices: TargetDevices) -> None:
    """Allocate every tensor on the meta device, shared ones once.

    Raises:
        ModelTypeError: If a buffer on the meta device is in no state dict, so that its contents are unknown.
    """
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in state_of(model) and not is_slope(name):
            raise ModelTypeError(
                f"the buffer {name!r} is on the meta device and in no state dict, so that no file has its numbers: "
                "build the model on the CPU"
            )
    allocated: dict[int, tuple[Tensor, Tensor]] = {}  # the old tensors are kept alive, since their ids are the keys
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None and value.is_meta:
                    if id(value) not in allocated:
                        device = devices.get(module, torch.device("cpu"))
                        allocated[id(value)] = value, _with_memory(value, device)
                    tensors[name] = allocated[id(value)][1]  # type: ignore[assignment]


def _with_memory(value: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(value.detach(), device="cpu" if device.type == "meta" else device)
    if not isinstance(value, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, value.requires_grad)
    parameter.__dict__.update(value.__dict__)  # attributes that mark it for optimizers
    return parameter
