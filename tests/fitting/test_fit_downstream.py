"""``fit(downstream=True)``: what comes behind the units makes up for what they could not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fit_nets import dropped, linear, report
from merge_nets import assert_near, picture, settle, statistics
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import nmconv

torch.set_num_threads(1)
X = picture(3, 9, 8, batch=32)


def one_that_sees_the_middle_only(seed: int = 0) -> nn.Sequential:
    """Two convolutions that make one 3x3, and a third one whose weight is zero but for the middle."""
    net = settle(
        nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1), linear(), nn.Conv2d(3, 3, 1), linear(),
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        ),
        seed,
    )  # fmt: skip
    with torch.no_grad():
        middle = net[4].weight[:, :, 1, 1].clone()
        net[4].weight.zero_()
        net[4].weight[:, :, 1, 1] = middle
        net[0].bias.zero_()
        net[2].bias.zero_()
    return net


def test_the_next_convolution_sees_what_a_unit_cannot_see() -> None:
    net = one_that_sees_the_middle_only()
    options: Any = {"reference": net, "kernel": 1, "recalibrate": False, "ridge": 0.0, "holdout": 0}
    model, x = dropped(net, "3", "6"), torch.cat([X, -X])  # of mean 0: no constants, which would end at the border
    alone = nmconv.fit(model, x, **options)
    assert report(alone).returned.loss > 0.5  # of the variance
    fitted = nmconv.fit(model, x, downstream=True, **options)
    assert [unit.convs for unit in report(fitted).units] == [("0", "2"), ("4",)]
    assert [unit.form for unit in report(fitted).units] == ["merged", "factors"]
    y = picture(3, 11, 10, batch=3, seed=7)
    assert_near(fitted(y), net(y), 1e-8)


def test_what_comes_before_the_first_unit_stays_and_keys_too() -> None:
    net = statistics(ResNet(BasicBlock, (2, 1, 1, 1), 3, channels=(4, 8, 8, 8)))
    x = picture(3, 64, 64, batch=32)
    plan = nmconv.make_plan(net, "2:1", keep="boundary")
    plan = plan.edit({
        site.id: "drop" if site.name == "layer1.1.act1" else "keep" for site in plan.sites if site.action != "skip"
    })  # fmt: skip
    model = nmconv.apply_plan(net, plan)
    fitted = nmconv.fit(model, x, reference=net, downstream=True, recalibrate=False)
    states = model.state_dict(), fitted.state_dict()
    assert list(states[0]) == list(states[1])
    changed = {key for key, value in states[1].items() if not torch.equal(value, states[0][key])}
    assert {"layer1.1.conv2.weight", "layer2.0.conv1.weight"} <= changed
    assert not any(key.startswith(("conv1.", "bn1.", "layer1.0.", "layer1.1.conv1", "fc.")) for key in changed)
    first, *others = report(fitted).units
    assert first == report(nmconv.fit(model, x, reference=net, recalibrate=False)).units[0]
    assert {unit.convs for unit in others} == {
        (f"layer{at}.0.{conv}",) for at in (2, 3, 4) for conv in ("conv1", "conv2", "downsample.0")
    }
    assert all(unit.form == "factors" and unit.held_after <= unit.held_before for unit in others)


def test_the_order_is_that_of_execution_and_nothing_is_fitted_twice() -> None:
    net = statistics(timm.create_model("mobilenetv2_035", num_classes=3))
    model = nmconv.convert(net, "2:1", example_inputs=(picture(3, 32, 32, batch=1),), keep="boundary")
    fitted = nmconv.fit(model, picture(3, 32, 32, batch=8), reference=net, kernel=1, downstream=True)
    convs = [conv for unit in report(fitted).units for conv in unit.convs]
    order = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    assert convs == [name for name in order if name in convs] and len(convs) == len(set(convs))
    assert set(order[order.index(convs[0]) :]) == set(convs)


def test_a_branch_that_the_units_do_not_reach_stays_to_the_bit() -> None:
    net = statistics(timm.create_model("densenet121", num_classes=3, block_config=(2, 2), growth_rate=4))
    plan = nmconv.make_plan(net, "2:1", keep="boundary")
    first = next(site.id for site in plan.sites if site.action == "drop")
    plan = plan.edit({site.id: "drop" if site.id == first else "keep" for site in plan.sites if site.action != "skip"})
    x = picture(3, 32, 32, batch=8)
    model = nmconv.apply_plan(net, plan)
    fitted = nmconv.fit(model, x, reference=net, downstream=True, recalibrate=False, ridge=float("inf"))
    assert torch.equal(fitted(x), model(x))  # an infinite ridge changes nothing, downstream either


@pytest.mark.parametrize("kernel", [None, 3])
def test_saved_and_loaded(kernel: Any, tmp_path: Path) -> None:
    net = statistics(ResNet(BasicBlock, (1, 1, 1, 1), 3, channels=(4, 8, 8, 8)))
    x = picture(3, 32, 32, batch=8)
    fitted = nmconv.fit(nmconv.convert(net, "2:1", keep="boundary"), x, reference=net, kernel=kernel, downstream=True)
    nmconv.save(fitted, tmp_path / "net.safetensors")
    again = nmconv.load(
        ResNet(BasicBlock, (1, 1, 1, 1), 3, channels=(4, 8, 8, 8)).double().eval(), tmp_path / "net.safetensors"
    )
    assert_near(again(x), fitted(x), 0)
