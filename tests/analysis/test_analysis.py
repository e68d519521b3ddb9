"""``nmconv.activation_stats``, ``ActivationRecorder`` and ``cka``: known answers, naive numbers, nothing touched."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from analysis_process import X, process, small
from nets import conv, net
from refused import not_plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nmconv

timm = pytest.importorskip("timm")
torch.set_num_threads(1)
NAMES = [field.name for field in dataclasses.fields(nmconv.SiteStats)]
_NUMBERS = ("positive", "mean", "variance", "sparsity", "rank", "gradient")


# -- a naive computation ---------------------------------------------------------------------------------------------


def naive(given: Tensor, made: Tensor, relu: bool, gradient: Tensor | None = None) -> dict[str, Any]:
    """The numbers of one call by their definitions, all at once, channels second."""
    x, y = (value.double().transpose(0, 1).flatten(1) for value in (given, made))
    covariance = torch.cov(y, correction=0).reshape(len(y), len(y))
    variances = covariance.diagonal()
    dead = (x <= 0).all(1) if relu else variances <= 1e-12 * variances.mean()
    trace = covariance.trace()
    return {
        "channels": len(y),
        "values": y.numel(),
        "positive": float((x > 0).double().mean()),
        "dead": tuple(dead.nonzero().flatten().tolist()),
        "mean": float(y.mean()),
        "variance": float(y.var(correction=0)),
        "sparsity": float((y == 0).double().mean()),
        "rank": float(trace**2 / (covariance @ covariance).trace()) if trace else 0.0,
        "gradient": math.nan if gradient is None else float(gradient.double().flatten(1).norm(dim=1).mean()),
    }


def assert_stats(found: nmconv.SiteStats, wanted: dict[str, Any], rel: float = 1e-9) -> None:
    for name, value in wanted.items():
        got = getattr(found, name)
        if name in _NUMBERS:
            assert got == pytest.approx(value, rel=rel, abs=1e-15, nan_ok=True), (found.site, name)
        else:
            assert got == value, (found.site, name)


def assert_alike(one: nmconv.ActivationStats, other: nmconv.ActivationStats, rel: float = 1e-9) -> None:
    assert [site.site for site in one.sites] == [site.site for site in other.sites]
    for left, right in zip(one.sites, other.sites, strict=True):
        assert_stats(left, dataclasses.asdict(right), rel)


WAYS = "module inplace shared prelu function function_ keyword silu mul_ hardswish part normact normact_ gelu residual"


class Drawn(nn.Module):
    """A net of convolutions, each with an activation called in some way; it notes what each is given and gives."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.ways = [draw.choice(WAYS.split()) for _ in range(draw.randint(3, 7))]
        widths = [3, *(draw.choice((1, 2, 4, 5)) for _ in self.ways)]
        pairs = itertools.pairwise(widths)
        self.convs = nn.ModuleList(nn.Conv2d(one, two, 3, padding=1) for one, two in pairs)
        self.acts = nn.ModuleList(self._act(way, width) for way, width in zip(self.ways, widths[1:], strict=True))
        self.shared = nn.ReLU(draw.random() < 0.5)
        self.log: list[tuple[str, bool, Tensor, Tensor]] | None = None
        self.double().eval()
        generator = torch.Generator().manual_seed(seed)
        for value in (*self.parameters(), *self.buffers()):
            if value.is_floating_point():
                value.data.copy_(0.5 * torch.randn(value.shape, dtype=value.dtype, generator=generator))
                if value.dim() == 1:
                    value.data.abs_()
        for one in self.convs:  # some dead channels
            if one.out_channels > 1:
                one.bias.data[0] = draw.choice((0.0, -100.0))

    @staticmethod
    def _act(way: str, width: int) -> nn.Module:
        if way.startswith("normact"):
            return timm.layers.BatchNormAct2d(width, act_layer=nn.ReLU, inplace=way.endswith("_"))
        kinds = {"module": nn.ReLU6(), "inplace": nn.SiLU(True), "prelu": nn.PReLU(width), "part": nn.Sigmoid()}
        return kinds.get(way, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        counts: Counter[str] = Counter()
        for at, way in enumerate(self.ways):
            x = self.convs[at](x)
            act: Any = self.acts[at]
            name, relu = f"acts.{at}", way in ("module", "shared", "function", "function_", "keyword", "residual")
            if way.startswith("normact"):
                name, relu = f"acts.{at}.act", True
                before = None if self.log is None else F.batch_norm(
                    x, act.running_mean, act.running_var, act.weight, act.bias, False, 0.0, act.eps
                )  # fmt: skip
            else:
                before = None if self.log is None else x.clone()
            if way in ("module", "inplace", "prelu", "normact", "normact_"):
                y = act(x)
            elif way == "shared":
                name, y = "shared", self.shared(x)
            elif way in ("function", "residual"):
                name, y = ":relu", F.relu(x)
            elif way == "function_":
                name, y = ":relu", torch.relu_(x)
            elif way == "keyword":
                name, y = ":relu", F.relu(input=x, inplace=True)
            elif way == "silu":
                name, y = ":silu", x * torch.sigmoid(x)
            elif way == "mul_":
                name, y = ":silu", x.mul_(x.sigmoid())
            elif way == "hardswish":
                name, y = ":hardswish", x * F.relu6(x + 3) / 6
            elif way == "part":
                name, y = ":silu", x * act(x)
            else:
                name, y = ":gelu", F.gelu(x)
            counts[name] += 1
            if self.log is not None:
                if y.requires_grad:
                    y.retain_grad()
                caller = "@" if name == f"acts.{at}" else ""  # not the one that holds it
                self.log.append((f"{name}#{counts[name]}{caller}", relu, before, y if y.requires_grad else y.clone()))
            x = y + x if way == "residual" else y
        return x.mean((2, 3))


def loss_of(output: Tensor) -> Tensor:
    return output.square().sum(1)


def same_in_batches(model: nn.Module, images: Tensor, **options: Any) -> nmconv.ActivationStats:
    whole = nmconv.activation_stats(model, images, **options)
    assert_alike(nmconv.activation_stats(model, images.split([1, 7, 2]), **options), whole)
    return whole


@pytest.mark.parametrize("seed", range(24))
def test_naive(seed: int) -> None:
    model = Drawn(seed)
    found = same_in_batches(model, X, loss=loss_of)
    twin = copy.deepcopy(model)
    twin.log = []
    twin(X.clone())
    values = {site: (relu, given, made) for site, relu, given, made in twin.log}
    assert [site.site for site in found.sites] == list(values)
    assert found.images == 10
    for site in found.sites:
        relu, given, made = values[site.site]
        wanted = naive(given, made.detach(), relu)
        del wanted["gradient"]
        assert_stats(site, wanted)
        assert all(not math.isnan(value) for value in wanted.values() if isinstance(value, float))


@pytest.mark.parametrize("seed", range(8))
def test_naive_gradients(seed: int) -> None:
    model = Drawn(seed)
    model.ways = ["module" if way in ("shared",) else way for way in model.ways]
    found = nmconv.activation_stats(model, X, loss=loss_of)
    twin = copy.deepcopy(model)
    total: Counter[str] = Counter()
    for image in X.unsqueeze(1):  # an image's own loss
        twin.log = []
        loss_of(twin(image.clone().requires_grad_().clone())).sum().backward()
        total.update({site: 0.0 if made.grad is None else float(made.grad.norm()) for site, _, _, made in twin.log})
    assert found.sites
    for site in found.sites:
        assert site.gradient == pytest.approx(total[site.site] / len(X), rel=1e-9, abs=1e-15), site.site


# -- known answers ---------------------------------------------------------------------------------------------------


def by_hand(act: nn.Module, channels: int = 2) -> nn.Sequential:
    """A convolution that passes on what it is given, and an activation."""
    first = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(first.weight)
    return nn.Sequential(first, act)


def test_known_answers() -> None:
    plane = torch.tensor([[1.0, -1.0, 3.0, -3.0], [-1.0, -2.0, -3.0, 0.0]]).reshape(1, 2, 2, 2)
    (found,) = nmconv.activation_stats(by_hand(nn.ReLU()), plane).sites
    assert math.isnan(found.gradient)
    wanted = nmconv.SiteStats("1#1", "ReLU", 2, 8, 0.25, (1,), 0.5, 1.0, 0.75, 1.0, 0.0)
    assert dataclasses.replace(found, gradient=0.0) == wanted
    independent = torch.tensor([[1.0, 1.0, 2.0, 2.0], [1.0, 2.0, 1.0, 2.0]]).reshape(1, 2, 2, 2)
    (found,) = nmconv.activation_stats(by_hand(nn.ReLU()), independent).sites
    assert (found.rank, found.positive, found.dead, found.mean, found.variance) == (2.0, 1.0, (), 1.5, 0.25)
    (found,) = nmconv.activation_stats(by_hand(nn.ReLU()), -independent).sites  # all dead
    assert dataclasses.asdict(found) | {"gradient": 0.0} == {
        "site": "1#1", "kind": "ReLU", "channels": 2, "values": 8, "positive": 0.0, "dead": (0, 1), "mean": 0.0,
        "variance": 0.0, "sparsity": 1.0, "rank": 0.0, "gradient": 0.0,
    }  # fmt: skip


def test_dead_channels_of_other_kinds() -> None:
    images = torch.randn(4, 3, 5, 5)
    images[:, 1] = 0.7
    (found,) = nmconv.activation_stats(by_hand(nn.SiLU(), 3), images).sites
    assert (found.kind, found.dead) == ("SiLU", (1,))
    images[:, 1] = -5 - torch.rand(4, 5, 5)
    (found,) = nmconv.activation_stats(by_hand(nn.LeakyReLU(), 3), images).sites
    assert found.dead == ()
    (found,) = nmconv.activation_stats(by_hand(nn.ReLU6(), 3), images).sites
    assert found.dead == (1,)
    (found,) = nmconv.activation_stats(by_hand(nn.GELU(), 3), torch.ones(4, 3, 5, 5)).sites
    assert (found.dead, found.rank, found.variance) == ((0, 1, 2), 0.0, 0.0)


def test_gradients_known() -> None:
    images = torch.rand(6, 2, 3, 4).double()
    one = nmconv.activation_stats(by_hand(nn.ReLU()).double(), images, loss=lambda y: y.flatten(1).sum(1))
    assert one["1#1"].gradient == pytest.approx(math.sqrt(24), rel=1e-12)
    mean = nmconv.activation_stats(
        by_hand(nn.ReLU()).double(), images.split(2), loss=lambda y: y.flatten(1).sum(1).mean()
    )
    assert mean["1#1"].gradient == pytest.approx(math.sqrt(24), rel=1e-12)
    assert math.isnan(nmconv.activation_stats(by_hand(nn.ReLU()), images)["1#1"].gradient)


def test_gradient_before_an_inplace_operation_on_the_output() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.a(x), 1.0)
        y *= 3.0
        return y

    first = conv(2, 2, 1)
    model = net(forward, a=first).eval()
    found = nmconv.activation_stats(model, torch.rand(3, 2, 4, 4), loss=lambda y: y.flatten(1).sum(1))
    assert found[":leaky_relu#1"].gradient == pytest.approx(3 * math.sqrt(32), rel=1e-6)


