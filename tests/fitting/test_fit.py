"""``nmconv.fit`` as it is used: what it leaves alone, what it is given, what it refuses, and saving what it made."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from fit_nets import as_it_is, disturbed, dropped, report
from merge_nets import assert_near, made, picture, settle, statistics
from timm.layers import StdConv2d
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import nmconv
from nmconv.fitting import Divergence, Fit, UnitFit, fitter
from nmconv.observing import data

torch.set_num_threads(1)
X = picture(3, 8, 7, batch=24)


def small(seed: int = 0) -> nn.Sequential:
    """Two linear runs, each of two convolutions once its activation is gone."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    layers += [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()]
    return settle(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), seed)


def converted(net: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    net = net or small()
    return dropped(net, "5", "9"), net


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items()
    )


# Bit-equal elsewhere -------------------------------------------------------------------------------------------------


def functional(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.c2(F.relu(self.c1(x), inplace=True)))
    return F.relu_(self.c4(F.relu(self.c3(x)))).mean((2, 3))


def nets() -> dict[str, Any]:
    convs = {"c1": nn.Conv2d(3, 4, 3, padding=1), **{f"c{at}": nn.Conv2d(4, 4, 3, padding=1) for at in (2, 3, 4)}}
    return {
        "resnet": lambda: ResNet(BasicBlock, (2, 1, 1, 1), 3, channels=(4, 8, 8, 8)),
        "torchvision": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 3),
        "mobilenetv2": lambda: timm.create_model("mobilenetv2_035", num_classes=3),
        "densenet": lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3),
        "mnasnet": lambda: timm.create_model("mnasnet_small", num_classes=3),
        "functional": lambda: made(functional, **convs),
    }


@pytest.mark.parametrize("kernel", [None, 1])
@pytest.mark.parametrize("name", ["resnet", "torchvision", "mobilenetv2", "densenet", "mnasnet", "functional"])
def test_nothing_outside_of_the_units_changes(name: str, kernel: Any) -> None:
    net = statistics(nets()[name]())
    x = picture(3, 32, 32, batch=8)
    model = nmconv.convert(net, "2:1", example_inputs=(x[:1],), keep="boundary")
    if name != "functional":
        model.train()
        net.get_submodule(next(name for name, _ in net.named_children())).train()
    before = as_it_is(model, net)
    fitted = nmconv.fit(model, x, reference=net, kernel=kernel, recalibrate=False, ridge=1e-3)
    assert as_it_is(model, net) == before
    units = report(fitted).units
    assert (units and all(unit.form for unit in units)) or kernel is None
    touched = {conv for unit in units if unit.form for conv in unit.convs}
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in fitted.named_modules() if name in modes}.items() <= modes.items()
    states = model.state_dict(), fitted.state_dict()
    if kernel is None:
        assert list(states[0]) == list(states[1])
        convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        changed = {name for name in convs if not torch.equal(states[0][f"{name}.weight"], states[1][f"{name}.weight"])}
        assert changed <= {unit.convs[-1] for unit in units if unit.form} | {unit.convs[0] for unit in units}
        assert len(changed) <= len(units)
    for key, value in states[1].items():
        owner = key.rpartition(".")[0]
        module = fitted.get_submodule(owner)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and owner not in touched:
            assert torch.equal(value, states[0][key]), key
    assert not any(
        hooks
        for module in fitted.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )
    assert all(value.requires_grad and value.grad is None for value in fitted.parameters())
    fitted.eval()(x).sum().backward()


def test_modules_that_came_in_place_of_others_have_their_modes() -> None:
    model, net = converted()
    fitted = nmconv.fit(model.train(), X, reference=net, kernel="exact", recalibrate=False)
    assert all(module.training for module in fitted.modules())


def test_in_place_and_as_a_copy() -> None:
    model, net = converted()
    copied = nmconv.fit(model, X, reference=net)
    assert copied is not model and nmconv.get_fit(model) is None
    there = nmconv.fit(model, X, reference=net, inplace=True)
    assert there is model and same(there, copied) and str(report(there)) == str(report(copied))


