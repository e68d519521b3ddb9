"""What tests of fitting share: nets converted by a word, disturbed, and least squares on rows built with ``F.unfold``.

``linear()`` is an activation for nmconv, and the identity for numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmconv


def linear() -> nn.Module:
    return nn.LeakyReLU(1.0)


def dropped(net: nn.Module, *keep: str, **kernels: Any) -> nn.Module:
    """All activations gone but those kept; ``_`` stands for a comma in the kernels' names."""
    plan = nmconv.make_plan(net, "2:1", keep="boundary")
    plan = plan.edit({site.id: "keep" if site.name in keep else "drop" for site in plan.sites if site.action != "skip"})
    if kernels:
        plan = plan.with_kernels({tuple(names.split("_")): size for names, size in kernels.items()})
    return nmconv.apply_plan(net, plan)


def disturbed(model: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return model


def report(model: nn.Module) -> nmconv.Fit:
    found = nmconv.get_fit(model)
    assert found is not None
    return found


def rows_of(x: Tensor, kernel: int, padding: int = 0, stride: int = 1) -> Tensor:
    """``[positions of all images, channels · kernel²]``."""
    return F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2).flatten(0, 1)


def targets_of(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2).flatten(0, 1)


def least_squares(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight ``[columns, outputs]`` and constant."""
    ones = torch.ones(len(rows), 1, dtype=rows.dtype)
    found = torch.linalg.lstsq(torch.cat([rows, ones], 1), targets).solution
    return found[:-1], found[-1]


def as_it_is(*models: nn.Module) -> list[Any]:
    """All that must not change: modules, classes, modes, attributes, hooks, tensors and their bits; random numbers."""
    found: list[Any] = []
    for model in models:
        for name, module in model.named_modules(remove_duplicate=False):
            found.append((name, id(module), type(module), module.training, sorted(vars(module))))
            for key, value in sorted(vars(module).items()):
                if key.endswith("_hooks") and isinstance(value, dict):
                    found.append((name, key, [id(hook) for hook in value.values()]))
        for kind in (model.named_parameters, model.named_buffers):
            for name, value in kind(remove_duplicate=False):
                raw = value.detach().flatten().contiguous().view(torch.uint8).tolist()
                found.append((name, id(value), value.requires_grad, value.grad, value.dtype, value.shape, raw))
    return [*found, torch.is_grad_enabled(), torch.get_rng_state().tolist()]
