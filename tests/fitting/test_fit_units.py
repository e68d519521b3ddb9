"""What is fitted, and to what: targets collected here by hooks of our own; plans with kernels; branches that go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from fit_nets import dropped, least_squares, report, rows_of, targets_of
from merge_nets import assert_near, made, picture, settle, statistics
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import nmconv
from nmconv.finding import copied_sums, flows_of, residuals
from nmconv.flow import record_model
from nmconv.planning import Branch, ReplacedSum

torch.set_num_threads(1)
EXACT = {"recalibrate": False, "holdout": 0, "ridge": 0, "kernel": "exact"}


def seen(model: nn.Module, name: str, x: Tensor, *, given: bool = False) -> Tensor:
    """What a module gives, or is given, in the last call of it."""
    found: list[Tensor] = []
    module = model.get_submodule(name) if name else model
    handle = module.register_forward_hook(lambda _, args, result: found.append((args[0] if given else result).clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[-1]


def is_least_squares(fitted: nn.Module, name: str, given: Tensor, target: Tensor, padding: int) -> None:
    """Whether a convolution of stride 1 is what ``torch.linalg.lstsq`` finds."""
    conv: Any = fitted.get_submodule(name)
    weight, constant = least_squares(rows_of(given, conv.kernel_size[0], padding), targets_of(target))
    assert_near(conv.weight.data.flatten(1), weight.T, 1e-7)
    assert_near(conv.bias.data, constant, 1e-7)


def parts(*names: str, **more: Any) -> dict[str, Any]:
    made_of: dict[str, Any] = {name: nn.Conv2d(4, 4, 3, padding=1) for name in names if name[:1] == "c"}
    made_of |= {name: nn.ReLU() for name in names if name[:1] == "a"}
    return made_of | {name: nn.BatchNorm2d(4) for name in names if name[:1] == "n"} | more


X = picture(4, 7, 6, batch=60)


# Where the target is -------------------------------------------------------------------------------------------------


def test_before_an_activation_that_is_kept() -> None:
    net = made(lambda self, x: self.a2(self.c2(self.a1(self.c1(x)))), **parts("c1", "c2", "a1", "a2"))
    fitted = nmconv.fit(dropped(net, "a2"), X, reference=net, **EXACT)
    is_least_squares(fitted, "c1", X, seen(net, "c2", X), 2)


def test_behind_an_activation_that_is_dropped() -> None:
    net = made(lambda self, x: F.max_pool2d(self.a2(self.c2(self.a1(self.c1(x)))), 2), **parts("c1", "c2", "a1", "a2"))
    fitted = nmconv.fit(dropped(net), X, reference=net, **EXACT)
    is_least_squares(fitted, "c1", X, seen(net, "a2", X), 2)


def test_one_convolution_whose_activation_is_dropped() -> None:
    net = made(lambda self, x: F.max_pool2d(self.a2(self.c1(x)), 2), **parts("c1", "a2"))
    fitted = nmconv.fit(dropped(net), X, reference=net, **EXACT)
    is_least_squares(fitted, "c1", X, seen(net, "a2", X), 1)


@pytest.mark.parametrize("style", ["functional", "in place", "method", "shared module", "shared in place"])
def test_every_way_of_calling_an_activation(style: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if style == "functional":
            return F.max_pool2d(F.relu(self.c2(F.relu(self.c1(x)))), 2)
        if style == "in place":
            return F.max_pool2d(F.relu_(self.c2(F.relu(self.c1(x), inplace=True))), 2)
        if style == "method":
            return F.max_pool2d(self.c2(self.c1(x).relu()).relu_(), 2)
        return F.max_pool2d(self.a1(self.c2(self.a1(self.c1(x)))), 2)

    net = made(forward, **parts("c1", "c2"), a1=nn.ReLU(style == "shared in place"))
    fitted = nmconv.fit(dropped(net), X, reference=net, **EXACT)
    assert len(report(fitted).units) == 1
    with torch.no_grad():
        is_least_squares(fitted, "c1", X, F.relu(net.c2(F.relu(net.c1(X)))), 2)


def test_less_the_shortcut_of_the_converted_side() -> None:
    """The shortcut is another value in the converted net: the error that it has made is made up for."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a2(self.c2(self.a1(self.c1(x))))
        return self.a4(x.neg() + self.c4(self.a3(self.c3(x))))

    net = made(forward, **parts("c1", "c2", "c3", "c4", "a1", "a2", "a3", "a4"))
    fitted = nmconv.fit(dropped(net, "a2", "a4"), X, reference=net, **EXACT)
    assert [unit.convs for unit in report(fitted).units] == [("c1", "c2"), ("c3", "c4")]
    x = seen(fitted, "c3", X, given=True)
    wanted = seen(net, "a4", X, given=True) + x
    is_least_squares(fitted, "c3", x, wanted, 2)