def test_a_model_that_overwrites_its_input() -> None:
    net = made(
        lambda self, x: self.a2(self.c2(self.a1(self.c1(F.relu_(x))))),
        c1=nn.Conv2d(3, 4, 3), c2=nn.Conv2d(4, 4, 3), a1=nn.ReLU(), a2=nn.ReLU(),
    )  # fmt: skip
    x = X.clone()
    fitted = nmconv.fit(dropped(net, "a2", ""), x, reference=net)
    assert torch.equal(x, X)
    assert same(fitted, nmconv.fit(dropped(net, "a2", ""), F.relu(X), reference=net))


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("kernel", [None, "exact"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_model_as_it_was(
    at: int, kernel: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, net = converted()
    model.train()
    model[4].eval()
    before = as_it_is(model, net)
    fit_one, refit = fitter.Fitter._fit_unit, fitter.recalibrate
    done = []

    def failing(self: Any, unit: Any) -> Any:
        if len(done) == at:
            raise error("here")
        done.append(unit)
        return fit_one(self, unit)

    def failing_later(*args: Any) -> Any:
        if len(done) == 2:
            refit(*args)
            raise error("here")
        return refit(*args)

    monkeypatch.setattr(fitter.Fitter, "_fit_unit", failing)
    monkeypatch.setattr(fitter, "recalibrate", failing_later)
    with pytest.raises(error, match="here"):
        nmconv.fit(model, X, reference=net, kernel=kernel, inplace=True)
    assert as_it_is(model, net) == before
    assert nmconv.get_fit(model) is None and nmconv.get_merges(model) == ()


# Data ----------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(X, range(len(X)), strict=True)


def data_of(kind: str) -> Any:
    pairs = TensorDataset(X, torch.arange(len(X)))
    return {
        "list": list(X.split(5)),
        "pairs": [(part, 0) for part in X.split(5)],
        "lists": [[part, 0] for part in X.split(5)],
        "generator": (part for part in X.split(1)),
        "loader": DataLoader(pairs, 5),
        "uneven": DataLoader(pairs, 9),
        "no batches": DataLoader(pairs, batch_size=None, sampler=[slice(0, 10), slice(10, 24)]),
        "dataset": pairs,
        "stream": DataLoader(Stream(), 5),
        "float32": X.float(),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["list", "pairs", "lists", "generator", "loader", "uneven", "no batches", "dataset", "stream", "float32"]
)
def test_data(kind: str) -> None:
    model, net = converted()
    wanted = nmconv.fit(model, X, reference=net)
    found = nmconv.fit(model, data_of(kind), reference=net)
    assert_near(found(X), wanted(X), 1e-4 if kind == "float32" else 1e-9)
    assert (report(found).images, report(found).held) == (18, 6)


def test_dicts() -> None:
    model, net = converted()
    batches = [{"label": 1, "image": part} for part in X.split(5)]
    assert_near(nmconv.fit(model, batches, reference=net, key="image")(X), nmconv.fit(model, X, reference=net)(X), 1e-9)
    for key in (None, "picture"):
        with pytest.raises(nmconv.OptionError, match=r"'label', 'image'.*key="):
            nmconv.fit(model, batches, reference=net, key=key)


def test_a_shuffling_loader_is_read_once() -> None:
    model, net = converted()
    read = []

    class Counting(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Counting(X, torch.zeros(24)), 5, shuffle=True, generator=torch.Generator().manual_seed(3))
    fitted = nmconv.fit(model, loader, reference=net)
    assert sorted(read) == list(range(24))
    again = nmconv.fit(model, X[read], reference=net)
    assert_near(fitted(X), again(X), 1e-9)


@pytest.mark.parametrize("subset", [False, True])
def test_more_images_than_memory_should_hold(subset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, net = converted()
    pairs = TensorDataset(X, torch.arange(len(X)))
    wanted = nmconv.fit(model, X[:16] if subset else X, reference=net)
    monkeypatch.setattr(data, "_MAX_BYTES", 2000)
    options: dict[str, Any] = {"sampler": SubsetRandomSampler(range(16))} if subset else {"shuffle": True}
    fitted = nmconv.fit(model, DataLoader(pairs, 5, **options), reference=net)
    assert_near(fitted(X), wanted(X), 1e-9)
    assert (report(fitted).images, report(fitted).held) == ((12, 4) if subset else (18, 6))
    kept = nmconv.fit(model, list(X.split(5)), reference=net)  # what cannot be read again is kept
    assert report(kept).images == 18


@pytest.mark.parametrize(
    "data",
    [[], X[:0], torch.tensor(1.0), 3, None, "images", {"x": X}, [3], [[]], [torch.zeros(3)], [X.numpy()], iter(()),
     ["ab"], [(0, X)]],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_no_data(data: Any) -> None:
    model, net = converted()
    before = as_it_is(model, net)
    with pytest.raises(nmconv.OptionError, match=r"data|batches"):
        nmconv.fit(model, data, reference=net, inplace=True)
    assert as_it_is(model, net) == before


def test_images_that_are_no_batches() -> None:
    model, net = converted(small()[:10])
    with pytest.raises(nmconv.FitError, match="batches of images"):
        nmconv.fit(model, list(X), reference=net)


def test_the_report_names_a_single_convolution_once() -> None:
    nan, same = float("nan"), Divergence(0.0, 1.0)
    unit = UnitFit(("a.conv",), "", (), nan, nan, nan, nan, nan, 1, 1, 1)
    assert "\na.conv: left" in str(Fit((unit,), 1, 0, same, same, same, same, False))


def test_one_image() -> None:
    model, net = converted()
    with pytest.raises(nmconv.OptionError, match="too few to hold out"):
        nmconv.fit(model, X[:1], reference=net)
    with pytest.raises(nmconv.OptionError, match="ridge such as"):
        nmconv.fit(model, X[:1], reference=net, holdout=0)
    with pytest.raises(nmconv.OptionError, match=r"images of shape \(\d+, \d+\).*is the batch axis missing\?"):
        nmconv.fit(model, X[0, :3], reference=net)
    with pytest.raises(nmconv.FitError, match=r"does not accept images of shape \(1, "):
        nmconv.fit(model, X[:, :1], reference=net)
    fitted = nmconv.fit(model, X[:1], reference=net, holdout=0, ridge=1e-2, recalibrate=False)
    assert report(fitted).units[0].after <= report(fitted).units[0].before


@pytest.mark.parametrize(
    "options",
    [{"ridge": -1}, {"ridge": "much"}, {"ridge": float("nan")}, {"ridge": True}, {"holdout": 1}, {"holdout": -0.1},
     {"holdout": "half"}, {"kernel": 0}, {"kernel": -3}, {"kernel": "big"}, {"kernel": True}, {"kernel": 3.5},
     {"kernel": "3x3x3"}],
    ids=str,
)  # fmt: skip
def test_options_that_are_none(options: dict[str, Any]) -> None:
    model, net = converted()
    before = as_it_is(model, net)
    with pytest.raises(nmconv.OptionError, match=next(iter(options))):
        nmconv.fit(model, X, reference=net, inplace=True, **options)
    assert as_it_is(model, net) == before


@pytest.mark.parametrize("where", ["image", "weight", "reference", "inside"])
def test_values_that_are_not_finite(where: str) -> None:
    model, net = converted()
    x = X.clone()
    with torch.no_grad():
        if where == "image":
            x[5, 1, 2, 3] = torch.inf
        elif where == "inside":  # the pooled output hides nothing, but a layer that is clamped would
            model[1].weight[0] = torch.nan
        else:
            (model if where == "weight" else net)[3].weight[0, 0, 0, 0] = torch.nan
    before = as_it_is(model, net)
    with pytest.raises(nmconv.FitError, match="not finite"):
        nmconv.fit(model, x, reference=net, inplace=True)
    assert as_it_is(model, net) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [None, "exact"])
def test_half_precision(dtype: torch.dtype, kernel: Any) -> None:
    net = small()
    wanted = nmconv.fit(converted(net)[0], X, reference=net, kernel=kernel, recalibrate=False)
    low = copy.deepcopy(net).to(dtype)
    fitted = nmconv.fit(dropped(low, "5", "9"), X.float(), reference=low, kernel=kernel, recalibrate=False)
    assert all(value.dtype == dtype for value in fitted.parameters())
    assert_near(fitted(X.to(dtype)).double(), wanted(X), 0.05 if dtype == torch.float16 else 0.3)
    assert all(unit.held_after < unit.held_before for unit in report(fitted).units)


# Models that cannot be -----------------------------------------------------------------------------------------------


def test_models_that_cannot_be_fitted() -> None:
    model, net = converted()
    merged = nmconv.merge(
        dropped(settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))), "9"), gate="always"
    )
    fitted = nmconv.fit(model, X, reference=net, kernel=1)
    cases = [
        (net, net, "was not converted"),
        (model, model, "was itself converted"),
        (model, copy.deepcopy(model), "was itself converted"),
        (merged, net, "merged"),
        (fitted, net, "merged or fitted"),
        (model, small()[:9], "not the model that was converted.*give that model as it was before"),
        (model, nn.Sequential(), "not the model that was converted"),
        (model, copy.deepcopy(net).float(), r"\.to\("),
    ]
    for given, reference, text in cases:
        with pytest.raises(nmconv.FitError, match=text):
            nmconv.fit(given, X, reference=reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, since 2.13
        scripted = torch.jit.script(net)
    for given, reference in ((3, net), (model, None), (nn.DataParallel(model), net), (model, scripted)):
        with pytest.raises(nmconv.ModelTypeError):
            nmconv.fit(given, X, reference=reference)


def refused(net: nn.Module, *keep: str, **options: Any) -> str:
    """Why the only unit was left as it was, bit for bit."""
    model = dropped(net, *keep)
    x = picture(4, 8, 8, batch=12)
    fitted = nmconv.fit(model, x, reference=net, recalibrate=False, **options)
    (unit,) = report(fitted).units
    assert not unit.form and same(fitted, model) and unit.why in str(report(fitted))
    return unit.why


def chain(*layers: nn.Module) -> nn.Sequential:
    return settle(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), *layers, nn.ReLU()))


