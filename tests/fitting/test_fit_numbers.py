"""The numbers of a fit: known answers, and least squares on rows built here, with ``F.unfold``, by ``torch.linalg``.

Where a fit must find an exact answer, the converted model is disturbed first: what it starts from is wrong then.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fit_nets import disturbed, dropped, least_squares, linear, report, rows_of, targets_of
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_nets import CONV, NORM, assert_near, made, picture, settle
from timm.layers import Conv2dSame
from torch import Tensor, nn

import nmconv
from nmconv.algebra import Geometry
from nmconv.fitting import samples as samples
from nmconv.fitting.conjugate_gradients import ConjugateGradients
from nmconv.fitting.normal_equations import Moments
from nmconv.fitting.ridge_regression import Coefficients

torch.set_num_threads(1)


PLAIN = {"recalibrate": False, "holdout": 0, "ridge": 0}


# Linear runs ---------------------------------------------------------------------------------------------------------


@st.composite
def linear_runs(draw: Any) -> tuple[nn.Sequential, tuple[int, ...], list[int]]:
    """Two or three convolutions of any kind, only the first of them padded; a picture's shape; the run's extents."""
    rank = draw(st.integers(1, 3))
    channels = draw(st.sampled_from([2, 4]))
    count = draw(st.integers(2, 2 if rank == 3 else 3))
    layers: list[nn.Module] = []
    extent, scale = [1] * rank, [1] * rank
    for at in range(count):
        kind = draw(st.sampled_from(["dense", "grouped", "depthwise"]))
        outputs = channels if kind == "depthwise" else draw(st.sampled_from([2, 4]))
        groups = {"dense": 1, "grouped": 2, "depthwise": channels}[kind]
        kernel = tuple(draw(st.integers(1, 3 if rank < 3 else 2)) for _ in range(rank))
        stride = tuple(draw(st.integers(1, 2)) for _ in range(rank))
        dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
        padding = tuple(draw(st.integers(0, 2)) for _ in range(rank)) if at == 0 else (0,) * rank
        layers.append(
            CONV[rank - 1](
                channels, outputs, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()),
                padding_mode=draw(st.sampled_from(["zeros", "zeros", "replicate"])),
            )
        )  # fmt: skip
        if draw(st.booleans()):
            layers.append(NORM[rank - 1](outputs))
        layers.append(linear() if at < count - 1 else nn.ReLU())
        for axis in range(rank):
            extent[axis] += scale[axis] * dilation[axis] * (kernel[axis] - 1)
            scale[axis] *= stride[axis]
        channels = outputs
    net = settle(nn.Sequential(*layers), draw(st.integers(0, 9)))
    sizes = [reach + step * draw(st.integers(2, 4)) for reach, step in zip(extent, scale, strict=True)]
    return net, (net[0].in_channels, *sizes), extent


@given(linear_runs())
@settings(max_examples=20, deadline=None)
def test_a_linear_run_gives_back_its_exact_kernel(drawn: tuple[nn.Sequential, tuple[int, ...], list[int]]) -> None:
    net, shape, extent = drawn
    x = picture(*shape, batch=120)
    names = [name for name, module in net.named_modules() if isinstance(module, CONV)]
    model = disturbed(dropped(net, str(len(net) - 1)))
    fitted = nmconv.fit(model, x, reference=net, kernel="exact", **PLAIN)
    (unit,) = report(fitted).units
    assert unit.convs == tuple(names) and unit.form == "merged" and unit.after < 1e-12
    conv: Any = fitted[int(names[0])]
    found = [gap * (size - 1) + 1 for gap, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    assert found == extent
    if unit.positions > 2 * unit.unknowns:
        for seed in range(2):
            other = picture(*x.shape[1:], seed=seed)
            assert_near(fitted(other), net(other), 1e-8)


def hoisted_pair() -> nn.Sequential:
    """Two 3x3, all padding in the first."""
    return settle(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=2), nn.BatchNorm2d(4), linear(), nn.Conv2d(4, 5, 3), nn.ReLU())
    )


def test_it_is_the_kernel_that_merging_gives() -> None:
    net = hoisted_pair()
    model = dropped(net, "4")
    merged = nmconv.merge(model, gate="always")
    fitted = nmconv.fit(
        disturbed(dropped(net, "4")), picture(3, 9, 8, batch=40), reference=net, kernel="exact", **PLAIN
    )
    assert type(fitted[0]) is type(merged[0]) is nn.Conv2d
    assert_near(fitted[0].weight.data, merged[0].weight.data, 1e-8)
    assert_near(fitted[0].bias.data, merged[0].bias.data, 1e-8)


def test_hoisting_by_convert_then_fit() -> None:
    """A net whose border is that of the hoisted one from the start."""
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), linear(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))
    model = nmconv.convert(net, "2:1", hoist_padding=True, keep="boundary")
    x = picture(3, 8, 8, batch=40)
    fitted = nmconv.fit(model, x, reference=net, kernel="exact", **PLAIN)
    # The padded pair is no convolution: the fit is better than what hoisting gives, and an honest least squares.
    rows, targets = rows_of(x, 5, 2), targets_of(net[:3](x))
    weight, constant = least_squares(rows, targets)
    assert_near(fitted[0].weight.data, weight.T.reshape(4, 3, 5, 5), 1e-8)
    assert_near(fitted[0].bias.data, constant, 1e-8)


# Planted kernels -----------------------------------------------------------------------------------------------------


def planted(kernel: int = 3) -> nn.Sequential:
    """A 3x3 that is the identity, and a convolution: the pair is the convolution."""
    net = settle(
        nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1, bias=False),
            linear(),
            nn.Conv2d(3, 4, kernel, padding=kernel // 2),
            nn.ReLU(),
        )
    )
    with torch.no_grad():
        nn.init.dirac_(net[0].weight)
    return net


@pytest.mark.parametrize(("asked", "size"), [(3, 3), ("3", 3), ("exact", 5), (5, 5), (9, 5), ("auto", 3)])
def test_planted(asked: Any, size: int) -> None:
    net = planted()
    options = {"recalibrate": False} if asked == "auto" else PLAIN
    fitted = nmconv.fit(
        disturbed(dropped(net, "3")), picture(3, 8, 7, batch=60), reference=net, kernel=asked, **options
    )
    wanted = F.pad(net[2].weight.data, [(size - 3) // 2] * 4)
    assert fitted[0].kernel_size == (size, size)
    assert_near(fitted[0].weight.data, wanted, 1e-6 if asked == "auto" else 1e-8)
    assert_near(fitted[0].bias.data, net[2].bias.data, 1e-6 if asked == "auto" else 1e-8)
    assert isinstance(fitted[2], nn.Identity)


def test_auto_tells_what_it_tried() -> None:
    net = planted()
    fitted = nmconv.fit(dropped(net, "3"), picture(3, 8, 7, batch=60), reference=net, kernel="auto", recalibrate=False)
    (unit,) = report(fitted).units
    sizes = dict(unit.sizes)
    assert list(sizes) == [(1, 1), (3, 3), (5, 5)] and unit.kernel == (3, 3)
    assert sizes[1, 1] > 0.1 and unit.held_after == sizes[3, 3]


@pytest.mark.parametrize("seed", range(4))
def test_auto_takes_the_smallest_that_is_hardly_worse(seed: int) -> None:
    net = settle(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU()), seed
    )
    fitted = nmconv.fit(dropped(net, "3"), picture(3, 8, 7, batch=20 + 20 * seed), reference=net, kernel="auto")
    (unit,) = report(fitted).units
    least = min(error for _, error in unit.sizes)
    assert unit.kernel == next(size for size, error in unit.sizes if error <= 1.1 * least)


@pytest.mark.parametrize("asked", ["1x3", "3x1"])
def test_sizes_for_each_axis(asked: str) -> None:
    net = planted()
    x = picture(3, 8, 7, batch=40)
    fitted = nmconv.fit(dropped(net, "3"), x, reference=net, kernel=asked, **PLAIN)
    high, wide = map(int, asked.split("x"))
    padded = F.pad(x, [wide // 2] * 2 + [high // 2] * 2)
    rows = F.unfold(padded, (high, wide)).transpose(1, 2).flatten(0, 1)
    weight, constant = least_squares(rows, targets_of(net[2](x)))
    assert_near(fitted[0].weight.data, weight.T.reshape(4, 3, high, wide), 1e-8)
    assert_near(fitted[0].bias.data, constant, 1e-8)


# Where the kernel lies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0)])
def test_a_smaller_kernel_sees_the_middle(kernel: int, padding: tuple[int, int]) -> None:
    net = settle(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=padding[0]), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=padding[1]), nn.ReLU()
        )
    )
    x = picture(2, 9, 8, batch=30)
    fitted = nmconv.fit(dropped(net, "3"), x, reference=net, kernel=kernel, **PLAIN)
    cut = (5 - kernel) // 2
    padded = F.pad(x, [sum(padding) - cut] * 4)
    weight, constant = least_squares(rows_of(padded, kernel), targets_of(net[:3](x)))
    assert_near(fitted[0].weight.data, weight.T.reshape(3, 2, kernel, kernel), 1e-8)
    assert_near(fitted[0].bias.data, constant, 1e-8)
    other = picture(2, 11, 10, seed=7)
    wanted = rows_of(F.pad(other, [sum(padding) - cut] * 4), kernel) @ weight + constant
    assert_near(targets_of(fitted[:3](other)), wanted, 1e-8)


@pytest.mark.parametrize(("kernel", "start"), [(1, 1), (2, 1), (3, 0)])
def test_even_kernels(kernel: int, start: int) -> None:
    """3 and 2 make 4: of its elements, those around the middle, the left one of two."""
    net = settle(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 2), nn.ReLU()))
    x = picture(2, 9, 8, batch=30)
    fitted = nmconv.fit(dropped(net, "3"), x, reference=net, kernel=kernel, **PLAIN)
    inner = x[..., start : x.shape[2] - (4 - kernel - start), start : x.shape[3] - (4 - kernel - start)]
    weight, constant = least_squares(rows_of(inner, kernel), targets_of(net[:3](x)))
    assert_near(fitted[0].weight.data, weight.T.reshape(3, 2, kernel, kernel), 1e-8)
    assert_near(fitted[0].bias.data, constant, 1e-8)


@pytest.mark.parametrize("size", [8, 9])
def test_tensorflows_padding(size: int) -> None:
    """At stride 2 the middle lies elsewhere for even sizes than for odd ones."""
    net = settle(nn.Sequential(nn.Conv2d(2, 6, 1, bias=False), linear(), Conv2dSame(6, 3, 3, 2), nn.ReLU()))
    x = picture(2, size, size, batch=40)
    exact = nmconv.fit(disturbed(dropped(net, "3")), x, reference=net, kernel="exact", **PLAIN)
    for other in (picture(2, 8, 8, seed=5), picture(2, 9, 9, seed=5), picture(2, 10, 7, seed=5)):
        assert_near(exact(other), net(other), 1e-8)
    point = nmconv.fit(dropped(net, "3"), x, reference=net, kernel=1, **PLAIN)
    middle = x[..., 1::2, 1::2] if size == 8 else x[..., ::2, ::2]
    weight, constant = least_squares(targets_of(middle), targets_of(net[:3](x)))
    conv = point[0]
    assert_near(conv.weight.data.flatten(1), weight.T, 1e-8)
    for other, at in ((picture(2, 10, 10, seed=5), 1), (picture(2, 11, 11, seed=5), 0)):
        wanted = targets_of(other[..., at::2, at::2]) @ weight + constant
        assert_near(targets_of(conv(other)), wanted, 1e-8)


def test_dilation_and_stride() -> None:
    net = settle(nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2, stride=2), linear(), nn.Conv2d(4, 3, 3), nn.ReLU()))
    x = picture(2, 13, 14, batch=40)
    fitted = nmconv.fit(disturbed(dropped(net, "3")), x, reference=net, kernel="exact", **PLAIN)
    assert (fitted[0].kernel_size, fitted[0].stride, fitted[0].dilation) == ((5, 5), (2, 2), (2, 2))
    assert_near(fitted(x), net(x), 1e-8)
    small = nmconv.fit(dropped(net, "3"), x, reference=net, kernel=3, **PLAIN)
    inner = x[..., 2:-2, 2:-2]
    rows = F.unfold(inner, 3, dilation=2, stride=2).transpose(1, 2).flatten(0, 1)
    weight, constant = least_squares(rows, targets_of(net[:3](x)))
    assert_near(small[0].weight.data, weight.T.reshape(3, 2, 3, 3), 1e-8)
    assert_near(small[0].bias.data, constant, 1e-8)


# Sums ----------------------------------------------------------------------------------------------------------------


def residual(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    return self.act2(x + self.norm(self.two(self.act1(self.one(x)))))


def parallel(self: Any, x: Tensor) -> Tensor:
    return self.act2(self.two(self.act1(self.one(x))) + self.short(x))


def test_a_residual_identity_is_folded_in() -> None:
    parts = {"one": nn.Conv2d(3, 3, 3, padding=2), "two": nn.Conv2d(3, 3, 3), "norm": nn.BatchNorm2d(3)}
    net = made(residual, stem=nn.ReLU(), act1=linear(), act2=nn.ReLU(), **parts)
    x = picture(3, 8, 7, batch=40)
    model = disturbed(dropped(net, "stem", "act2"))
    fitted = nmconv.fit(model, x, reference=net, kernel="exact", **PLAIN)
    (unit,) = report(fitted).units
    assert unit.convs == ("one", "two") and unit.form == "merged"
    assert_near(fitted(picture(3, 9, 9)), net(picture(3, 9, 9)), 1e-8)
    assert_near(F.relu(fitted.one(F.relu(x))), net(x), 1e-8)  # nothing is added any more


def test_parallel_branches_are_folded_in() -> None:
    parts = {"one": nn.Conv2d(3, 4, 3, 2, padding=1), "two": nn.Conv2d(4, 4, 1), "short": nn.Conv2d(3, 4, 1, 2)}
    net = made(parallel, act1=linear(), act2=nn.ReLU(), **parts)
    x = picture(3, 8, 7, batch=40)
    fitted = nmconv.fit(disturbed(dropped(net, "act2")), x, reference=net, kernel="exact", **PLAIN)
    (unit,) = report(fitted).units
    assert set(unit.convs) == {"one", "two", "short"}
    assert_near(fitted(picture(3, 9, 9)), net(picture(3, 9, 9)), 1e-8)
    assert_near(F.relu(fitted.get_submodule(unit.convs[0])(x)), net(x), 1e-8)


def test_groups_stay_and_dense_has_none() -> None:
    net = settle(
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2), nn.ReLU())
    )
    x = picture(4, 8, 7, batch=40)
    plan = nmconv.make_plan(net, "2:1", keep="boundary")
    rows, targets = rows_of(x, 3, 1), targets_of(net[:3](x))
    for dense in (False, True):
        kernel = nmconv.Kernel(("0", "2"), "exact", dense)
        asked = nmconv.apply_plan(net, type(plan).from_json(_with(plan, kernel).to_json()))
        conv = nmconv.fit(asked, x, reference=net, **PLAIN)[0]
        assert conv.groups == (1 if dense else 2)
        for group in range(conv.groups):
            inputs, outputs = 4 // conv.groups, 4 // conv.groups
            part = rows.reshape(len(rows), 4, 9)[:, group * inputs : (group + 1) * inputs].flatten(1)
            weight, constant = least_squares(part, targets[:, group * outputs : (group + 1) * outputs])
            found = conv.weight.data[group * outputs : (group + 1) * outputs].flatten(1)
            assert_near(found, weight.T, 1e-8)
            assert_near(conv.bias.data[group * outputs : (group + 1) * outputs], constant, 1e-8)


def _with(plan: nmconv.Plan, kernel: nmconv.Kernel) -> nmconv.Plan:
    return dataclasses.replace(plan, kernels=(kernel,))


# The factors form ----------------------------------------------------------------------------------------------------


def pair(norm: bool = True, bias: bool = True, affine: bool = True, groups: int = 1) -> nn.Sequential:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    layers.append(nn.Conv2d(4, 4, 3, padding=1, bias=bias, groups=groups))
    return settle(nn.Sequential(*layers, *([nn.BatchNorm2d(4, affine=affine)] if norm else []), nn.ReLU()))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("norm", "bias", "affine"),
    [(True, True, True), (True, False, True), (False, True, True), (False, False, True), (True, True, False),
     (True, False, False)],
)  # fmt: skip
def test_factors_are_least_squares(norm: bool, bias: bool, affine: bool, groups: int) -> None:
    net = pair(norm, bias, affine, groups)
    x = picture(3, 8, 7, batch=40)
    model = disturbed(dropped(net, str(len(net) - 1)))
    keys = {name: value.shape for name, value in model.state_dict().items()}
    fitted = nmconv.fit(model, x, reference=net, **PLAIN)
    assert {name: value.shape for name, value in fitted.state_dict().items()} == keys
    assert [type(module) for module in fitted.modules()] == [type(module) for module in model.modules()]
    given, target = model[:3](x).data, net[: len(net) - 1](x).data
    found = targets_of(fitted[: len(net) - 1](x).data)
    rows, wanted = rows_of(given, 3, 1).reshape(-1, groups, 4 // groups * 9), targets_of(target)
    shift = bias or (norm and affine)
    if not shift:
        scale = (model[4].running_var + model[4].eps).rsqrt() if norm else torch.ones(4, dtype=x.dtype)
        fixed = -model[4].running_mean * scale if norm else torch.zeros(4, dtype=x.dtype)
    for group in range(groups):
        own = slice(group * 4 // groups, (group + 1) * 4 // groups)
        if shift:
            weight, constant = least_squares(rows[:, group], wanted[:, own])
        else:
            constant = fixed[own]
            weight = torch.linalg.lstsq(rows[:, group], wanted[:, own] - constant).solution
        assert_near(found[:, own], rows[:, group] @ weight + constant, 1e-8)
    (unit,) = report(fitted).units
    assert unit.form == "factors" and unit.convs == ("0", "3")
    error = (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert unit.after == pytest.approx(float(error), rel=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_the_norms_statistics_are_those_of_its_new_input(bias: bool) -> None:
    net = pair(bias=bias)
    x = picture(3, 8, 7, batch=40)
    model = disturbed(dropped(net, "5"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = nmconv.fit(model, x, reference=net, **PLAIN)
    given = targets_of(fitted[:4](x).data)
    assert_near(fitted[4].running_mean, given.mean(0), 1e-10)
    assert_near(fitted[4].running_var, given.var(0, unbiased=False), 1e-10)
    trained = copy.deepcopy(fitted)
    trained[4].train()
    assert_near(trained(x), fitted(x), 1e-6)
    changed = {name for name, value in fitted.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {"3.weight", "4.weight", "4.bias", "4.running_mean", "4.running_var"}  # not the conv's bias


def test_factors_still_merge_exactly() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
    x = picture(3, 8, 7, batch=40)
    fitted = nmconv.fit(dropped(net, "4"), x, reference=net, recalibrate=False)
    merged = nmconv.merge(fitted, gate="always")
    assert isinstance(merged[3], nn.Identity)
    assert_near(merged(x), fitted(x), 1e-8)


# The ridge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_a_ridge_is_a_penalty_on_the_way_from_the_composed_kernel(ridge: float) -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3, padding=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
    x = picture(3, 8, 7, batch=40)
    model = disturbed(dropped(net, "3"))
    start = nmconv.merge(model, gate="always")[0]
    fitted = nmconv.fit(model, x, reference=net, kernel="exact", recalibrate=False, holdout=0, ridge=ridge)
    rows, wanted = rows_of(x, 5, 2), targets_of(net[:3](x))
    first, constant = start.weight.data.flatten(1).T, start.bias.data
    centred = rows - rows.mean(0)
    held = math.sqrt(ridge * float(centred.square().sum(0).mean()))
    eye = torch.eye(rows.shape[1], dtype=rows.dtype)
    weight = torch.linalg.lstsq(
        torch.cat([centred, held * eye]), torch.cat([wanted - wanted.mean(0), held * first])
    ).solution
    mean = (wanted.mean(0) + ridge * (rows.mean(0) @ first + constant)) / (1 + ridge)
    assert_near(fitted[0].weight.data.flatten(1).T, weight, 1e-8)
    assert_near(fitted[0].bias.data, mean - rows.mean(0) @ weight, 1e-8)


@pytest.mark.parametrize("holdout", [0, 0.25])
def test_an_infinite_ridge_changes_nothing(holdout: float) -> None:
    net = hoisted_pair()
    model = disturbed(dropped(net, "4"))
    x = picture(3, 8, 7, batch=20)
    options = {"reference": net, "recalibrate": False, "ridge": math.inf, "holdout": holdout}
    factors = nmconv.fit(model, x, **options)
    for name, value in factors.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    merged = nmconv.fit(model, x, kernel="exact", **options)
    assert_near(merged(x), model(x), 1e-12)
    assert all(unit.ridge == math.inf and unit.before == unit.after for unit in report(merged).units)


@pytest.mark.parametrize("kernel", [None, "exact", 3, 1])
@pytest.mark.parametrize("images", [4, 12, 40])
def test_held_out_images_are_never_worse_off(kernel: Any, images: int) -> None:
    for seed in range(3):
        net = settle(
            nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()), seed
        )
        x = picture(4, 6, 5, batch=images, seed=seed)
        model = dropped(net, "3")
        fitted = nmconv.fit(model, x, reference=net, kernel=kernel, recalibrate=False)
        (unit,) = report(fitted).units
        assert unit.held_after <= unit.held_before
        held = x[3::4]
        wanted, found = net[:3](held).data, fitted[:3](held).data
        error = (found - wanted).square().sum() / (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
        assert unit.held_after == pytest.approx(float(error), rel=1e-8)
        assert (unit.images, report(fitted).held) == (images - images // 4, images // 4)


def test_the_ridge_is_the_best_of_all_that_are_tried() -> None:
    net = settle(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()))
    x = picture(4, 6, 5, batch=16)
    auto = report(nmconv.fit(dropped(net, "3"), x, reference=net, kernel="exact", recalibrate=False)).units[0]
    errors = {}
    for power in range(-7, 2):
        fitted = nmconv.fit(dropped(net, "3"), x, reference=net, kernel="exact", recalibrate=False, ridge=10.0**power)
        errors[10.0**power] = report(fitted).units[0].held_after
    assert auto.held_after == pytest.approx(min(errors.values()))
    assert errors[auto.ridge] == auto.held_after


# Too little, or nothing, to go by ------------------------------------------------------------------------------------


def test_dead_channels_keep_what_they_had() -> None:
    net = hoisted_pair()
    x = picture(3, 8, 7, batch=40)
    x[:, 1] = 0
    model = dropped(net, "4")
    start = nmconv.merge(model, gate="always")[0].weight.data
    fitted = nmconv.fit(model, x, reference=net, kernel="exact", **PLAIN)
    assert_near(fitted[0].weight.data[:, 1], start[:, 1], 1e-8)
    assert report(fitted).units[0].after < 1e-12


def test_two_channels_that_are_the_same() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))
    x = picture(3, 8, 7, batch=40)
    x[:, 1] = x[:, 2]
    fitted = nmconv.fit(dropped(net, "3"), x, reference=net, kernel=3, **PLAIN)
    weight, constant = least_squares(rows_of(x[:, :2], 3, 1), targets_of(net[:3](x)))
    wanted = rows_of(x[:, :2], 3, 1) @ weight + constant
    assert_near(targets_of(fitted[:3](x)), wanted, 1e-7)
    assert fitted[0].weight.abs().max() < 100


def test_constant_targets_and_inputs() -> None:
    net = hoisted_pair()
    with torch.no_grad():
        net[3].weight.zero_()
    x = picture(3, 8, 7, batch=12)
    fitted = nmconv.fit(disturbed(dropped(net, "4")), x, reference=net, kernel="exact", recalibrate=False)
    assert_near(fitted(x), net(x), 1e-5)
    flat = nmconv.fit(dropped(net, "4"), torch.zeros_like(x), reference=net, recalibrate=False)
    assert all(torch.isfinite(value).all() for value in flat.state_dict().values())


def test_fewer_positions_than_unknowns_is_said() -> None:
    net = settle(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()))
    fitted = nmconv.fit(dropped(net, "3"), picture(8, 6, 6, batch=8), reference=net, kernel="exact")
    (unit,) = report(fitted).units
    assert (unit.positions, unit.unknowns) == (6 * 4, 8 * 25)
    assert "24 positions for 200 unknowns" in unit.why and unit.why in str(report(fitted))
    plenty = nmconv.fit(dropped(net, "3"), picture(8, 8, 8, batch=40), reference=net, kernel="exact")
    assert report(plenty).units[0].why == ""


# Conjugate gradients -------------------------------------------------------------------------------------------------


def geometry(kernel: int, groups: int, inputs: int = 4, outputs: int = 6) -> Geometry:
    pads = ((kernel // 2, kernel // 2),) * 2
    return Geometry(inputs, outputs, (kernel, kernel), (1, 1), (1, 1), groups, pads)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("intercept", [True, False])
def test_both_solvers_give_the_same(groups: int, intercept: bool) -> None:
    form = geometry(3, groups)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    batches = []
    for seed in range(3):  # correlated, of different sizes, far from zero
        x = torch.einsum("oc,bchw->bohw", mix, picture(4, 6, 7, batch=5 + seed, seed=seed)) + 10
        batches.append((x, F.relu(picture(6, 6, 7, batch=5 + seed, seed=10 + seed)) + x.mean(1, keepdim=True)))
    direct, passes = samples.UnitSamples(form), ConjugateGradients(batches, form)
    for x, y in batches:
        direct.add(x, y)
    moments = direct.regression((3, 3))
    assert isinstance(moments, Moments) and moments.rows == passes.rows == 18 * 42
    weight = torch.randn(groups, 36 // groups, 6 // groups, generator=generator, dtype=torch.float64)
    start = Coefficients(weight, torch.randn(groups, 6 // groups, generator=generator, dtype=torch.float64))
    assert passes.error(start) == pytest.approx(moments.error(start), rel=1e-9)
    for one, two in zip(moments.output_statistics(weight), passes.output_statistics(weight), strict=True):
        assert_near(one, two, 1e-9)
    ridges = [math.inf, 1.0, 1e-3, 1e-6]
    pairs = zip(
        moments.solutions(start, ridges, fit_intercept=intercept),
        passes.solutions(start, ridges, fit_intercept=intercept),
        strict=True,
    )
    for one, two in pairs:
        assert_near(two.weight, one.weight, 1e-6)
        assert_near(two.intercept, one.intercept, 1e-6)
        assert passes.error(two) == pytest.approx(moments.error(one), rel=1e-6)


@pytest.mark.parametrize("kernel", [None, "exact", "auto", 3])
def test_a_fit_by_conjugate_gradients(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = settle(
        nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(),
        )
    )  # fmt: skip
    x = picture(4, 7, 6, batch=40)
    direct = nmconv.fit(dropped(net, "5"), x, reference=net, kernel=kernel, recalibrate=False)
    used = []
    solver = ConjugateGradients._solver
    monkeypatch.setattr(
        ConjugateGradients, "_solver", lambda self, *args: used.append(self.columns) or solver(self, *args)
    )
    monkeypatch.setattr(samples, "_MAX_COLUMNS", 40)  # a 3x3 of four channels has 36 columns
    if kernel != "auto":
        monkeypatch.setattr(samples, "_MAX_COLUMNS", 1)
    passes = nmconv.fit(dropped(net, "5"), x, reference=net, kernel=kernel, recalibrate=False)
    assert set(used) == {None: {27}, "exact": {100}, "auto": {100}, 3: {36}}[kernel]
    assert_near(passes(x), direct(x), 1e-6)
    for one, two in zip(report(direct).units, report(passes).units, strict=True):
        assert (one.kernel, one.ridge, one.positions, one.unknowns) == (
            two.kernel,
            two.ridge,
            two.positions,
            two.unknowns,
        )
        assert two.held_after == pytest.approx(one.held_after, rel=1e-6)


@pytest.mark.parametrize("kernel", [None, "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inputs_that_say_nothing_are_told(kernel: Any, dtype: torch.dtype) -> None:
    """A channel that is always zero, and one that is twice another: six and nine taps for the second convolution."""
    net = settle(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU()))
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 0, 0
        net[0].weight[4], net[0].bias[4] = 2 * net[0].weight[0], 2 * net[0].bias[0]
    net = net.to(dtype)
    x = picture(3, 9, 9, batch=16).to(dtype)
    fitted = nmconv.fit(dropped(net, "3"), x, reference=net, kernel=kernel)
    (unit,) = report(fitted).units
    if kernel is None:  # of five channels: one is dead, one a copy; three channels in make rank three at each tap
        assert "9 of 45 inputs never change and 9 of 45 inputs follow from the others" in unit.why
    else:
        assert not unit.why
    assert unit.why in str(report(fitted))