@pytest.mark.parametrize("last", ["kept", "dropped"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_identity_outside_of_a_factors_fit(last: str, inplace: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
            self.one, self.two = BasicBlock(4, 4), BasicBlock(4, 4)
            self.one.relu.inplace = self.two.relu.inplace = inplace

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.max_pool2d(self.one(self.stem(x)), 1))

    net = settle(Net())
    plan = nmconv.make_plan(net, "2:1", keep="boundary")
    keep = {"stem.1#1", *(["one.relu#2", "two.relu#2"] if last == "kept" else ["two.relu#2"])}
    plan = plan.edit({site.id: "keep" if site.id in keep else "drop" for site in plan.sites})
    fitted = nmconv.fit(nmconv.apply_plan(net, plan), X, reference=net, recalibrate=False, holdout=0, ridge=0)
    assert [(unit.convs, unit.form) for unit in report(fitted).units] == [
        (("one.conv1", "one.conv2"), "factors"), (("two.conv1", "two.conv2"), "factors"),
    ]  # fmt: skip
    # What comes of the first block is nearest to the reference's, before or behind its activation.
    short = seen(fitted, "one", X, given=True)
    given = seen(fitted, "one.conv2", X, given=True)
    block: Any = net.one
    with torch.no_grad():
        main = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(short)))))
        target = main if last == "kept" else F.relu(main + short) - short
        weight, constant = least_squares(rows_of(given, 3, 1), targets_of(target))
        found = targets_of(seen(fitted, "one.bn2", X))
    assert_near(found, rows_of(given, 3, 1) @ weight + constant, 1e-7)


def test_at_the_last_norm_if_a_gate_follows() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.n2(self.c2(self.a1(self.c1(x))))
        return self.a2(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))

    net = made(forward, **parts("c1", "c2", "n2", "a1", "a2"), gate=nn.Conv2d(4, 4, 1))
    fitted = nmconv.fit(dropped(net, "a2"), X, reference=net, **EXACT)
    assert report(fitted).units[0].convs == ("c1", "c2")
    is_least_squares(fitted, "c1", X, seen(net, "n2", X), 2)


def test_cut_where_the_reference_has_no_activation_either() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a4(self.c4(self.a3(self.c3(self.n2(self.c2(self.a1(self.c1(x))))))))

    net = made(forward, **parts("c1", "c2", "c3", "c4", "n2", "a1", "a3", "a4"))
    fitted = nmconv.fit(dropped(net, "a4"), X, reference=net, **EXACT)
    assert [unit.convs for unit in report(fitted).units] == [("c1", "c2"), ("c3", "c4")]
    is_least_squares(fitted, "c1", X, seen(net, "n2", X), 2)
    is_least_squares(fitted, "c3", seen(fitted, "c3", X, given=True), seen(net, "a4", X, given=True), 2)