def test_refused_by_name() -> None:
    dead = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        dead[3].weight[1:3] = 0
    assert "3 multiplies 2 of 4 channels by zero" in refused(dead, "4")
    normed = chain(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    assert refused(normed, "3").startswith("2:")
    with pytest.warns(FutureWarning, match="weight_norm"):
        older = chain(nn.utils.weight_norm(nn.Conv2d(4, 4, 3)))
    assert refused(older, "3").startswith("2:")
    assert refused(chain(StdConv2d(4, 4, 3)), "3").startswith("2:")


def test_weights_that_are_computed_have_a_merged_form() -> None:
    for layer in (StdConv2d(4, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))):
        net = chain(layer)
        fitted = nmconv.fit(dropped(net, "3"), picture(4, 8, 8, batch=12), reference=net, kernel="exact")
        assert report(fitted).units[0].form == "merged"


def summed(self: Any, x: Tensor) -> Tensor:
    return self.a2(self.c2(self.a1(self.c1(x))) + self.c3(x))


def test_summed_branches_have_no_last_convolution() -> None:
    net = made(summed, **{f"c{at}": nn.Conv2d(4, 4, 1) for at in (1, 2, 3)}, a1=nn.ReLU(), a2=nn.ReLU())
    assert "sum of convolutions" in refused(net, "a2")


