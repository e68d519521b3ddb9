"""Norms that stay behind fitted convolutions: outputs as without them, training as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fit_nets import as_it_is, dropped, report
from merge_nets import assert_near, made, picture, settle, statistics
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

import nmconv

torch.set_num_threads(1)
X = picture(3, 8, 7, batch=24)


def resnet() -> nn.Module:
    return statistics(ResNet(BasicBlock, (2, 1, 1, 1), 3, channels=(4, 8, 8, 8)))


def networks() -> dict[str, Any]:
    return {
        "resnet": resnet,
        "mobilenetv2": lambda: statistics(timm.create_model("mobilenetv2_035", num_classes=3)),
        "lite0": lambda: statistics(timm.create_model("tf_efficientnet_lite0", num_classes=3)),
        "mnasnet": lambda: statistics(timm.create_model("mnasnet_small", num_classes=3)),
    }


def behind(model: nn.Module, name: str, *inputs: Tensor) -> Tensor:
    """What a module gives, by a hook."""
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, out: kept.append(out.detach().clone())
    )
    with torch.no_grad():
        model(*inputs)
    handle.remove()
    (found,) = kept
    return found


def moments_of(value: Tensor) -> tuple[Tensor, Tensor]:
    return value.mean((0, 2, 3)), value.var((0, 2, 3), unbiased=False)


@pytest.mark.parametrize(("name", "kernel"), [("resnet", "exact"), *((name, 1) for name in networks())])
def test_outputs_are_those_without_norms(name: str, kernel: Any) -> None:
    net = networks()[name]()
    x = picture(3, 32, 32, batch=8)
    # Held firmly: few images leave systems in which the last bits of one fit grow in the next.
    options: Any = {"reference": net, "kernel": kernel, "recalibrate": False, "ridge": 1e-2}
    model = nmconv.convert(net, "2:1", example_inputs=(x[:1],), keep="boundary")
    with_norms = nmconv.fit(model, x, **options)
    without = nmconv.fit(model, x, keep_norms=False, **options)
    y = picture(3, 33, 37, batch=3, seed=5)
    assert_near(with_norms(y), without(y), 1e-9)
    kept = {unit.norm for unit in report(with_norms).units if unit.form}
    assert kept and all(isinstance(with_norms.get_submodule(norm), _BatchNorm) for norm in kept)
    assert not any(unit.norm for unit in report(without).units)
    gone = {key for key in with_norms.state_dict() if key not in without.state_dict()}
    assert gone and {key.rpartition(".")[0] for key in gone} == kept


def test_statistics_are_those_of_what_the_norm_is_given() -> None:
    net = resnet()
    x = picture(3, 32, 32, batch=8)
    fitted = nmconv.fit(
        nmconv.convert(net, "2:1", keep="boundary"),
        x,
        reference=net,
        kernel=3,
        holdout=0,
        ridge=1e-3,
        recalibrate=False,
    )
    units = [unit for unit in report(fitted).units if unit.form]
    assert units
    for unit in units:
        given = behind(fitted, unit.convs[0], x)
        norm: Any = fitted.get_submodule(unit.norm)
        assert_near(norm.running_mean, moments_of(given)[0], 1e-9)
        assert_near(norm.running_var, moments_of(given)[1], 1e-9)
        assert_near(behind(fitted, unit.norm, x), given, 1e-9)
    # Train mode on the very images that were fitted gives the same too: nothing jumps when training begins.
    want = fitted(x)
    fitted.train()
    for module in fitted.modules():
        if isinstance(module, _BatchNorm) and module not in [fitted.get_submodule(unit.norm) for unit in units]:
            module.eval()
    assert_near(fitted(x), want, 1e-4)  # the norms' eps counts once here, and not at all in eval mode


def test_train_mode_normalises_whatever_the_convolution_has_become() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    fitted = nmconv.fit(dropped(net, "4"), X, reference=net, kernel="exact", recalibrate=False)
    want = moments_of(behind(fitted, "3", X))
    with torch.no_grad():
        fitted[0].weight *= 100
        fitted[0].bias += 7
    fitted[3].train()
    assert_near(moments_of(behind(fitted, "3", X))[1].sqrt(), want[1].sqrt(), 0.5)
    fitted[3].eval()
    for _ in range(100):
        fitted[3].train()(fitted[0](X))
    assert_near(behind(fitted.eval(), "3", X), fitted[3].eval()(fitted[0](X)))
    assert float(fitted[3].running_var.min()) > 100  # it follows


def test_saved_loaded_trained_and_folded(tmp_path: Path) -> None:
    net = resnet().float()
    x = picture(3, 32, 32, batch=8).float()
    fitted = nmconv.fit(nmconv.convert(net, "2:1", keep="boundary"), x, reference=net, kernel=3)
    norms = [unit.norm for unit in report(fitted).units if unit.form]
    optimizer = torch.optim.SGD(fitted.parameters(), 0.1)
    before = [fitted.get_submodule(norm).weight.detach().clone() for norm in norms]
    for _ in range(2):
        optimizer.zero_grad()
        fitted.train()(x).square().sum().backward()
        optimizer.step()
    assert all(
        not torch.equal(value, fitted.get_submodule(norm).weight) for value, norm in zip(before, norms, strict=True)
    )
    fitted.eval()
    nmconv.save(fitted, tmp_path / "net.safetensors")
    again = nmconv.load(resnet().float(), tmp_path / "net.safetensors")
    assert torch.equal(again(x), fitted(x)) and list(again.state_dict()) == list(fitted.state_dict())
    folded = nmconv.fold_norms(again)
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    assert_near(folded.double()(x.double()), copy.deepcopy(fitted).double()(x.double()), 1e-5)
    nmconv.save(folded, tmp_path / "folded.safetensors")
    last = nmconv.load(resnet(), tmp_path / "folded.safetensors")
    assert_near(last(x.double()), folded(x.double()), 1e-12)


def test_an_infinite_ridge_still_changes_nothing() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    model = dropped(net, "4")
    fitted = nmconv.fit(model, X, reference=net, kernel="exact", ridge=float("inf"), recalibrate=False)
    assert report(fitted).units[0].norm == "3"
    assert_near(fitted(X), model(X))


# Which norm ----------------------------------------------------------------------------------------------------------


def norm_kept(*layers: nn.Module, keep: str) -> str:
    net = settle(nn.Sequential(*layers))
    fitted = nmconv.fit(dropped(net, keep), X, reference=net, kernel="exact", recalibrate=False)
    (unit,) = report(fitted).units
    assert unit.form == "merged"
    return unit.norm


def test_the_last_one_with_as_many_channels() -> None:
    bn = nn.BatchNorm2d
    assert norm_kept(nn.Conv2d(3, 4, 3), bn(4), nn.ReLU(), nn.Conv2d(4, 4, 1), bn(4), nn.ReLU(), keep="5") == "4"
    assert norm_kept(nn.Conv2d(3, 4, 3), bn(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), keep="4") == "1"
    assert norm_kept(nn.Conv2d(3, 5, 3), bn(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.ReLU(), keep="4") == ""
    assert norm_kept(bn(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), keep="4") == ""  # before it
    assert norm_kept(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), keep="3") == ""


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, affine=False), FrozenBatchNorm2d(4)])
def test_norms_that_cannot_pass_on_what_they_are_given(norm: nn.Module) -> None:
    assert norm_kept(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), norm, nn.ReLU(), keep="4") == ""


def test_of_branches_the_norm_on_the_way_that_stays() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        one = self.norm(self.two(self.act1(self.one(x))))
        other = self.short_norm(self.short(x))
        found: Tensor = self.act2(one + other if self.first else other + one)
        return found

    for first in (True, False):
        net = made(
            forward, one=nn.Conv2d(3, 4, 3, 2, padding=1), two=nn.Conv2d(4, 4, 1), short=nn.Conv2d(3, 4, 1, 2),
            norm=nn.BatchNorm2d(4), short_norm=nn.BatchNorm2d(4), act1=nn.ReLU(), act2=nn.ReLU(),
        )  # fmt: skip
        net.first = first
        model = dropped(net, "act2")
        fitted, without = (
            nmconv.fit(model, X, reference=net, kernel="exact", recalibrate=False, keep_norms=keep)
            for keep in (True, False)
        )
        (unit,) = report(fitted).units
        assert unit.norm in ("norm", "short_norm")
        assert_near(fitted(X), without(X), 1e-9)
        assert_near(behind(fitted, unit.norm, X), behind(without, unit.convs[0], X), 1e-9)


def test_numbers_that_the_dtype_cannot_hold() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    with torch.no_grad():
        net[3].weight.fill_(1000)  # variances of a million
    half = net.to(torch.float16)
    fitted = nmconv.fit(dropped(half, "4"), X.half(), reference=half, kernel="exact", recalibrate=False)
    (unit,) = report(fitted).units
    assert unit.form == "merged" and unit.norm == ""
    assert bool(torch.isfinite(fitted(X.half())).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).to(
        dtype
    )
    x = X.to(dtype)
    fitted, without = (
        nmconv.fit(dropped(net, "4"), x, reference=net, kernel="exact", recalibrate=False, keep_norms=keep)
        for keep in (True, False)
    )
    assert report(fitted).units[0].norm == "3"
    assert_near(fitted(x).double(), without(x).double(), 8 * torch.finfo(dtype).eps)


def test_a_channel_without_variance_and_a_norm_without_eps() -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, eps=0), nn.ReLU())
    net = settle(nn.Sequential(*layers))
    with torch.no_grad():
        net[3].weight[1] = 0
    fitted = nmconv.fit(dropped(net, "4"), X, reference=net, kernel="exact", ridge=0.0, recalibrate=False)
    (unit,) = report(fitted).units
    assert unit.form == "merged" and bool(torch.isfinite(fitted(X)).all())


def test_statistics_that_are_another_norms_too_are_left_alone() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    net = settle(nn.Sequential(*layers, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    net[6].running_mean = net[3].running_mean
    for kernel in ("exact", None):
        model = dropped(net, "4", "7")
        before = model[6].running_mean.clone()
        fitted = nmconv.fit(model, X, reference=net, kernel=kernel, recalibrate=False)
        assert torch.equal(fitted[6].running_mean, before)
        assert "another module has the same" in report(fitted).units[0].why


def test_interrupted_the_norms_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    from nmconv.fitting import fitter

    net = resnet()
    model = nmconv.convert(net, "2:1", keep="boundary").train()
    before = as_it_is(model, net)
    fit_one, done = fitter.Fitter._fit_unit, []

    def failing(self: Any, unit: Any) -> Any:
        if len(done) == 2:
            assert as_it_is(model) != before
            raise KeyboardInterrupt
        done.append(fit_one(self, unit))
        return done[-1]

    monkeypatch.setattr(fitter.Fitter, "_fit_unit", failing)
    with pytest.raises(KeyboardInterrupt):
        nmconv.fit(model, picture(3, 32, 32, batch=8), reference=net, kernel=3, inplace=True)
    assert [unit.norm for unit in done] == [unit.norm for unit in done if unit.norm]
    assert as_it_is(model, net) == before


def test_a_frozen_norm_stays_frozen() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    model = dropped(net, "4").train()
    model[3].eval().requires_grad_(False)
    fitted = nmconv.fit(model, X, reference=net, kernel="exact")
    assert not fitted[3].training and not fitted[3].weight.requires_grad and fitted[0].training
