"""What tests of saving share: small nets, files taken apart without nmconv or safetensors, and what must not change.

A safetensors file is eight bytes of length, a JSON header, and the tensors' bytes one after the other.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.set_num_threads(1)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16} | {
    "I64": torch.int64,
    "BOOL": torch.bool,
}


class Rep(nn.Module):
    """RepVGG's block: a 3x3, a 1x1 and the identity, each with a norm, summed; then what ``act`` is."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.point = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norms[0](self.wide(x)) + self.norms[1](self.point(x)) + self.norms[2](x))


class Net(nn.Module):
    """A bit of everything: norms, a functional and a repeated activation, a border, a sum, a tied weight, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.wide = nn.Conv2d(4, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 4, 1)
        self.rep = Rep(4, nn.ReLU())
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.head.weight
        whole = torch.arange(6.0)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[2:4])
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("none", None)
        self.register_buffer("mean", torch.ones(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x - self.mean)))
        x = F.relu(self.wide(x))
        x = self.act(self.deep(x))
        x = F.relu(self.point(x))
        return self.tied(self.head(self.rep(x).mean((2, 3))))

    def restore(self, path: str) -> None:
        """What a file must never bring about."""
        Path(path).write_text("called")


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with every floating-point number drawn, variances above zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                low, high = (0.7, 1.4) if name.endswith("running_var") else (-0.5, 0.5)
                value.copy_(torch.empty(value.shape).uniform_(low, high, generator=generator))
    return model.eval()


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that must stay: modules, classes, modes, attributes, and tensors with their bytes."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        found.append((name, id(module), type(module), {key: id(value) for key, value in vars(module).items()}))
        found += [list(part.items()) for part in (module._modules,)]
        found += [[(key, id(value)) for key, value in part.items()] for part in (module._parameters, module._buffers)]
    for value in tensors_of(model):
        size = (value.dtype, value.device, value.shape, value.stride(), value.requires_grad, value.grad is None)
        found.append((*size, value.data_ptr(), None if value.is_meta else bits(value)))
    return found


def bits(value: Tensor) -> bytes:
    """The tensor's bytes, as a file has them."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def said(data: bytes) -> dict[str, Any]:
    """What the metadata says."""
    return json.loads(parts_of(data)[0]["__metadata__"]["nmconv"])


def saying(data: bytes, content: Any) -> bytes:
    """The file with other metadata: a value, or text as it is."""
    header, body = parts_of(data)
    header["__metadata__"]["nmconv"] = content if isinstance(content, str) else json.dumps(content)
    return file_of(header, body)


def edited(data: bytes, change: Callable[[Any], object]) -> bytes:
    """The file with its metadata changed in place by a function."""
    content = said(data)
    change(content)
    return saying(data, content)


def held(data: bytes) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """The file's tensors, aliases included: dtype, shape and bytes."""
    header, body = parts_of(data)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = (DTYPES[entry["dtype"]], tuple(entry["shape"]), body[begin:end])
    return found | {name: found[source] for name, source in said(data)["aliases"]}


def state(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """The model's state dict in the same form."""
    return {name: (value.dtype, tuple(value.shape), bits(value)) for name, value in model.state_dict().items()}


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)]


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