def test_labels() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).double()
    labels = torch.arange(10) % 5
    by_function = nmconv.activation_stats(model, [(X, labels)], loss=F.cross_entropy)
    parts = list(zip(X.split(4), labels.split(4), strict=True))
    assert_alike(nmconv.activation_stats(model, parts, loss=nn.CrossEntropyLoss()), by_function)
    assert by_function["1#1"].gradient > 0
    dicts = [{"pixels": x, "y": y} for x, y in parts]
    by_dict = nmconv.activation_stats(
        model, dicts, key="pixels", loss=lambda output, batch: F.cross_entropy(output, batch["y"])
    )
    assert_alike(by_dict, by_function)
    data = torch.utils.data.TensorDataset(X, labels)
    assert_alike(nmconv.activation_stats(model, data, loss=F.cross_entropy), by_function)
    loader = torch.utils.data.DataLoader(data, 3, shuffle=True)
    assert_alike(nmconv.activation_stats(model, loader, loss=F.cross_entropy), by_function)


def test_channels_last_of_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), nn.Flatten(2), Turned(), nn.Linear(6, 5), nn.GELU()).double()
    (found,) = nmconv.activation_stats(model, X).sites
    with torch.no_grad():
        given = model[:4](X)
    assert_stats(found, naive(given.transpose(1, 2), F.gelu(given).transpose(1, 2), False))


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_a_block_called_twice() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.block(self.block(x))

    model = net(forward, block=nn.Sequential(conv(3, 3), nn.ReLU())).double().eval()
    (found,) = same_in_batches(model, X).sites
    with torch.no_grad():
        one = model.block[0](X)
        two = model.block[0](F.relu(one))
    both = torch.cat([one, two])
    assert_stats(found, naive(both, F.relu(both), True))


