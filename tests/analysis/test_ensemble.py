"""``nmconv.ensemble.members``: networks built by hand, hard conversions to the bit, and the law of large numbers."""

from __future__ import annotations

import doctest
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import conv, net
from refused import not_plain
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nmconv
from nmconv.ensemble import Ensemble, members

torch.set_num_threads(1)
X = torch.randn(12, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(40, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 5


# -- networks ----------------------------------------------------------------------------------------------------------


def layers(acts: Iterable[nn.Module]) -> nn.Sequential:
    """A convolution, a norm and an activation for each of these, and a linear head; always the same numbers."""
    parts: list[nn.Module] = []
    for act in acts:
        parts += [conv(4 if parts else 3), nn.BatchNorm2d(4), act]
    return settled(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)))


def settled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    for value in (*model.double().parameters(), *model.buffers()):
        if value.is_floating_point():
            value.data.copy_(0.7 * torch.randn(value.shape, dtype=value.dtype, generator=generator))
            if value.dim() == 1:
                value.data.abs_().add_(0.1)
    return model.eval()


def relus(count: int = 3) -> nn.Sequential:
    return layers(nn.ReLU() for _ in range(count))


def functional() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = torch.relu_(self.two(x)) + x
        x = self.three(x)
        return self.head(F.gelu(x * torch.sigmoid(x)).mean((2, 3)))

    return settled(net(forward, one=conv(3), two=conv(), three=conv(), head=nn.Linear(4, 5)))


def shared() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.act(self.one(x))
        x = self.act(self.two(x)) + x
        return self.head(self.act(self.three(x)).mean((2, 3)))

    return settled(net(forward, one=conv(3), two=conv(), three=conv(), act=nn.PReLU(), head=nn.Linear(4, 5)))


def norm_and_act() -> nn.Module:
    parts = [conv(3), timm.layers.BatchNormAct2d(4), conv(), timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU)]
    return settled(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "modules": relus,
    "in place": lambda: layers(nn.ReLU(True) for _ in range(3)),
    "others": lambda: layers([nn.SiLU(), nn.PReLU(4), nn.ReLU6(True), nn.GELU()]),
    "functional": functional,
    "shared": shared,
    "resnet": lambda: settled(timm.create_model("resnet18", num_classes=5)),
    "norm and act": norm_and_act,
}


def all_of(model: nn.Module, images: Tensor = X) -> nmconv.Plan:
    return nmconv.make_plan(model, "1:1", example_inputs=images[:2])


