"""Fits of networks whose one forward adds several times: which sum is which, while others go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_nets import report
from merge_nets import assert_near, made, picture
from torch import Tensor, nn

import nmconv
from nmconv.finding import ParallelSum, Step, residuals
from nmconv.fitting.missing_additions import MissingAdditions
from nmconv.planning import ReplacedSum

torch.set_num_threads(1)
X = picture(4, 8, 7, batch=48)


def branch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))


def three(self: Any, x: Tensor) -> Tensor:
    for at, way in enumerate(self.ways):
        act, inner = getattr(self, f"a{at}"), getattr(self, f"f{at}")
        x = act(x + inner(x) if way == "+" else torch.add(inner(x), x))
    return x


def net_of(ways: tuple[str, ...]) -> nn.Module:
    parts = {f"f{at}": branch() for at in range(len(ways))} | {f"a{at}": nn.ReLU() for at in range(len(ways))}
    net = made(three, **parts)
    net.ways = ways
    return net


def without(net: nn.Module, *names: str) -> nn.Module:
    plan = nmconv.make_plan(net, "1:1")
    return nmconv.apply_plan(net, plan.edit({site.id: "drop" for site in plan.sites if site.name in names}))


def by_hand(model: nn.Module, fitted: set[int], x: Tensor) -> Tensor:
    """What the network should compute: where a branch and its identity are one convolution, nothing is added."""
    for at in range(len(model.ways)):
        inner = getattr(model, f"f{at}")(x)
        x = getattr(model, f"a{at}")(inner if at in fitted else x + inner)
    return x


@pytest.mark.parametrize("ways", [("+", "+", "+"), ("+", "add", "+"), ("add", "+", "+", "+")])
@pytest.mark.parametrize("chosen", [(0,), (1,), (0, 1), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("downstream", [False, True])
def test_each_unit_takes_its_own_sum_out(
    ways: tuple[str, ...], chosen: tuple[int, ...], downstream: bool, tmp_path: Path
) -> None:
    net = net_of(ways)
    model = without(net, *(f"f{at}.2" for at in chosen))
    fitted = nmconv.fit(model, X, reference=net, kernel="exact", recalibrate=False, downstream=downstream)
    merged = [unit for unit in report(fitted).units if unit.form == "merged"]
    assert [unit.convs for unit in merged] == [(f"f{at}.0", f"f{at}.3") for at in chosen]
    others = [unit for unit in report(fitted).units if unit.form == "factors"]
    later = [at for at in range(chosen[0], len(ways)) if at not in chosen]
    assert [unit.convs for unit in others] == [(f"f{at}.{conv}",) for at in later if downstream for conv in (0, 3)]
    assert all(unit.held_after <= unit.held_before for unit in report(fitted).units)
    y = picture(4, 9, 9, batch=3, seed=4)
    assert_near(fitted(y), by_hand(fitted, set(chosen), y))
    assert report(fitted).returned.loss < report(fitted).converted.loss
    nmconv.save(fitted, tmp_path / "net.safetensors")
    assert torch.equal(nmconv.load(net_of(ways), tmp_path / "net.safetensors")(y), fitted(y))


def test_targets_where_the_plan_has_taken_a_sum_out() -> None:
    net = net_of(("+", "+", "+"))
    found = next(one.branch for one in residuals(net, X[:1]) if one.branch.convs[0].startswith("f0."))
    plan = nmconv.make_plan(net, "1:1")
    sites = tuple(
        dataclasses.replace(site, action="gone" if site.name == "f0.2" else "drop" if site.name == "f2.2" else "keep")
        for site in plan.sites
    )
    plan = dataclasses.replace(plan, sites=sites, branches=(found,))
    model = nmconv.apply_plan(net, plan)
    for kernel in (None, "exact"):
        fitted = nmconv.fit(model, X, reference=net, kernel=kernel, recalibrate=False)
        (unit,) = report(fitted).units
        assert unit.convs == ("f2.0", "f2.3")
        x = fitted.a1(fitted.a0(X) + fitted.f1(fitted.a0(X)))
        assert_near(fitted(X), fitted.a2(fitted.f2(x) if kernel else x + fitted.f2(x)))
        # The target is the reference's third sum: what the fit says of its error is what can be seen there.
        wanted = net.a1(net.a0(X + net.f0(X)) + net.f1(net.a0(X + net.f0(X))))
        wanted = wanted + net.f2(wanted)
        wanted, held = wanted.detach(), torch.arange(len(X)) % 4 == 3
        given = (fitted.f2(x) if kernel else x + fitted.f2(x)).detach()
        errors = [(given - wanted)[part].square().sum() for part in (held, ~held)]
        total = [(wanted - wanted[part].mean((0, 2, 3), keepdim=True))[part].square().sum() for part in (held, ~held)]
        seen = {round(float(one / all), 6) for one, all in zip(errors, total, strict=True)}
        assert kernel is None or {round(unit.held_after, 6), round(unit.after, 6)} == seen


def test_numbers() -> None:
    def join(number: int, label: str = "add", owner: str = "m", *inside: Any) -> ParallelSum:
        return ParallelSum((tuple(inside), ()), owner, label, number)

    def gone(number: int, label: str = "add", owner: str = "m") -> ReplacedSum:
        return ReplacedSum(owner, label, number, 0)

    sums = MissingAdditions([gone(2), gone(5), gone(1, "iadd"), gone(1, owner="n")])
    kept = [number for number in range(1, 8) if number not in (2, 5)]
    for now, number in enumerate(kept, 1):
        assert sums.in_model([join(number)]) == (join(now),)
        assert sums.in_reference([join(now)]) == (join(number),)
    assert sums.in_model([join(3, "iadd")]) == (join(2, "iadd"),) and sums.in_model([join(3, "radd")])[0].number == 3
    later = sums.without([gone(1), gone(3)])  # the first and the fourth of the reference
    for now, number in enumerate((3, 6, 7), 1):
        assert later.in_model([join(number)]) == (join(now),) and later.in_reference([join(now)]) == (join(number),)
    assert sums.in_model([join(3)]) == (join(2),)  # as it was
    nested = join(7, "add", "m", Step("conv", "c"), join(3))
    assert sums.in_model([nested]) == (join(5, "add", "m", Step("conv", "c"), join(2)),)


def test_a_branch_without_activations_is_refitted_convolution_by_convolution() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.act1(self.two(self.act0(self.one(x))))
        x = x + self.norm4(self.four(self.norm3(self.three(x))))
        found: Tensor = self.act2(self.last(x))
        return found

    convs = {name: nn.Conv2d(4, 4, 3, padding=1) for name in ("one", "two", "three", "four", "last")}
    acts = {name: nn.ReLU() for name in ("act0", "act1", "act2")}
    net = made(forward, norm3=nn.BatchNorm2d(4), norm4=nn.BatchNorm2d(4), **convs, **acts)
    fitted = nmconv.fit(without(net, "act0"), X, reference=net, downstream=True, recalibrate=False)
    assert [unit.convs for unit in report(fitted).units] == [("one", "two"), ("three",), ("four",), ("last",)]
    assert all(not torch.equal(getattr(fitted, name).weight, getattr(net, name).weight) for name in ("three", "four"))
