"""From one plan to another, and back: structure as if the original had been converted anew, weights as they are."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from zoo import models as zoo

import nmconv

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """An activation module, a repeated one, a functional one, one in place, a PReLU, and a sum."""

    def __init__(self, width=4):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Conv2d(width, width, 3, padding=1) for _ in range(6))
        self.norm, self.act, self.twice = nn.BatchNorm2d(width), nn.GELU(), nn.ReLU(inplace=True)
        self.prelu = nn.PReLU(width)
        self.scale = 1.0

    def forward(self, x):
        y = self.act(self.norm(self.a(x)))
        y = self.twice(self.b(y))
        y = self.twice(self.c(y))
        y = F.relu(self.d(y))
        y = self.prelu(self.e(y))
        return self.f(y) * self.scale + x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), Block(), Block()
        self.tail = nn.Sequential(nn.Conv2d(4, 8, 3), timm.layers.BatchNormAct2d(8), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.tail(self.two(self.one(self.stem(x)))).mean((2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16))
    return model.eval()


def structure(model):
    return [
        (name, type(part), str(part), sorted(key for key in vars(part) if key.startswith("_nmconv")))
        for name, part in model.named_modules()
    ]


def equal(one, other, x=X):
    """Outputs, gradients and buffers, in both modes, to the bit."""
    for training in (False, True):
        made = []
        for model in (copy.deepcopy(one), copy.deepcopy(other)):
            torch.manual_seed(0)
            output = model.train(training)(x)
            output.square().sum().backward()
            made.append([output, *(value.grad for value in model.parameters()), *model.buffers()])
        for mine, its in zip(*made, strict=True):
            assert (mine is None) == (its is None)
            assert mine is None or torch.equal(mine, its)


def trained(model):
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    return model


PLANS = {
    "half": {"ratio": "2:1"},
    "most": {"ratio": "6:1"},
    "first": {"ratio": "3:1", "keep": "first"},
    "moved": {"ratio": "3:1", "keep": "first", "relocate": True},
    "hoisted": {"ratio": "3:1", "hoist_padding": True},
    "parts": {"ratio": {"one": "3:1", "*": None}},
}
quiet = pytest.mark.filterwarnings("ignore::nmconv.RestoredParametersWarning")


@quiet
@pytest.mark.parametrize(("name", "inplace"), [(name, at % 2 == 1) for at, name in enumerate(PLANS)])
def test_restored_it_is_the_original_with_these_weights(name, inplace):
    model = net()
    before, modules = structure(model), dict(model.named_modules())
    original = trained(copy.deepcopy(model))
    converted = nmconv.convert(model, **PLANS[name], example_inputs=X, inplace=inplace)
    found = nmconv.restore(trained(converted), inplace=inplace)
    assert structure(found) == before
    equal(found, original)
    assert nmconv.get_plan(found) is None
    if inplace:
        assert found is model
        assert dict(model.named_modules()) == modules  # the very objects


NAMES = list(PLANS)
PAIRS = [(NAMES[at], NAMES[(at + step) % len(NAMES)], step == 1) for at in range(len(NAMES)) for step in (1, 2)]


@quiet
@pytest.mark.parametrize(("one", "two", "inplace"), PAIRS)
def test_from_one_plan_to_another(one, two, inplace):
    model = net()
    fresh = trained(copy.deepcopy(model))
    plan = nmconv.make_plan(model, **PLANS[two], example_inputs=X)
    converted = trained(nmconv.convert(model, **PLANS[one], example_inputs=X))
    assert nmconv.make_plan(converted, **PLANS[two]) == plan
    parameters = dict(converted.named_parameters())
    found = nmconv.apply_plan(converted, plan, inplace=inplace)
    assert nmconv.get_plan(found) == plan
    expected = nmconv.apply_plan(fresh, plan)
    assert structure(found) == structure(expected)
    equal(found, expected)
    if inplace:
        assert all(value is parameters[name] for name, value in found.named_parameters())


@quiet
def test_a_plan_that_drops_nothing_gives_everything_back():
    model = net()
    converted = nmconv.convert(model, "3:1", example_inputs=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", nmconv.NoEffectWarning)
        found = nmconv.apply_plan(converted, nmconv.make_plan(converted, "1:1"))
    equal(found, model)


@quiet
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "half", "to", "train", "head", "load"])
def test_what_happened_meanwhile_stays(way, tmp_path):
    model, x = net(), X
    converted = nmconv.convert(model, "3:1", keep="first", relocate=True, example_inputs=X)
    if way == "deepcopy":
        converted = copy.deepcopy(converted)
    elif way == "pickle":
        converted = pickle.loads(pickle.dumps(converted))
    elif way == "half":
        model, converted, x = model.half(), converted.half(), X.half()
    elif way == "to":
        model, converted, x = model.to(torch.float64), converted.to(torch.float64), X.double()
    elif way == "train":
        model.train(), converted.train()
        model.one.norm.eval(), converted.one.norm.eval()
    elif way == "head":
        torch.manual_seed(1)
        model.head = converted.head = nn.Linear(8, 2)
        model.one.scale = converted.one.scale = 0.5
    else:
        nmconv.save(converted, tmp_path / "model")
        converted = nmconv.load(net(1), tmp_path / "model")
    modes = {name: part.training for name, part in model.named_modules()}
    found = nmconv.restore(converted)
    assert {name: part.training for name, part in found.named_modules()} == modes
    equal(found, model, x)


@quiet
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "resnetv2_50"])
def test_networks_of_timm(name):
    model = zoo.build(f"timm/{name}", "cpu").eval()
    x, before = torch.rand(2, 3, 64, 64), structure(model)
    with torch.no_grad():
        expected = model(x)
        converted = nmconv.convert(model, "3:1", keep="first", relocate=True, hoist_padding=True)
        found = nmconv.restore(converted)
        assert structure(found) == before and torch.equal(found(x), expected)
        plan = nmconv.make_plan(model, "2:1")
        assert nmconv.make_plan(converted, "2:1") == plan
        assert torch.equal(nmconv.apply_plan(converted, plan)(x), nmconv.apply_plan(model, plan)(x))


def test_hooks_stay_on_what_comes_back():
    model, seen = net(), []
    act, plain = model.one.act, model.two.act
    handle = act.register_forward_hook(lambda *_: seen.append(1))
    converted = nmconv.convert(model, "6:1", example_inputs=X, inplace=True, keep="boundary")
    assert converted.one.act is act  # it has a hook, and stays, doing nothing
    assert converted.two.act is not plain
    nmconv.restore(converted, inplace=True)
    assert model.one.act is act and model.two.act is plain
    seen.clear()
    model(X)
    assert seen == [1]
    handle.remove()
    model(X)
    assert seen == [1]


def test_drop_train_drop_more():
    """The loop of iterative removal: one site at a time, an optimizer that goes on."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plan = nmconv.make_plan(model, "1:1", example_inputs=X)
    for site in [site for site in plan.sites if site.kind == "ReLU" and not site.locked][:3]:
        plan = plan.edit({site: "drop"})
        nmconv.apply_plan(model, plan, inplace=True)
        before = model.one.a.weight.detach().clone()
        optimizer.zero_grad()
        model.train()(X).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model.one.a.weight, before)
    assert nmconv.get_plan(model).counts.activations_after == plan.counts.activations_before - 3
    expected = copy.deepcopy(model)
    equal(nmconv.apply_plan(nmconv.restore(expected), plan), model)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_restored():
    with pytest.raises(nmconv.PlanError, match="not converted"):
        nmconv.restore(net())
    converted = nmconv.convert(net(), "6:1", example_inputs=X, keep="boundary")
    merged = nmconv.merge(converted, gate="always")
    for call in (nmconv.restore, lambda model: nmconv.apply_plan(model, nmconv.get_plan(converted)), nmconv.make_plan):
        with pytest.raises(nmconv.MergeError, match="merged, and what went into"):
            call(merged)
    whole = nn.Sequential(converted, nn.Identity())
    with pytest.raises(nmconv.AlreadyConvertedError, match="'0' in the model was converted by itself"):
        nmconv.make_plan(whole, example_inputs=X, keep="boundary")
    with pytest.raises(nmconv.AlreadyConvertedError, match=r"apply_plan.*nmconv\.restore"):
        nmconv.convert(converted, "2:1", keep="boundary")
    with pytest.raises(nmconv.PlanError, match="fingerprint"):
        nmconv.apply_plan(converted, nmconv.make_plan(timm.create_model("resnet18"), keep="boundary"))