def test_a_convolution_that_lost_the_activation_before_it() -> None:
    """Pre-activation: a norm, an activation, a convolution; and nothing else in the run that could make up for it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.max_pool2d(torch.cat([x, self.c2(self.a2(self.n2(self.c1(self.a1(self.n1(x))))))], 1), 2)

    net = made(forward, **parts("stem", "c1", "c2", "n1", "n2", "a1", "a2"), stem=nn.MaxPool2d(1))
    fitted = nmconv.fit(dropped(net, "a2"), X, reference=net, **EXACT)
    assert [unit.convs for unit in report(fitted).units] == [("c1",)]
    given = seen(fitted, "c1", X, given=True)
    with torch.no_grad():
        target = net.n2(net.c1(F.relu(net.n1(X))))
    rows = rows_of(given, 3, 1)
    weight, constant = least_squares(rows, targets_of(target))
    assert_near(targets_of(seen(fitted, "a2", X, given=True)), rows @ weight + constant, 1e-7)


def test_behind_a_gate_whose_activation_is_dropped() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.n1(self.c1(x))
        return F.max_pool2d(self.c2(self.a1(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))), 2)

    net = made(forward, **parts("c1", "c2", "n1", "a1"), gate=nn.Conv2d(4, 4, 1))
    model = dropped(net)
    fitted = nmconv.fit(model, X, reference=net, **EXACT)
    assert ("c2",) in [unit.convs for unit in report(fitted).units]
    is_least_squares(fitted, "c2", seen(model, "c2", X, given=True), seen(net, "c2", X), 1)


def test_timms_norm_and_activation_in_one() -> None:
    net = settle(timm.create_model("tf_efficientnet_lite0", num_classes=3))
    plan = nmconv.make_plan(
        net, "3:1", example_inputs=(torch.zeros(1, 3, 32, 32, dtype=torch.float64),), keep="boundary"
    )
    plan = plan.edit({site.id: "drop" if "blocks.1.1" in site.id else "keep" for site in plan.sites})
    x = picture(3, 32, 32, batch=24)
    model = nmconv.apply_plan(net, plan)
    fitted = nmconv.fit(model, x, reference=net, kernel=1, recalibrate=False, holdout=0, ridge=1e-6)
    (unit,) = report(fitted).units
    assert unit.convs == ("blocks.1.1.conv_pw", "blocks.1.1.conv_dw", "blocks.1.1.conv_pwl")
    given, target = seen(net, "blocks.1.1.conv_pw", x, given=True), seen(net, "blocks.1.1.bn3", x)
    short = seen(net, "blocks.1.1", x, given=True)
    weight, constant = least_squares(targets_of(given), targets_of(target + short))  # the shortcut is the input
    found = targets_of(seen(fitted, "blocks.1.1", x))
    assert_near(found, targets_of(given) @ weight + constant, 1e-3)


def test_the_order_is_that_of_execution() -> None:
    net = statistics(ResNet(timm.models.resnet.BasicBlock, (2, 1, 1, 1), 3, channels=(4, 8, 8, 8)))
    model = nmconv.convert(net, "2:1", keep="boundary")
    fitted = nmconv.fit(model, picture(3, 32, 32, batch=8), reference=net, kernel=1, recalibrate=False)
    names = [unit.convs[0] for unit in report(fitted).units]
    assert names == [f"layer{stage}.{block}.conv1" for stage, block in ((1, 0), (1, 1), (2, 0), (3, 0), (4, 0))]
    assert all(unit.form == "merged" and unit.held_after <= unit.held_before for unit in report(fitted).units)


# What cannot be told apart -------------------------------------------------------------------------------------------


def test_sums_that_are_no_sums_of_maps() -> None:
    """Additions of numbers, sizes and constants before the one that counts."""

    def forward(self: Any, x: Tensor) -> Tensor:
        high = x.shape[2] + 1
        x = x + 1.0
        y = self.c2(self.a1(self.c1(x)))
        return self.a2(1 + (x + y)) * (high + 0.0)

    net = made(forward, **parts("c1", "c2", "a1", "a2"))
    fitted = nmconv.fit(dropped(net, "a2"), X, reference=net, recalibrate=False, holdout=0, ridge=0)
    given = seen(fitted, "c2", X, given=True)
    with torch.no_grad():
        weight, _ = least_squares(rows_of(given, 3, 1), targets_of(net.c2(F.relu(net.c1(X + 1)))))
    assert_near(fitted.c2.weight.data.flatten(1), weight.T, 1e-7)


def test_a_module_that_adds_for_several() -> None:
    """An adding module that is called twice: which sum is whose cannot be told, and need not."""

    class Add(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a2(self.plus(x, self.c2(self.a1(self.c1(x)))))
        return self.a4(self.plus(x, self.c4(self.a3(self.c3(x)))))

    net = made(forward, **parts("c1", "c2", "c3", "c4", "a1", "a2", "a3", "a4"), plus=Add())
    fitted = nmconv.fit(dropped(net, "a2", "a4"), X, reference=net, recalibrate=False, holdout=0, ridge=0)
    for conv, before in (("c2", "c1"), ("c4", "c3")):
        given = seen(fitted, conv, X, given=True)
        x = seen(fitted, before, X, given=True)
        reference = seen(net, conv, X) if conv == "c2" else None
        if reference is not None:
            weight, _ = least_squares(rows_of(given, 3, 1), targets_of(reference))
            assert_near(fitted.get_submodule(conv).weight.data.flatten(1), weight.T, 1e-7)
        assert x.shape == given.shape


# Kernels that plans name ---------------------------------------------------------------------------------------------


def three(self: Any, x: Tensor) -> Tensor:
    return self.a3(self.c3(self.a2(self.c2(self.a1(self.c1(x))))))


def three_convs() -> nn.Module:
    return made(three, **parts("c1", "c2", "c3", "a1", "a2", "a3"))


def test_a_kernel_for_a_part_of_a_run() -> None:
    net = three_convs()
    model = dropped(net, "a3", c1_c2=3)
    fitted = nmconv.fit(model, X, reference=net, recalibrate=False, holdout=0, ridge=0)
    (unit,) = report(fitted).units  # the third reads what was fitted to the activation before it
    assert (unit.convs, unit.form, unit.kernel) == (("c1", "c2"), "merged", (3, 3))
    is_least_squares(fitted, "c1", X, seen(net, "a2", X), 1)


def test_kernels_by_hand_and_their_text() -> None:
    net = three_convs()
    plan = nmconv.make_plan(net, "3:1", keep="boundary")
    one = plan.with_kernels({"c1, c2": 3, ("c3",): "1x3"})
    assert one.kernels == (nmconv.Kernel(("c1", "c2"), "3"), nmconv.Kernel(("c3",), "1x3"))
    assert nmconv.Plan.from_json(one.to_json()) == one
    assert "c1, c2 -> one kernel, 3" in str(one)
    assert plan.kernels == ()
    for wrong in ({"c1": 0}, {"c1": "3x"}, {"c1": "big"}, {"c1": -1}, {"c1, c2": 3, "c2": 3}, {(): 3}):
        with pytest.raises(nmconv.PlanError):
            plan.with_kernels(wrong)


@pytest.mark.parametrize("convs", [("c1", "c3"), ("c2", "c1"), ("a1",)])
def test_a_kernel_for_convs_that_are_no_run(convs: tuple[str, ...]) -> None:
    net = three_convs()
    model = nmconv.apply_plan(net, nmconv.make_plan(net, "3:1", keep="boundary").with_kernels({convs: 3}))
    with pytest.raises(nmconv.FitError, match=convs[0]):
        nmconv.fit(model, X, reference=net)


@pytest.mark.parametrize("convs", [("c1", "nothing"), ("c3", "c4")])
def test_a_kernel_for_convs_that_are_not_there(convs: tuple[str, ...]) -> None:
    net = three_convs()
    plan = nmconv.make_plan(net, "3:1", keep="boundary").with_kernels({convs: 3})
    with pytest.raises(nmconv.PlanError, match=convs[1]):
        nmconv.apply_plan(net, plan)


def test_a_kernel_across_an_activation_that_is_kept() -> None:
    net = three_convs()
    with pytest.raises(nmconv.FitError, match=r"c1, c2"):
        nmconv.fit(dropped(net, "a1", "a3", c1_c2=3), X, reference=net)


def test_the_plan_counts_before_the_option() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a4(self.c4(self.a3(self.c3(self.a2(self.c2(self.a1(self.c1(x))))))))

    net = made(forward, **parts("c1", "c2", "c3", "c4", "a1", "a2", "a3", "a4"))
    fitted = nmconv.fit(dropped(net, "a2", "a4", c1_c2=3), X, reference=net, kernel=1, recalibrate=False)
    units = [(unit.convs, unit.kernel) for unit in report(fitted).units]
    assert units == [(("c1", "c2"), (3, 3)), (("c3", "c4"), (1, 1))]


# Branches that go ----------------------------------------------------------------------------------------------------


def block_net(block: nn.Module) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
            self.block, self.head = block, nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.stem(x)))

    return settle(Net())


def without_branch(net: nn.Module, label: str, kept: tuple[str, ...]) -> nmconv.Plan:
    """The plan written by hand: the block's own sum goes, its first or second operand stays."""
    (found,) = residuals(net, picture(4, 6, 6))
    convs = tuple(name for name, module in net.block.named_modules(prefix="block") if isinstance(module, nn.Conv2d))
    keep = found.branch.sum.keep
    branch = Branch(ReplacedSum("block", label, 1, keep), convs)
    assert found.branch == branch
    # torchvision's block overwrites the sum, here the stem's own output
    copied = copied_sums(flows_of(net, record_model(net, picture(4, 6, 6))), [branch.sum])
    assert copied == ({branch.sum} if label == "add_" else set())
    plan = nmconv.make_plan(net, "2:1", keep="boundary")
    sites = tuple(
        dataclasses.replace(site, action="keep" if site.id in kept else "gone", behind="") for site in plan.sites
    )
    return dataclasses.replace(plan, sites=sites, hoists=(), branches=(branch,))