def hard(model: nn.Module, plan: nmconv.Plan, dropped: Iterable[str]) -> nn.Module:
    """What :func:`nmconv.apply_plan` makes of the model."""
    actions = {site.id: "keep" for site in plan.sites if site.is_real} | dict.fromkeys(dropped, "drop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        return nmconv.apply_plan(model, plan.edit(actions)).eval()


def subsets(sites: Iterable[str]) -> list[tuple[str, ...]]:
    sites = tuple(sites)
    return [tuple(part) for count in range(len(sites) + 1) for part in itertools.combinations(sites, count)]


# -- members -----------------------------------------------------------------------------------------------------------


def test_all_members_by_hand() -> None:
    """Every number by its definition, of networks that nmconv has no part in."""
    a = 0.375
    found = members(relus(), [(X[:5], Y[:5]), (X[5:], Y[5:])], a, n="all")
    sites = ("2#1", "5#1", "8#1")
    assert (found.sites, found.slope, found.model, found.sampled) == (sites, a, "Sequential", False)
    assert sorted(found.dropped, key=lambda one: (len(one), one)) == subsets(sites)
    logits, soft = [], layers(nn.LeakyReLU(a) for _ in range(3))(X).detach()
    for at, dropped in enumerate(found.dropped):
        made = layers(nn.Identity() if site in dropped else nn.ReLU() for site in sites)
        logits.append(made(X).detach())
        gone = len(dropped)
        assert found.weights[at] == pytest.approx(a**gone * (1 - a) ** (3 - gone), rel=1e-15)
        assert found.kept[at] == 3 - gone and found.ratios[at] == (3 / (3 - gone) if gone < 3 else math.inf)
        assert found.accuracy is not None
        assert found.accuracy[at] == pytest.approx(float((logits[-1].argmax(1) == Y).double().mean()), rel=1e-15)
    assert sum(found.weights) == pytest.approx(1, rel=1e-14)
    both = zip(found.weights, logits, strict=True)
    mean = sum(weight * one for weight, one in both)
    probabilities = sum(weight * one.softmax(1) for weight, one in zip(found.weights, logits, strict=True))
    assert isinstance(mean, Tensor) and isinstance(probabilities, Tensor)
    for got, wanted in (
        (found.mean_logits, mean), (found.mean_probabilities, probabilities), (found.soft_logits, soft),
    ):  # fmt: skip
        assert got.dtype is torch.float64
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert found.gap == pytest.approx(float((mean - soft).abs().mean()), rel=1e-9) and found.gap > 1e-3
    pairs = [
        one * other * float((left.argmax(1) != right.argmax(1)).double().mean())
        for one, left in zip(found.weights, logits, strict=True)
        for other, right in zip(found.weights, logits, strict=True)
    ]
    assert found.disagreement == pytest.approx(sum(pairs), rel=1e-12) and found.disagreement > 0
    for accuracy, values in (
        (found.logits_accuracy, mean), (found.probabilities_accuracy, probabilities), (found.soft_accuracy, soft),
    ):  # fmt: skip
        assert accuracy == pytest.approx(float((values.argmax(1) == Y).double().mean()), rel=1e-15)
    assert max(found.accuracy or ()) > 0


@pytest.mark.parametrize("name", NETS)
def test_a_member_is_a_hard_conversion_to_the_bit(name: str) -> None:
    model = NETS[name]()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64) if name == "resnet" else X
    plan = all_of(model, images)
    sites = [site.id for site in plan.sites if site.is_real]
    seen = set()
    for seed in range(2 if name == "resnet" else 4):
        found = members(model, images, 0.5, n=1, seed=seed)
        assert list(found.sites) == sites
        other = hard(model, plan, found.dropped[0])
        seen.add(found.dropped[0])
        with torch.no_grad():
            assert torch.equal(found.mean_logits, other(images.clone()))
            assert torch.equal(found.mean_probabilities, other(images.clone()).softmax(1))
        made = nmconv.get_plan(other)
        assert made is not None
        counts = made.counts
        assert found.kept == (counts.activations_after,) and found.ratios == (counts.convs / counts.activations_after,)
        assert f"{found.ratios[0]:.2f}:1" == counts.ratio_reached
        assert found.weights == (1.0,) and math.isnan(found.disagreement)
    assert len(seen) > 1


def test_float32_members_to_the_bit() -> None:
    model, images = relus().float(), X.float()
    found = members(model.train(), images, 0.5, n=1, seed=1)
    assert 0 < len(found.dropped[0]) < 3
    with torch.no_grad():
        other = layers(nn.Identity() if f"{at}#1" in found.dropped[0] else nn.ReLU() for at in (2, 5, 8)).float()
        assert torch.equal(found.mean_logits, other(images).double())


@pytest.mark.parametrize("name", ["modules", "functional", "shared"])
def test_the_sampled_mean_nears_the_enumerated_one(name: str) -> None:
    model, a, n = NETS[name](), 0.3, 3000
    plan = all_of(model)
    every = members(model, [(X, Y)], a, n="all")
    given = {}
    with torch.no_grad():
        for dropped in every.dropped:
            given[dropped] = hard(model, plan, dropped)(X.clone())
    sampled = members(model, [(X, Y)], a, n=n, seed=11)
    assert len(sampled.dropped) == n and sum(sampled.weights) == pytest.approx(1)
    logits = torch.stack([given[dropped] for dropped in every.dropped])
    weights = torch.tensor(every.weights, dtype=torch.float64)
    for values, got, enumerated in (
        (logits, sampled.mean_logits, every.mean_logits),
        (logits.softmax(2), sampled.mean_probabilities, every.mean_probabilities),
    ):
        mean = torch.einsum("m,mic->ic", weights, values)
        torch.testing.assert_close(enumerated, mean, rtol=1e-12, atol=1e-12)
        error = (torch.einsum("m,mic->ic", weights, values.square()) - mean.square()).clamp(min=0).sqrt() / n**0.5
        assert ((got - mean).abs() <= 4 * error + 1e-12).all() and not torch.equal(got, mean)
    sites = len(every.sites)
    kept = torch.tensor(sampled.kept, dtype=torch.float64)
    assert abs(float(kept.mean()) - sites * (1 - a)) < 4 * (sites * a * (1 - a) / n) ** 0.5
    assert torch.equal(sampled.soft_logits, every.soft_logits)
    assert sampled.accuracy is not None and every.accuracy is not None
    known = dict(zip(every.dropped, every.accuracy, strict=True))
    assert sampled.accuracy == tuple(known[dropped] for dropped in sampled.dropped)
    assert sampled.disagreement == pytest.approx(every.disagreement, abs=0.05)


