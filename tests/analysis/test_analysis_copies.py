"""Hooks stay where they are put: a copy runs none of an ``ActivationRecorder``'s, and what stands in has its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from copies import pickled, saved
from nets import conv, net
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import nmconv

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
WAYS = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}
MORE = {**WAYS, "ema": lambda model: ModelEmaV3(model).module}


class Small(nn.Module):
    """Calls a shared module and a function; counts how often one is taken apart for a copy."""

    copied = 0

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.body = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), act, conv(4, 4), act, conv(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x)).mean((2, 3))

    def __reduce_ex__(self, protocol: int) -> object:
        Small.copied += 1
        return super().__reduce_ex__(protocol)


@pytest.mark.parametrize("way", MORE)
@pytest.mark.parametrize("gradual", [False, True])
def test_the_copy_runs_and_the_recorder_sees_nothing_of_it(way: str, gradual: bool) -> None:
    model = nmconv.convert(Small().eval(), "2:1", gradual=gradual)
    twin = MORE[way](model)
    with nmconv.ActivationRecorder(model) as recorder:
        model(X)
        made = MORE[way](model)
        with nmconv.ActivationRecorder(made) as inner:  # one of its own sees it
            assert torch.equal(made(OTHER), twin(OTHER))
            inner.step()
        model(X)
        recorder.step()
    assert (recorder.stats[0].images, inner.stats[0].images) == (8, 6)
    assert recorder.stats[0].sites[0].values == 2 * inner.stats[0].sites[0].values * 4 // 6
    assert torch.equal(made(OTHER), twin(OTHER))  # also where the recorder has gone


@pytest.mark.parametrize("way", WAYS)
def test_the_copy_holds_neither_the_recorder_nor_the_model(way: str) -> None:
    model = Small()
    with nmconv.ActivationRecorder(model):
        before = Small.copied
        WAYS[way](model)
    assert Small.copied == before + 1


@pytest.mark.parametrize("relocate", [False, True])
@pytest.mark.parametrize("gradual", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU])
def test_what_stands_in_for_a_shared_activation_has_hooks_of_its_own(
    act: type[nn.Module], gradual: bool, relocate: bool
) -> None:
    shared = act()
    model = nn.Sequential(conv(3, 4), shared, conv(4, 4), shared, conv(4, 4)).eval()
    model = nmconv.convert(model, "2:1", gradual=gradual, relocate=relocate, keep="boundary")
    found = nmconv.activation_stats(model, X)
    kept = model[:3](X)
    assert [site.site for site in found.sites] == ["1#1", "3#1"][not gradual :]
    assert found["3#1"].positive == pytest.approx(float((kept > 0).double().mean()))
    seen = []
    for at in (1, 3):
        model[at].register_forward_hook(lambda module, *_, at=at: seen.append(at))
    model(X)
    assert seen == [1, 3]


def test_what_moves_has_hooks_of_its_own() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.out(self.beside(x) + x)

    act = nn.GELU()
    parts = {"body": nn.Sequential(conv(3, 4), act, conv(4, 4)), "beside": nn.Sequential(conv(4, 4), act)}
    model = nmconv.convert(net(forward, **parts, out=conv(4, 4)).eval(), "2:1", relocate=True)
    plan = nmconv.get_plan(model)
    assert plan is not None and any(site.action == "move" for site in plan.sites)
    assert len(nmconv.activation_stats(model, X).sites) == 2
    sets = [id(module._forward_hooks) for module in model.modules()]
    assert len(sets) == len(set(sets))