@quiet
def test_after_a_fit():
    model = net()
    plan = nmconv.make_plan(model, "3:1", example_inputs=X)
    data = torch.randn(32, 3, 32, 32)
    fitted = nmconv.fit(nmconv.apply_plan(model, plan), data, reference=model)
    assert nmconv.get_fit(fitted) is not None
    found = nmconv.restore(fitted)
    assert nmconv.get_fit(found) is None and nmconv.get_plan(found) is None
    kept = dict(model.named_parameters())
    assert any(not torch.equal(value, kept[name]) for name, value in found.named_parameters())
    merged = nmconv.fit(nmconv.apply_plan(model, plan), data, reference=model, kernel="exact")
    if nmconv.get_merges(merged):
        with pytest.raises(nmconv.FitError, match="fitted in merged form"):
            nmconv.restore(merged)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    converted = nmconv.convert(net(), "3:1", example_inputs=X)
    before, plan = structure(converted), nmconv.get_plan(converted)

    def fails(*_, **__):
        raise nmconv.WitnessError("no")

    monkeypatch.setattr(nmconv.surgery.Witness, "check", fails)
    for call in (
        lambda: nmconv.restore(converted, inplace=True),
        lambda: nmconv.apply_plan(converted, nmconv.make_plan(converted, "2:1"), inplace=True),
    ):
        with pytest.raises(nmconv.WitnessError):
            call()
        assert structure(converted) == before and nmconv.get_plan(converted) is plan


