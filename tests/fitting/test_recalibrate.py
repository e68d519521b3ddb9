"""``nmconv.recalibrate_norms``: statistics computed by hand, and everything else as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fit_nets import as_it_is, dropped, report
from merge_nets import assert_near, made, picture, settle
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nmconv

torch.set_num_threads(1)
X = picture(3, 6, 5, batch=40)


def two_norms() -> nn.Sequential:
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, momentum=None), nn.ReLU(),
        )
    )  # fmt: skip


def normalised(norm: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


def by_hand(net: Any, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Means and unbiased variances of what the two norms are given, the first normalising by its batch."""
    with torch.no_grad():
        first = net[0](x)
        second = net[4](F.relu(normalised(net[1], first)))
        return [(value.mean((0, 2, 3)), value.transpose(0, 1).flatten(1).var(1)) for value in (first, second)]


def test_statistics_are_those_of_the_images() -> None:
    net = two_norms()
    wanted = by_hand(net, X)
    parameters = {name: (value, value.clone()) for name, value in net.named_parameters()}
    assert nmconv.recalibrate_norms(net, X) is net
    for norm, (mean, variance) in zip((net[1], net[5]), wanted, strict=True):
        assert_near(norm.running_mean, mean, 1e-10)
        assert_near(norm.running_var, variance, 1e-10)
    assert (net[1].momentum, net[5].momentum) == (0.1, None)
    for name, value in net.named_parameters():
        assert value is parameters[name][0] and torch.equal(value, parameters[name][1])
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_small_batches_are_put_together(batch: int) -> None:
    net, other = two_norms(), two_norms()
    x = picture(3, 5, 5, batch=65)  # 1x1 maps: one image alone has no statistics
    nmconv.recalibrate_norms(net, x.split(batch))
    nmconv.recalibrate_norms(other, x.split(65))
    for one, two in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert_near(one.double(), two.double(), 1e-9)


def test_batches_count_as_their_images_do() -> None:
    net = two_norms()
    x = torch.cat([X, picture(3, 6, 5, batch=200, seed=9)])
    nmconv.recalibrate_norms(net, [x[:200], x[200:]])
    first = [by_hand(two_norms(), part)[0][0] for part in (x[:200], x[200:])]
    assert_near(net[1].running_mean, (200 * first[0] + 40 * first[1]) / 240, 1e-10)


@pytest.mark.parametrize("kind", ["pairs", "dicts", "generator", "loader", "dataset"])
def test_data(kind: str) -> None:
    net, other = two_norms(), two_norms()
    nmconv.recalibrate_norms(other, X)
    labels = torch.zeros(len(X))
    pairs = torch.utils.data.TensorDataset(X, labels)
    data: Any = {
        "pairs": [(X[:10], 0), (X[10:], 1)],
        "dicts": [{"image": X[:10], "label": 0}, {"label": 1, "image": X[10:]}],
        "generator": (part for part in X.split(9)),
        "loader": DataLoader(pairs, 11),
        "dataset": pairs,
    }[kind]
    nmconv.recalibrate_norms(net, data, key="image" if kind == "dicts" else None)
    for one, two in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert_near(one.double(), two.double(), 1e-9)


def test_norms_nobody_calls_stay() -> None:
    net = made(lambda self, x: self.norm(x), norm=nn.BatchNorm2d(3), idle=nn.BatchNorm2d(3))
    net.idle.num_batches_tracked.fill_(7)
    idle = {name: value.clone() for name, value in net.idle.state_dict().items()}
    nmconv.recalibrate_norms(net, X)
    for name, value in net.idle.state_dict().items():
        assert torch.equal(value, idle[name])


def test_a_norm_that_is_called_twice_sees_both() -> None:
    net = made(lambda self, x: self.norm(x) + self.norm(x * 3 + 1), norm=nn.BatchNorm2d(3))
    nmconv.recalibrate_norms(net, X)
    mean = X.mean((0, 2, 3))
    assert_near(net.norm.running_mean, (mean + 3 * mean + 1) / 2, 1e-10)


def test_norms_without_running_statistics() -> None:
    layers = [nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3, track_running_stats=True)]
    net = settle(nn.Sequential(*layers, nn.GroupNorm(1, 3)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    nmconv.recalibrate_norms(net, X)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("mixed", [True, False])
def test_modes_are_as_found(mixed: bool) -> None:
    net = two_norms().train()
    if mixed:
        net[1].eval()
        net[3].eval()
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    nmconv.recalibrate_norms(net, X)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)  # no dropout was drawn


@pytest.mark.parametrize("what", ["nan", "raises", "empty", "one"])
def test_what_goes_wrong_changes_nothing(what: str) -> None:
    net = two_norms().train()
    x = picture(3, 5, 5, batch=4)
    data: Any = x
    if what == "nan":
        data = x.clone()
        data[0, 0, 0, 0] = torch.nan
    elif what == "raises":
        data = [x, picture(7, 5, 5)]
    elif what == "empty":
        data = []
    else:
        data = x[:1]
    before = as_it_is(net)
    with pytest.raises((nmconv.FitError, nmconv.OptionError, RuntimeError)):
        nmconv.recalibrate_norms(net, data)
    assert as_it_is(net) == before


def test_a_converted_and_a_merged_model() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
    model = dropped(net, "4")
    nmconv.recalibrate_norms(model, X)
    with torch.no_grad():
        assert_near(model[1].running_mean, net[0](X).mean((0, 2, 3)), 1e-10)
    merged = nmconv.merge(model, gate="always")
    found = merged(X)
    nmconv.recalibrate_norms(merged, X)
    assert torch.equal(merged(X), found)


def test_fit_keeps_it_only_where_held_out_images_say_so() -> None:
    kept = []
    for seed in range(6):
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
        net = settle(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), seed)
        model = dropped(net, "5", "8")
        fit = report(nmconv.fit(model, picture(3, 6, 6, batch=24, seed=seed), reference=net))
        kept.append(fit.norms_recalibrated)
        assert fit.returned.loss <= fit.fitted.loss
        assert fit.norms_recalibrated == (fit.returned.loss < fit.fitted.loss)
        alone = report(nmconv.fit(model, picture(3, 6, 6, batch=24, seed=seed), reference=net, recalibrate=False))
        assert alone.returned == alone.fitted == fit.fitted and not alone.norms_recalibrated
        baseline = nmconv.recalibrate_norms(nmconv.apply_plan(net, nmconv.get_plan(model)), _fitted_part(seed))
        held = picture(3, 6, 6, batch=24, seed=seed)[3::4]
        with torch.no_grad():
            wanted, found = net(held).log_softmax(1), baseline(held).log_softmax(1)
        divergence = (wanted.exp() * (wanted - found)).sum(1).mean()
        assert fit.recalibrated.loss == pytest.approx(float(divergence), rel=1e-6)


def _fitted_part(seed: int) -> Tensor:
    x = picture(3, 6, 6, batch=24, seed=seed)
    return torch.stack([image for index, image in enumerate(x) if index % 4 != 3])