@pytest.mark.parametrize("kernel", [None, "exact"])
def test_a_convolution_that_is_called_twice(kernel: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a2(self.c2(self.a1(self.c2(self.c1(x)))))

    net = made(forward, c1=nn.Conv2d(4, 4, 1), c2=nn.Conv2d(4, 4, 1), a1=nn.ReLU(), a2=nn.ReLU())
    assert "c2" in refused(net, "a2", kernel=kernel)


@pytest.mark.parametrize("kernel", [None, "exact"])
def test_weights_that_others_have_too(kernel: Any) -> None:
    net = chain(nn.Conv2d(4, 4, 3))
    net[2].weight = net[0].weight
    assert "2" in refused(net, "3", kernel=kernel) or "0" in refused(net, "3", kernel=kernel)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)])
def test_what_ends_a_run_is_said(layer: nn.Module) -> None:
    net = settle(nn.Sequential(nn.Conv2d(4, 4, 3), layer, nn.ReLU(), nn.MaxPool2d(2)))
    model = dropped(net)
    fitted = nmconv.fit(model, picture(4, 8, 8, batch=12), reference=net, recalibrate=False)
    assert all(not unit.form for unit in report(fitted).units) and report(fitted).units
    assert same(fitted, model)


def test_a_hook_in_the_merged_form() -> None:
    net = chain(nn.Conv2d(4, 4, 3))
    model = dropped(net, "3")
    model[2].register_forward_hook(lambda *_: None)
    fitted = nmconv.fit(model, picture(4, 8, 8, batch=12), reference=net, kernel="exact", recalibrate=False)
    assert "2 has a hook" in report(fitted).units[0].why
    factors = nmconv.fit(model, picture(4, 8, 8, batch=12), reference=net, recalibrate=False)
    assert report(factors).units[0].form == "factors" and factors[2]._forward_hooks