def test_disagreement_of_drawn_members_is_that_of_their_pairs() -> None:
    model = relus()
    plan = all_of(model)
    found = members(model, X, 0.5, n=7, seed=2)
    assert len(set(found.dropped)) < 7  # a member drawn twice agrees with itself
    with torch.no_grad():
        predicted = [hard(model, plan, dropped)(X).argmax(1) for dropped in found.dropped]
    pairs = [float((one != other).double().mean()) for one, other in itertools.combinations(predicted, 2)]
    assert found.disagreement == pytest.approx(sum(pairs) / len(pairs), rel=1e-12) and found.disagreement > 0


@pytest.mark.parametrize("a", [0.1, 0.3, 0.9])
def test_one_site_before_a_linear_head_leaves_no_gap(a: float) -> None:
    one = members(relus(1), X, a, n="all")
    torch.testing.assert_close(one.mean_logits, one.soft_logits, rtol=0, atol=1e-12)
    assert one.gap < 1e-12
    last = members(relus(3), X, a, n="all", sites=["8#1"])
    assert last.gap < 1e-12 and last.kept == (3, 2)
    for sites in (["2#1"], ["5#1", "8#1"], None):
        assert members(relus(3), X, a, n="all", sites=sites).gap > 1e-4


@pytest.mark.parametrize("n", ["all", 5])
def test_both_borders(n: Any) -> None:
    model = functional()
    plan = all_of(model)
    sites = [site.id for site in plan.sites if site.is_real]
    for a, dropped in ((0, ()), (1, sites)):
        found = members(model, X, a, n=n)
        with torch.no_grad():
            wanted = hard(model, plan, dropped)(X.clone())
        for got in (found.mean_logits, found.soft_logits):
            assert torch.equal(got, wanted)
        assert found.gap == found.disagreement == 0
        likely = {members for members, weight in zip(found.dropped, found.weights, strict=True) if weight}
        assert likely == {tuple(dropped)} and sum(found.weights) == pytest.approx(1)
    assert members(model, X, 1, n=2).ratios == (math.inf, math.inf)


def test_an_improbable_member_may_overflow() -> None:
    """0 · inf is NaN: what has no weight has no part in the mean."""
    model = layers([nn.ReLU6()])
    model[0].weight.data *= 1e200
    model[-1].weight.data *= 1e200
    found = members(model, X, 0, n="all")
    with torch.no_grad():
        assert not hard(model, all_of(model), found.sites)(X).isfinite().any()
        assert torch.equal(found.mean_logits, model(X)) and found.mean_logits.isfinite().all()


def test_sites() -> None:
    model = relus(4)
    plan = nmconv.make_plan(model, "2:1")
    assert len(plan.changes) == 2
    found = members(model, X, 0.5, n="all", sites=plan.changes)
    assert found.sites == tuple(site.id for site in plan.changes)
    assert members(model, X, 0.5, n="all", sites=reversed(found.sites)).sites == found.sites
    assert members(model, X, 0.5, n="all", sites=iter([*found.sites, *found.sites])).weights == found.weights
    assert set(found.kept) == set(range(len(all_of(model).sites) - len(found.sites), len(all_of(model).sites) + 1))