def test_other_channels_each_time() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    model = nn.Sequential(conv(3, 4), inner := Inner(), conv(4, 5), inner)
    with pytest.raises(nmconv.FitError, match=r"1\.act#1 is called with 5 channels, after a call with 4"):
        nmconv.activation_stats(model, torch.randn(2, 3, 8, 8))
    assert_no_hooks(model)


# -- the zoo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv3_small_050",
        "resnetv2_50",
        "convnext_atto",
        "ghostnet_050",
        "inception_v3",
        "vgg11",
        "nf_regnet_b0",
        "levit_128s",
    ],  # with maps of zeros
)
def test_calls_as_the_oracle_sees_them(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    size = 224 if name.startswith("levit") else 96
    images = torch.randn(2, 3, size, size)
    found = nmconv.activation_stats(model, images)
    sites = {site.id: site for site in nmconv.make_plan(model, example_inputs=images).sites}
    with oracle.record(model) as entries, torch.no_grad():
        model(images)
    wanted = {(entry.owner, entry.name or entry.kind, entry.call) for entry in entries}
    known = [sites[one.site] for one in found.sites]
    assert {(site.owner, site.function or site.name, site.call) for site in known} == wanted
    for one in found.sites:
        assert all(math.isfinite(getattr(one, name)) for name in _NUMBERS[:-1]), one
        assert one.kind != "ReLU" or one.positive == pytest.approx(1 - one.sparsity, rel=1e-12), one
        assert 0 <= one.rank <= one.channels * (1 + 1e-9)


def test_converted() -> None:
    model = timm.create_model("resnet18", num_classes=3).eval().double()
    images = torch.randn(3, 3, 64, 64).double()
    converted = nmconv.convert(model, "2:1")
    plan = nmconv.get_plan(converted)
    assert plan is not None
    stays = [site for site in plan.sites if site.action != "drop"]
    found = nmconv.activation_stats(converted, images)
    assert {one.site for one in found.sites} == {site.id for site in stays}
    dropped = [site for site in plan.sites if site.action == "drop"]
    side = found.rows(beside=nmconv.activation_stats(model, images))
    assert len(side) == 17 and sum(math.isnan(row["rank_a"]) for row in side) == len(dropped) == 8
    assert [row["site"] for row in side] == [site.id for site in plan.sites]
    assert side[0]["rank_a"] == pytest.approx(side[0]["rank_b"], rel=1e-9)


def test_merged() -> None:
    sizes = ((3, 1), (3, 3), (4, 1), (8, 3), (8, 1))
    pairs = [(conv(one, two[0], two[1]), nn.ReLU()) for one, two in zip((3, 3, 3, 4, 8), sizes, strict=True)]
    model = nn.Sequential(*(part for pair in pairs for part in pair)).double().eval()
    converted = nmconv.convert(model, "3:1", hoist_padding=True)
    merged = nmconv.merge(converted)
    assert nmconv.get_merges(merged)
    found = nmconv.activation_stats(merged, X)
    assert_alike(found, nmconv.activation_stats(converted, X), 1e-6)
    assert 0 < len(found.sites) < 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype: torch.dtype) -> None:
    model = nn.Sequential(conv(3, 4), nn.ReLU(True), conv(4, 4), nn.SiLU()).to(dtype)
    images = torch.randn(5, 3, 8, 8)
    found = nmconv.activation_stats(model, images.split(2), loss=loss_of_maps)
    with torch.no_grad():
        given = torch.cat([model[0](part) for part in images.to(dtype).split(2)])
    assert_stats(found["1#1"], naive(given, F.relu(given), True) | {"gradient": found["1#1"].gradient})
    assert found["1#1"].gradient > 0
    single = nmconv.activation_stats(nn.Sequential(conv(3, 4), nn.ReLU()), images.to(dtype))
    assert single.sites[0].channels == 4  # the model's dtype is what counts