# Divergence ----------------------------------------------------------------------------------------------------------


def test_divergence_of_a_classifier() -> None:
    model, net = converted()
    fit = report(nmconv.fit(model, X, reference=net))
    held = X[3::4]
    with torch.no_grad():
        wanted, found = net(held), model(held)
    kl = F.kl_div(found.log_softmax(1), wanted.softmax(1), reduction="batchmean")
    assert fit.converted.loss == pytest.approx(float(kl))
    assert fit.converted.agreement == float((wanted.argmax(1) == found.argmax(1)).double().mean())
    assert fit.fitted.loss < fit.converted.loss


def test_divergence_of_maps_and_by_a_callable() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
    model = dropped(net, "3")
    fit = report(nmconv.fit(model, X, reference=net))
    held = X[3::4]
    with torch.no_grad():
        wanted, found = net(held), model(held)
    assert fit.converted.loss == pytest.approx(float((found - wanted).square().sum() / wanted.square().sum()))
    for each in (True, False):

        def loss(one: Tensor, two: Tensor, each: bool = each) -> Any:
            made = (one - two).abs().mean((1, 2, 3))
            return made if each else float(made.mean())

        given = report(nmconv.fit(model, X, reference=net, loss=loss))
        assert given.converted.loss == pytest.approx(float((found - wanted).abs().mean()))


# Saving --------------------------------------------------------------------------------------------------------------


def test_factors_go_into_a_fresh_converted_model() -> None:
    model, net = converted()
    fitted = nmconv.fit(model, X, reference=net)
    fresh = disturbed(dropped(small(5), "5", "9"))
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(X), fitted(X))


@pytest.mark.parametrize("kernel", [None, "exact", 1, "auto"])
def test_saved_and_loaded(kernel: Any, tmp_path: Path) -> None:
    for make in (small, lambda: statistics(ResNet(BasicBlock, (1, 1, 1, 1), 3, channels=(4, 8, 8, 8)))):
        net = make()
        x = X if isinstance(net, nn.Sequential) else picture(3, 32, 32, batch=8)
        model = nmconv.convert(net, "2:1", keep="boundary")
        fitted = nmconv.fit(model, x, reference=net, kernel=kernel)
        nmconv.save(fitted, tmp_path / "net.safetensors")
        again = nmconv.load(make(), tmp_path / "net.safetensors")
        assert torch.equal(again(x), fitted(x)) and list(again.state_dict()) == list(fitted.state_dict())


def test_a_plan_with_kernels_is_saved_before_and_after(tmp_path: Path) -> None:
    net = small()
    model = dropped(net, "5", "9", **{"0_3": 3})
    nmconv.save(model, tmp_path / "before.safetensors")
    loaded = nmconv.load(small(), tmp_path / "before.safetensors")
    fitted = nmconv.fit(loaded, X, reference=net)
    assert [unit.form for unit in report(fitted).units] == ["merged", "factors"]
    nmconv.save(fitted, tmp_path / "after.safetensors")
    assert torch.equal(nmconv.load(small(), tmp_path / "after.safetensors")(X), fitted(X))


def test_fitted_convolutions_merge_like_others() -> None:
    net = settle(nn.Sequential(*[layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3), nn.ReLU())]))
    model = dropped(net, "5", **{"0_2": 3})
    x = picture(4, 12, 11, batch=12)
    fitted = nmconv.fit(model, x, reference=net, recalibrate=False)
    assert report(fitted).units[0].convs == ("0", "2")
    merged = nmconv.merge(fitted, gate="always")
    assert_near(merged(x), fitted(x), 1e-8)
    assert sum(isinstance(module, nn.modules.conv._ConvNd) for module in merged.modules()) == 1


def test_fitted_again() -> None:
    model, net = converted()
    once = nmconv.fit(model, X, reference=net, recalibrate=False)
    twice = nmconv.fit(once, X, reference=net, recalibrate=False)
    for one, two in zip(report(once).units, report(twice).units, strict=True):
        assert two.held_before == pytest.approx(one.held_after, rel=1e-6) and two.held_after <= one.held_after * 1.01
    assert copy.deepcopy(twice) is not twice and nmconv.get_fit(copy.deepcopy(twice)) == report(twice)