def test_seeds() -> None:
    torch.manual_seed(1)
    random.seed(1)
    one = members(relus(), X, 0.5, n=20, seed=3)
    torch.manual_seed(2)
    random.seed(2)
    again = members(relus(), X, 0.5, n=20, seed=3)
    assert one.dropped == again.dropped and torch.equal(one.mean_logits, again.mean_logits)
    assert members(relus(), X, 0.5, n=20, seed=4).dropped != one.dropped
    assert members(relus(), X, 0.5, n=30, seed=3).dropped[:20] == one.dropped  # more are more of the same


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batches", "pairs", "dicts", "generator", "loader", "dataset"])
def test_data(kind: str) -> None:
    data: Any = {
        "batches": X.split(5),
        "pairs": [(X[:5], Y[:5]), [X[5:], Y[5:]]],
        "dicts": [{"y": Y[:5], "x": X[:5]}, {"x": X[5:], "y": Y[5:]}],
        "generator": ((x, y) for x, y in zip(X.split(5), Y.split(5), strict=True)),
        "loader": DataLoader(TensorDataset(X, Y), 5),
        "dataset": TensorDataset(X, Y),
    }[kind]
    names = {"key": "x", "label_key": "y"} if kind == "dicts" else {}
    found = members(relus(), data, 0.4, n="all", **names)
    wanted = members(relus(), [(X, Y)], 0.4, n="all")
    torch.testing.assert_close(found.mean_logits, wanted.mean_logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.mean_probabilities, wanted.mean_probabilities, rtol=1e-12, atol=1e-12)
    assert found.disagreement == pytest.approx(wanted.disagreement) and found.gap == pytest.approx(wanted.gap)
    if kind == "batches":
        assert found.accuracy is found.soft_accuracy is found.logits_accuracy is found.probabilities_accuracy is None
    else:
        assert found.accuracy == pytest.approx(wanted.accuracy) and found.soft_accuracy == wanted.soft_accuracy


