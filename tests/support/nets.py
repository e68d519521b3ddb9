"""Tiny hand-written nets, and plans written down in a few words: for tests/finding and tests/planning.

A plan is written one line per site: ``id action convs place role``. ``#1`` may be left off an id; convs are joined by
``+``; the place is a letter for the chain, in the order in which the lines first name chains, and the number of the
unit; ``-`` stands for none; the role may be left off, and is not compared then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import nmconv

torch.set_num_threads(1)


def net(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module whose class has this very forward; parts are children, parameters, buffers (tensors) and attributes."""
    model = type("Net", (nn.Module,), {"forward": forward, "__module__": __name__})()
    for name, part in parts.items():
        if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
            model.register_buffer(name, part)
        else:
            setattr(model, name, part)
    return model


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def convs(names: str) -> dict[str, nn.Module]:
    return {name: conv() for name in names.split()}


def relus(names: str, inplace: bool = False) -> dict[str, nn.Module]:
    return {name: nn.ReLU(inplace) for name in names.split()}


def norms(names: str) -> dict[str, nn.Module]:
    return {name: nn.BatchNorm2d(4) for name in names.split()}


def rows(plan: nmconv.Plan) -> list[tuple[str, str, str, str, str]]:
    """The plan's sites as the lines above say them."""
    letters: dict[int, str] = {}
    found = []
    for site in plan.sites:
        place = "-"
        if site.chain is not None:
            letters.setdefault(site.chain, chr(ord("A") + len(letters)))
            place = f"{letters[site.chain]}{'-' if site.unit is None else site.unit}"
        assert site.reason, f"{site.id} has no reason"
        found.append((site.id, site.action, "+".join(site.convs) or "-", place, site.role or "-"))
    return found


def written(text: str) -> list[tuple[str, ...]]:
    lines = [line.split() for line in text.strip().splitlines()]
    return [(name if "#" in name else f"{name}#1", *rest) for name, *rest in lines]


def inverted(residual: bool) -> nn.Module:
    """An inverted bottleneck: three convolutions with norms, the first two with activations."""

    def forward(self, x):
        y = self.n3(self.c3(self.a2(self.n2(self.c2(self.a1(self.n1(self.c1(x))))))))
        return x + y if residual else y

    return net(forward, **convs("c1 c2 c3"), **norms("n1 n2 n3"), **relus("a1 a2"))


def expect(model: nn.Module, text: str, ratio: Any = "2:1", *, convs: int | None = None, **options: Any) -> nmconv.Plan:
    """Plan the model and hold the plan against what is written; ``convs`` is the number on the main path."""
    plan = nmconv.make_plan(model, ratio, **{"keep": "boundary", **options})
    wanted = written(text)
    found = [row[: len(want)] for row, want in zip(rows(plan), wanted, strict=False)] + rows(plan)[len(wanted) :]
    assert found == wanted, f"\n{plan}"
    assert plan.untraced == ()
    if convs is not None:
        assert plan.counts.convs == convs
    real = [row for row in wanted if row[1] != "skip"]
    if all(site.modes == "both" for site in plan.sites):
        assert plan.counts.activations_before == len(real)
        assert plan.counts.activations_after == sum(row[1] != "drop" for row in real)
    return plan


def skipped(plan: nmconv.Plan, name: str) -> str:
    """The reason why an activation is no site."""
    site = next(site for site in plan.sites if site.id == name)
    assert site.action == "skip"
    return site.reason