BLOCKS = {
    "BasicBlock": (lambda: BasicBlock(4, 4), "add_", ("stem.1#1", "block.relu#2"), F.relu),
    "InvertedResidual": (lambda: InvertedResidual(4, 4, exp_ratio=2.0), "add", ("stem.1#1",), lambda x: x),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_branch_that_goes(name: str, tmp_path: Path) -> None:
    make, label, kept, rest = BLOCKS[name]
    net = block_net(make())
    plan = without_branch(net, label, kept)
    plan = nmconv.Plan.from_json(plan.to_json())
    assert plan.counts.activations_after == len(kept) and f"branch removed: {plan.branches[0].convs[0]}" in str(plan)
    model = nmconv.apply_plan(net, plan)
    assert list(model.state_dict()) == list(net.state_dict())
    called: list[str] = []
    for path, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, path=path: called.append(path))
    found = model(X)
    assert_near(found, net.head(rest(net.stem(X))), 1e-12)
    inner = [path for path in called if path.startswith("block.")]
    assert not [path for path in inner if "conv" in path]
    assert [path for path in inner if isinstance(model.get_submodule(path), nn.ReLU)] == (
        ["block.relu"] if name == "BasicBlock" else []
    )
    with pytest.raises(nmconv.PlanError, match="branch"):
        plan.edit({next(site for site in plan.sites if site.action == "gone").id: "keep"})
    fitted = nmconv.fit(model.apply(lambda module: module._forward_hooks.clear()), X, reference=net)
    for one in (model, fitted):
        nmconv.save(one, tmp_path / "net.safetensors")
        again = nmconv.load(block_net(make()), tmp_path / "net.safetensors")
        assert torch.equal(again(X), one(X)) and list(again.state_dict()) == list(one.state_dict())


def test_a_branch_whose_shortcut_is_a_convolution_is_none() -> None:
    short = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert residuals(block_net(BasicBlock(4, 4, downsample=short)), picture(4, 6, 6)) == ()