def loss_of_maps(output: Tensor) -> Tensor:
    return output.float().square().mean()


# -- nothing else changes --------------------------------------------------------------------------------------------


def assert_no_hooks(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            assert "hooks" not in name or not value, (module, name)


class Counting(nn.Module):
    """Counts its calls in a buffer, in a new one, and draws at random, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("other", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.other = self.other + 1
        return x + 0.1 * torch.rand_like(x)


def touched() -> nn.Sequential:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), Counting(), nn.Dropout(), conv(4, 2), nn.ReLU())
    model[5].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].eval()
    return model


def look_of(model: nn.Module) -> Any:
    state = {name: (id(value), value.tolist()) for name, value in model.state_dict(keep_vars=True).items()}
    grads = [(value.requires_grad, value.grad is None, id(value.grad)) for value in model.parameters()]
    keys = [sorted(vars(module)) for module in model.modules()]
    return state, grads, keys, [module.training for module in model.modules()], torch.get_rng_state().tolist()


OTHER = conv(3, 2)
LOADER = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(6, 3, 8, 8)), 2, shuffle=True)
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "stats": lambda model: nmconv.activation_stats(model, LOADER),
    "loss": lambda model: nmconv.activation_stats(model, LOADER, loss=loss_of_maps),
    "cka": lambda model: nmconv.cka(model, model, LOADER),
    "modules": lambda model: nmconv.cka(model, OTHER, LOADER, (["3"], [""])),
}
WRONG: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "empty": (lambda model: nmconv.activation_stats(model, []), nmconv.OptionError, "no images"),
    "no rows": (lambda model: nmconv.activation_stats(model, torch.zeros(0, 3, 8, 8)), nmconv.OptionError, "no images"),
    "data": (lambda model: nmconv.activation_stats(model, "images"), nmconv.OptionError, "data='images'"),
    "key": (
        lambda model: nmconv.activation_stats(model, [{"x": torch.zeros(2, 3, 8, 8)}]),
        nmconv.OptionError, "batches are dicts with 'x'",
    ),
    "no y": (
        lambda model: nmconv.activation_stats(model, torch.zeros(2, 3, 8, 8), loss=F.cross_entropy),
        nmconv.OptionError, "data has no y",
    ),
    "loss": (
        lambda model: nmconv.activation_stats(model, torch.zeros(2, 3, 8, 8), loss="mse"),
        nmconv.OptionError, "loss='mse'",
    ),
    "number": (
        lambda model: nmconv.activation_stats(model, torch.zeros(2, 3, 8, 8), loss=lambda y: 1.0),
        nmconv.FitError, "loss gives float",
    ),
    "detached": (
        lambda model: nmconv.activation_stats(model, torch.zeros(2, 3, 8, 8), loss=lambda y: y.detach().mean()),
        nmconv.FitError, "a tensor without gradient",
    ),
    "second batch": (
        lambda model: nmconv.activation_stats(model, [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8)]),
        nmconv.FitError, "does not accept images of shape",
    ),
    "channels": (
        lambda model: nmconv.activation_stats(model, torch.zeros(2, 4, 8, 8)), nmconv.OptionError, "cannot be called",
    ),
    "few": (lambda model: nmconv.cka(model, model, torch.zeros(3, 3, 8, 8)), nmconv.OptionError, "data holds 3 images"),
    "layer": (
        lambda model: nmconv.cka(model, model, torch.zeros(4, 3, 8, 8), ["relu"]),
        nmconv.OptionError, "layer 'relu' is not a module or activation of this Sequential",
    ),
    "layers": (lambda model: nmconv.cka(model, model, torch.zeros(4, 3, 8, 8), "0"), nmconv.OptionError, "layers='0'"),
    "none": (lambda model: nmconv.cka(model, model, torch.zeros(4, 3, 8, 8), []), nmconv.OptionError, r"layers=\[\]"),
    "every": (lambda model: nmconv.ActivationRecorder(model, every=0), nmconv.OptionError, "every=0"),
    "true": (lambda model: nmconv.ActivationRecorder(model, every=True), nmconv.OptionError, "every=True"),
    "step": (lambda model: nmconv.ActivationRecorder(model).step(), nmconv.OptionError, "outside of the with"),
    "inputs": (
        lambda model: nmconv.ActivationRecorder(model, example_inputs=torch.zeros(2, 5, 8, 8)),
        nmconv.OptionError, "cannot be called",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_untouched(call: str) -> None:
    model = touched()
    before = look_of(model)
    CALLS[call](model)
    assert look_of(model) == before
    assert_no_hooks(model)


@pytest.mark.parametrize("call", WRONG)
def test_wrong(call: str) -> None:
    model = touched()
    before = look_of(model)
    do, kind, text = WRONG[call]
    with pytest.raises(kind, match=text) as raised:
        do(model)
    assert type(raised.value) is kind
    assert look_of(model) == before
    assert_no_hooks(model)


def test_refused() -> None:
    model = nn.Sequential(conv(3, 4), nn.ReLU())
    images = torch.randn(4, 3, 8, 8)
    for other, text in not_plain(model, images):
        for call in (
            lambda it: nmconv.activation_stats(it, images),
            nmconv.ActivationRecorder,
            lambda it: nmconv.cka(model, it, images),
        ):
            with pytest.raises(nmconv.ModelTypeError, match=text):
                call(other)
    with pytest.raises(nmconv.NoSitesError, match="calls no activation"):
        nmconv.activation_stats(nn.Sequential(conv(3, 4)), images)
    with pytest.raises(nmconv.NoSitesError, match="belongs to a convolution"):
        nmconv.cka(nn.Sequential(conv(3, 4)), model, images)


def test_without_gradients_and_in_inference_mode() -> None:
    model = nn.Sequential(conv(3, 4), nn.ReLU())
    images = torch.randn(4, 3, 8, 8)
    wanted = nmconv.activation_stats(model, images, loss=loss_of_maps)
    with torch.no_grad():
        assert_alike(nmconv.activation_stats(model, images, loss=loss_of_maps), wanted)
    with torch.inference_mode():
        assert_alike(nmconv.activation_stats(model, images, loss=loss_of_maps), wanted)
    with torch.autocast("cpu"):
        assert_alike(nmconv.activation_stats(model, images, loss=loss_of_maps), wanted, 0.1)


# -- while a model trains --------------------------------------------------------------------------------------------


def trained(model: nn.Module, recorder: Any, steps: int = 5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for at in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X.roll(at, 0)), torch.arange(10) % 5).backward()
        optimizer.step()
        if recorder is not None:
            recorder.step()


def test_recorder() -> None:
    model, plain = small(), small()
    trained(plain, None)
    with nmconv.ActivationRecorder(model, every=2, example_inputs=X) as recorder:
        trained(model, recorder)
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert_no_hooks(model)
    assert list(recorder.stats) == [0, 2, 4]
    assert {stats.images for stats in recorder.stats.values()} == {10}
    first = small()
    given = first[1](first[0](X))  # in train mode
    assert_stats(recorder.stats[0]["2#1"], naive(given.detach(), F.relu(given).detach(), True))
    assert recorder.stats[0]["2#1"].mean != recorder.stats[2]["2#1"].mean
    rows = recorder.rows()
    assert [(row["step"], row["site"]) for row in rows] == [(at, site) for at in (0, 2, 4) for site in ("2#1", "5#1")]


def test_recorder_sums_the_forwards_of_a_step_and_skips_validation() -> None:
    model = small().eval()
    with nmconv.ActivationRecorder(model, example_inputs=X) as recorder:
        model(X[:3])
        model(X[3:])
        with torch.no_grad():
            model(100 * X)
        recorder.step()
        recorder.step()  # nothing has run
    assert list(recorder.stats) == [0]
    assert_alike(recorder.stats[0], nmconv.activation_stats(model, X))


def test_recorder_comes_off() -> None:
    class Failing(nn.Module):
        fails: type[BaseException] | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.fails is not None:
                raise self.fails("so")
            return x

    for kind in (RuntimeError, KeyboardInterrupt):
        failing = Failing()
        model = nn.Sequential(conv(3, 4), nn.ReLU(), failing, conv(4, 4), nn.ReLU())
        images = torch.randn(2, 3, 8, 8)
        recorder = nmconv.ActivationRecorder(model, example_inputs=images)
        depth = torch._C._len_torch_function_stack()
        with pytest.raises(kind, match="so"), recorder:
            model(images)
            recorder.step()
            failing.fails = kind
            model(images)
        assert torch._C._len_torch_function_stack() == depth
        assert_no_hooks(model)
        failing.fails = None
        with pytest.raises(nmconv.OptionError, match="already entered"), recorder, recorder:
            pass
        with recorder:  # goes on
            model(images)
            recorder.step()
        assert list(recorder.stats) == [0, 1]
        assert_no_hooks(model)
        assert recorder.stats[1].images == 2


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recorder_with_checkpointing(reentrant: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=reentrant) if self.saves else self.block(x)

    model = net(forward, block=small()[:6], saves=True)
    plain = copy.deepcopy(model)
    plain.saves = False
    found = []
    for each in (model, plain):
        with nmconv.ActivationRecorder(each, example_inputs=X) as recorder:
            each(X.clone().requires_grad_()).mean().backward()
            recorder.step()
        found.append(recorder.stats[0])
    assert_alike(*found)


def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    whole, most = (nmconv.activation_stats(small(), images) for images in (X, X[3:]))
    for rank in (0, 1):
        assert_alike(nmconv.ActivationStats.load(tmp_path / f"{rank}_0.json"), whole)
        assert_alike(nmconv.ActivationStats.load(tmp_path / f"{rank}_2.json"), most)
    assert nmconv.ActivationStats.load(tmp_path / "1_0.json").images == 10


# -- CKA -------------------------------------------------------------------------------------------------------------


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """Equation 3 of arXiv 2010.15327, as it stands there."""
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    one = torch.ones(n, dtype=k.dtype)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return ((k @ m).trace() + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def naive_cka(x: Tensor, y: Tensor) -> float:
    k, m = x @ x.T, y @ y.T
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


@pytest.mark.parametrize("count", [4, 5, 10])
@pytest.mark.parametrize("rows", [1, 3, 2**20])
def test_cka_naive(count: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmconv.analysis.hsic._MAX_VALUES", rows * count * 5)
    one, two = small().eval(), small().eval()
    for value in two.parameters():
        value.data += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    layers = (["0", "2#1", "8"], ["3", "5#1"])
    found = nmconv.cka(one, two, X[:count].split([1, count - 1]), layers)
    assert (found.layers_a, found.layers_b, found.n) == (("0", "2#1", "8"), ("3", "5#1"), count)
    with torch.no_grad():
        x = [part(X[:count]) for part in (one[:1], one[:3], one)]
        y = [part(X[:count]) for part in (two[:4], two[:6])]
    for at, left in enumerate(x):
        for other, right in enumerate(y):
            means = [value.flatten(2).mean(2) if value.dim() > 2 else value for value in (left, right)]
            means = [value - value.mean(0) for value in means]  # else the naive sums lose digits
            assert float(found.matrix[at, other]) == pytest.approx(naive_cka(*means), rel=1e-9)


def test_cka_default_and_itself() -> None:
    model = timm.create_model("resnet18", num_classes=3).eval().double()
    images = torch.randn(12, 3, 64, 64).double()
    converted = nmconv.convert(model, "2:1")
    found = nmconv.cka(model, converted, images)
    plan = nmconv.get_plan(converted)
    assert plan is not None
    real = [site for site in plan.sites if site.is_real]
    assert found.layers_a == tuple(site.id for site in real)
    assert found.layers_b == tuple(site.id for site in real if site.action != "drop")
    assert float(found.matrix[0, 0]) == pytest.approx(1.0, rel=1e-9)
    assert float(found.matrix[0].min()) < 0.9999
    itself = nmconv.cka(model, model, images, ["layer1", "layer2.0", "layer4"]).matrix
    assert torch.allclose(itself.diagonal(), torch.ones(3).double(), rtol=1e-9)
    assert torch.allclose(itself, itself.T, rtol=1e-9)


def test_cka_is_debiased_and_sees_no_rotation() -> None:
    from nmconv.analysis.hsic import debiased_cka

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 50, 200, dtype=torch.float64, generator=generator)).unbind(0)
    turn = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64, generator=generator))[0]
    assert float(debiased_cka([x], [3 * x @ turn + 7])) == pytest.approx(1.0, rel=1e-9)
    assert abs(float(debiased_cka([x], [y]))) < 0.1
    x, y = x - x.mean(0), y - y.mean(0)
    assert float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())) > 0.7  # the biased one
    assert math.isnan(float(debiased_cka([x], [torch.ones(50, 3).double()])))


def test_cka_layers_that_give_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        pair, whole = self.pair(x), self.whole(x)
        return pair[0] + self.act(whole.sum(0, keepdim=True))

    pair = net(lambda self, x: (x, x))
    model = net(forward, pair=pair, whole=net(lambda self, x: x[:1]), act=nn.ReLU(), idle=conv(3, 3))
    images = torch.randn(5, 3, 4, 4)
    for name, text in (
        ("pair", "'pair' returns a tuple"),
        ("whole", "'whole' gives 1 rows for 5 images"),
        ("idle", "'idle' does not run"),
    ):
        with pytest.raises(nmconv.FitError, match=text):
            nmconv.cka(model, model, images, [name])
        assert_no_hooks(model)


# -- tables ----------------------------------------------------------------------------------------------------------


def test_tables(tmp_path: Path) -> None:
    model = small()
    stats = nmconv.activation_stats(model, X)
    stats.save(tmp_path / "stats.json")
    again = nmconv.ActivationStats.load(tmp_path / "stats.json")
    assert str(again) == str(stats) and again.images == 10 and again["2#1"].dead == stats["2#1"].dead
    rows = again.rows()
    assert [row["site"] for row in rows] == ["2#1", "5#1"]
    assert rows[0].keys() == {"model", *NAMES} and rows[0]["dead"] == len(stats["2#1"].dead)
    with pytest.raises(KeyError, match="did you mean 2#1"):
        stats["2"]
    found = nmconv.cka(model, model, X)
    found.save(tmp_path / "cka.json")
    loaded = nmconv.CKA.load(tmp_path / "cka.json")
    assert torch.equal(loaded.matrix, found.matrix) and loaded.rows() == found.rows() and len(found.rows()) == 4
    for load, name in ((nmconv.ActivationStats.load, "cka.json"), (nmconv.CKA.load, "stats.json")):
        with pytest.raises(nmconv.FileError, match="is not a table of nmconv"):
            load(tmp_path / name)
    (tmp_path / "cka.json").write_text("{")
    with pytest.raises(nmconv.FileError, match=r"is not a table of nmconv\.cka"):
        nmconv.CKA.load(tmp_path / "cka.json")
    text = (tmp_path / "stats.json").read_text()
    for old, new, said in (('_stats": 1', '_stats": 99', "of version 99"), ('"rank"', '"rang"', "is not a table")):
        assert old in text
        (tmp_path / "stats.json").write_text(text.replace(old, new))
        with pytest.raises(nmconv.FileError, match=said):
            nmconv.ActivationStats.load(tmp_path / "stats.json")


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    model = small()
    one = nmconv.activation_stats(model, X)
    two = nmconv.activation_stats(nmconv.convert(model, "2:1", keep="first", example_inputs=X), X)
    one.plot(tmp_path / "stats.png", beside=two)
    axes = figure.Figure().subplots()
    assert one.plot(axes, column="dead") is axes and len(axes.lines) == 1
    assert one.plot(column="sparsity", beside=two).get_legend() is not None
    nmconv.cka(model, model, X).plot(tmp_path / "cka.png")
    assert (tmp_path / "stats.png").stat().st_size > 1000 and (tmp_path / "cka.png").stat().st_size > 1000
    with pytest.raises(nmconv.OptionError, match="column='width'"):
        one.plot(column="width")
    with pytest.raises(nmconv.OptionError, match="where=3"):
        one.plot(3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(nmconv.OptionError, match="needs matplotlib"):
        one.plot()