def test_what_is_no_label() -> None:
    for y in (0, torch.rand(12), torch.zeros(12, 5, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        assert members(relus(), [(X, y)], 0.4, n=2).accuracy is None
    assert members(relus(), [{"x": X, "y": Y}], 0.4, n=2, key="x").accuracy is None
    with pytest.raises(nmconv.OptionError, match="some batches of data have labels"):
        members(relus(), [(X, Y), X], 0.4, n=2)
    with pytest.raises(nmconv.OptionError, match="some batches of data have labels"):
        members(relus(), [X, (X, Y)], 0.4, n=2)
    with pytest.raises(nmconv.OptionError, match="'x', 'y': name the labels' by label_key="):
        members(relus(), [{"x": X, "y": Y}], 0.4, n=2, key="x", label_key="label")


def test_data_are_read_once() -> None:
    reads: list[int] = []

    class Once(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return super().__getitem__(index)

    members(relus(), DataLoader(Once(X, Y), 4), 0.4, n="all", recalibrate=DataLoader(Once(OTHER, OTHER), 8))
    assert sorted(reads) == sorted([*range(12), *range(40)])


# -- recalibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["modules", "in place", "others"])
def test_norms_are_estimated_for_each_member(name: str) -> None:
    model = NETS[name]()
    plan = all_of(model)
    for seed in range(3):
        found = members(model, X, 0.5, n=1, seed=seed, recalibrate=OTHER)
        other = nmconv.recalibrate_norms(hard(model, plan, found.dropped[0]), OTHER)
        soft = nmconv.apply_plan(model, plan.edit(dict.fromkeys(found.sites, "drop")), gradual=True)
        nmconv.set_slope(soft, 0.5)
        nmconv.recalibrate_norms(soft, OTHER)
        with torch.no_grad():
            assert torch.equal(found.mean_logits, other(X.clone()))
            assert torch.equal(found.soft_logits, soft(X.clone()))
        assert not torch.equal(found.mean_logits, members(model, X, 0.5, n=1, seed=seed).mean_logits)


def test_norms_by_hand() -> None:
    """Each member and the soft network in train mode on the other images, without nmconv."""
    model, a = relus(), 0.25
    found = members(model, X, a, n="all", recalibrate=iter(OTHER.split(20)))
    means = torch.zeros(12, 5, dtype=torch.float64)
    for weight, dropped in zip((*found.weights, 0), (*found.dropped, None), strict=True):
        acts = [
            nn.LeakyReLU(a) if dropped is None else nn.Identity() if f"{at}#1" in dropped else nn.ReLU()
            for at in (2, 5, 8)
        ]
        other = layers(acts)
        for norm in other:
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        with torch.no_grad():
            other.train()(OTHER)
            given = other.eval()(X)
        means += weight * given
        if dropped is None:
            torch.testing.assert_close(found.soft_logits, given, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.mean_logits, means, rtol=1e-9, atol=1e-9)


def test_recalibration_does_not_see_the_images_that_are_evaluated() -> None:
    model = relus()
    for recalibrate in (None, OTHER):
        alone = members(model, [X], 0.4, n="all", recalibrate=recalibrate)
        among = members(model, [X, 100 + X], 0.4, n="all", recalibrate=recalibrate)
        for name in ("mean_logits", "mean_probabilities", "soft_logits"):
            assert torch.equal(getattr(among, name)[:12], getattr(alone, name))
    for data in (X, [X], iter([X])):
        with pytest.raises(nmconv.OptionError, match="recalibrate is data itself"):
            members(model, data, 0.4, n=2, recalibrate=data)


# -- what is refused, and what is left alone ---------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls in a buffer, and draws at random, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + 0.1 * torch.rand_like(x)


def touched() -> nn.Sequential:
    """In several modes, with gradients, and with a first layer that overwrites the images."""
    parts = [nn.Hardtanh(inplace=True), conv(3), nn.BatchNorm2d(4), nn.ReLU(True), Counting(), conv(), nn.ReLU()]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().train()
    model[2].eval()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[5].weight.requires_grad_(False)
    return model


def look_of(model: nn.Module) -> Any:
    state = {name: (id(value), value.tolist()) for name, value in model.state_dict(keep_vars=True).items()}
    grads = [(value.requires_grad, value.grad is None) for value in model.parameters()]
    parts = [(type(part), part.training, sorted(vars(part)), len(part._forward_hooks)) for part in model.modules()]
    return state, grads, parts, torch.get_rng_state().tolist(), random.getstate()


@pytest.mark.parametrize("recalibrate", [None, OTHER])
@pytest.mark.parametrize("n", ["all", 3])
def test_the_model_is_left_as_it_was(n: Any, recalibrate: Any) -> None:
    model, images = touched(), X.clone()
    before = look_of(model)
    members(model, DataLoader(TensorDataset(images, Y), 4), 0.3, n=n, recalibrate=recalibrate)
    assert look_of(model) == before and torch.equal(images, X)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "slope": ({"slope": 1.5}, nmconv.OptionError, "a slope of 1.5"),
    "nan": ({"slope": math.nan}, nmconv.OptionError, "a slope of nan"),
    "text": ({"slope": "0.5"}, nmconv.OptionError, "a slope of '0.5'"),
    "true": ({"slope": True}, nmconv.OptionError, "a slope of True"),
    "none": ({"n": 0}, nmconv.OptionError, "n=0: give a number of members"),
    "part": ({"n": 2.0}, nmconv.OptionError, r"n=2\.0"),
    "every": ({"n": "every"}, nmconv.OptionError, "n='every'"),
    "one": ({"n": True}, nmconv.OptionError, "n=True"),
    "seed": ({"seed": "a"}, nmconv.OptionError, "seed='a'"),
    "negative": ({"seed": -3}, nmconv.OptionError, "seed=-3"),
    "site": ({"sites": ["3#1", "4#1"]}, nmconv.PlanError, r"no site '4#1'"),
    "kind": ({"sites": "3#1"}, nmconv.OptionError, "sites='3#1': give a list"),
    "no sites": ({"sites": []}, nmconv.OptionError, "sites is empty"),
    "no images": ({"data": []}, nmconv.OptionError, "no images"),
    "no others": ({"recalibrate": []}, nmconv.OptionError, "no images"),
    "nan images": ({"recalibrate": OTHER * math.nan}, nmconv.FitError, "not finite"),
    "data": ({"data": "images"}, nmconv.OptionError, "data='images'"),
    "channels": ({"data": X[:, :2]}, nmconv.OptionError, "cannot be called"),
    "second batch": ({"data": [X, X[:, :2]]}, nmconv.FitError, "does not accept images"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    options, kind, text = WRONG[name]
    model = touched()
    before = look_of(model)
    with pytest.raises(kind, match=text) as raised:
        members(**{"model": model, "data": X, "slope": 0.5, "n": 2, **options})
    assert type(raised.value) is kind
    assert look_of(model) == before


def test_too_many_members() -> None:
    with pytest.raises(nmconv.OptionError, match="of 13 sites would be 8192 members"):
        members(relus(13), X, 0.5, n="all")
    found = members(relus(13), X[:2], 0.5, n="all", sites=[f"{3 * at + 2}#1" for at in range(5)])
    assert len(found.weights) == 32 and found.kept[-1] == 8
    assert len(members(relus(13), X[:2], 0.5, n=3).sites) == 13


@pytest.mark.parametrize("gradual", [False, True])
def test_converted_models_are_refused(gradual: bool) -> None:
    model = relus()
    converted = nmconv.convert(model, "2:1", gradual=gradual)
    for each in (converted, nn.Sequential(converted)):
        with pytest.raises(nmconv.AlreadyConvertedError, match=r"take members of.*nmconv\.restore"):
            members(each, X, 0.5, n=2)
    if gradual:
        nmconv.Gradual(converted, 1, end=0).finish()
    restored = members(nmconv.restore(converted), X, 0.5, n=2)
    assert torch.equal(restored.mean_logits, members(model, X, 0.5, n=2).mean_logits)


def test_other_models_are_refused() -> None:
    model = relus()
    for other, text in not_plain(model, X):
        with pytest.raises(nmconv.ModelTypeError, match=text):
            members(other, X, 0.5, n=2)
    with pytest.raises(nmconv.NoSitesError, match="belongs to a convolution") as caught:
        members(nn.Sequential(conv(3)).double(), X, 0.5, n=2)
    assert "linear=True" not in str(caught.value)
    with nmconv.register(nn.RReLU, "activation"), pytest.raises(nmconv.OptionError, match="RReLU"):
        members(layers([nn.RReLU()]), X, 0.5, n=2)


@pytest.mark.parametrize("output", ["maps", "one", "tuple"])
def test_outputs_that_are_no_logits(output: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = F.relu(self.one(x))
        return {"maps": x, "one": x.mean((2, 3))[:, :1], "tuple": (x, x)}[output]

    with pytest.raises(nmconv.FitError, match="wrap the model in a module"):
        members(settled(net(forward, one=conv(3))), X, 0.5, n=2)


def test_sites_of_train_mode() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = F.relu(self.one(x))
        return self.two(F.gelu(self.aux(x)) if self.training else x).mean((2, 3))

    model = settled(net(forward, one=conv(3), two=conv(), aux=conv()))
    assert members(model, X, 0.5, n="all").sites == (":relu#1",)
    with pytest.raises(nmconv.OptionError, match=r":gelu#1\(train\) runs in train mode only"):
        members(model, X, 0.5, n="all", sites=[":relu#1", ":gelu#1(train)"])


def test_in_inference_mode() -> None:
    wanted = members(relus(), X, 0.5, n=3, recalibrate=OTHER)
    with torch.inference_mode():
        found = members(relus(), X, 0.5, n=3, recalibrate=OTHER)
    assert torch.equal(found.mean_logits, wanted.mean_logits)


# -- tables and docs ---------------------------------------------------------------------------------------------------


def test_tables() -> None:
    found = members(relus(2), [(X, Y)], 0.25, n="all")
    rows = found.rows()
    assert [row["kept"] for row in rows] == [2, 1, 1, 0] and [row["dropped"] for row in rows] == [
        "",
        "5#1",
        "2#1",
        "2#1 5#1",
    ]
    assert found.accuracy == tuple(row["accuracy"] for row in rows)
    lines = str(found).splitlines()
    assert lines[0] == "Sequential at slope 0.25: 4 members, of 2 sites, on 12 images"
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["0", "inf", "1", "0.0625"], ["1", "2", "2", "0.375"], ["2", "1", "1", "0.5625"],
    ]  # fmt: skip
    assert float(lines[3].split()[4]) == pytest.approx((rows[1]["accuracy"] + rows[2]["accuracy"]) / 2, abs=1e-3)
    assert lines[5].startswith("disagreement ") and "of the soft network" in lines[5]
    plain = members(relus(2), X, 0, n="all")
    assert "accuracy of" not in str(plain) and "members drawn" in str(members(relus(2), X, 0.5, n=3))


def test_the_docs_run() -> None:
    text = (Path(__file__).parents[2] / "docs" / "ensemble.md").read_text()
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) >= 2
    space: dict[str, Any] = {}
    for block in blocks:
        exec(block, space)
    assert isinstance(space["found"], Ensemble) and space["gradual"].state_dict()["sampling"] is True


def test_the_example_runs() -> None:
    assert nmconv.ensemble.members is members
    (test,) = doctest.DocTestFinder(recurse=False).find(members, globs={})
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0