# --- parameters that nobody reads -------------------------------------------------------------------------------------


def needs(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


class Slopes(nn.Module):
    """PReLUs: one of its own, one that is called twice, a functional one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.own, self.twice, self.weight = nn.PReLU(), nn.PReLU(3), nn.Parameter(torch.full((3,), 0.3))

    def forward(self, x):
        x = self.twice(self.b(self.own(self.a(x))))
        return self.twice(self.d(F.prelu(self.c(x), self.weight)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("witness", [False, True])
def test_parameters_of_what_is_dropped_require_no_gradients(inplace, witness):
    model = Slopes()
    everything, expected = needs(model), copy.deepcopy(model)
    plan = nmconv.make_plan(model, "1:1", example_inputs=X)
    dropped = plan.edit({site: "drop" for site in plan.sites if site.name == "own" or site.function})
    found = nmconv.apply_plan(model, dropped, inplace=inplace, witness=witness)
    assert needs(found) == everything - {"own.weight", "weight"}
    assert needs(expected) == everything
    more = plan.edit({site: "drop" for site in plan.sites if site.id == "twice#1"})
    with pytest.warns(nmconv.RestoredParametersWarning, match=r"2 parameters of this Slopes.*\(own\.weight, weight\)"):
        found = nmconv.apply_plan(found, more, inplace=inplace, witness=witness)
    assert needs(found) == everything  # twice is read by its other call
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nmconv.restore(found, inplace=inplace)
    equal(found, expected)


def test_what_was_frozen_before_stays_frozen():
    model = Slopes()
    model.own.weight.requires_grad_(False)
    converted = nmconv.convert(model, "4:1", example_inputs=X)
    with pytest.warns(nmconv.RestoredParametersWarning):
        found = nmconv.restore(converted)
    assert needs(found) == needs(model)


def test_loaded_parameters_that_nobody_reads_require_none(tmp_path):
    converted = nmconv.convert(Slopes(), "4:1", example_inputs=X)
    nmconv.save(converted, tmp_path / "model")
    assert needs(nmconv.load(Slopes(), tmp_path / "model")) == needs(converted)


def _trained_apart(rank, folder, results):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nmconv.convert(Slopes(), "4:1", example_inputs=X)
    wrapped = DistributedDataParallel(model)
    for step in range(3):
        part = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))[2 * rank : 2 * rank + 2]
        wrapped.zero_grad()
        wrapped(part).square().mean().backward()
    results[rank] = {name: value.grad for name, value in model.named_parameters()}
    dist.destroy_process_group()


def test_data_parallel_training_does_not_wait(tmp_path):
    import torch.multiprocessing as mp

    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_trained_apart, (str(tmp_path), results), nprocs=2)
        one, other = results[0], results[1]
    torch.manual_seed(0)
    model = nmconv.convert(Slopes(), "4:1", example_inputs=X)
    model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))).square().mean().backward()
    for name, value in model.named_parameters():
        assert (value.grad is None) == (one[name] is None)
        if value.grad is not None:
            torch.testing.assert_close(value.grad, one[name])
            assert torch.equal(one[name], other[name])


@quiet
@pytest.mark.parametrize("inplace", [False, True])
def test_a_finished_gradual_model_is_restored(inplace):
    model = net()
    before = structure(model)
    soft = nmconv.convert(model, "3:1", keep="first", relocate=True, gradual=True, example_inputs=X)
    for call in (nmconv.restore, nmconv.make_plan):
        with pytest.raises(nmconv.NmconvError, match=r"call finish\(\) first"):
            call(soft)
    nmconv.set_slope(soft, 0.5)
    nmconv.Gradual(soft, 1, end=0).finish()
    found = nmconv.restore(soft, inplace=inplace)
    assert structure(found) == before
    equal(found, model)


def test_parameters_of_a_finished_model_require_no_gradients():
    soft = nmconv.convert(Slopes(), "4:1", gradual=True, example_inputs=X)
    assert needs(soft) == needs(Slopes())
    nmconv.Gradual(soft, 1, end=0).finish()
    assert needs(soft) == needs(nmconv.convert(Slopes(), "4:1", example_inputs=X))
