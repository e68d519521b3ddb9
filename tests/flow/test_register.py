"""``nmconv.register``: what the user says of classes that nmconv cannot look into."""

import copy
import sys
import threading
import types
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, dropped
from torch import nn

import nmconv
from nmconv.flow import registered_names

X = torch.rand(2, 4, 9, 9) - 0.5
conv = partial(nn.Conv2d, 4, 4, 3, padding=1)


class Squash(torch.autograd.Function):
    """An inverse hyperbolic sine: nmconv does not know it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.asinh(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.rsqrt(1 + x**2)


class Act(nn.Module):
    """An activation by an autograd function."""

    def forward(self, x):
        return Squash.apply(x)


class Scaled(nn.Module):
    """An activation with a parameter and a part."""

    def __init__(self):
        super().__init__()
        self.scale, self.part = nn.Parameter(torch.ones(4, 1, 1)), nn.ReLU()

    def forward(self, x):
        return Squash.apply(x * self.scale)


class Norm(nn.BatchNorm2d):
    """A norm with a forward of its own."""

    def forward(self, x):
        return super().forward(x).mul(1.5)


class Conv(nn.Module):
    """A convolution by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, padding=1)


class Passing(nn.Module):
    """Hands on what it gets, which nothing shows."""

    def forward(self, x):
        return x.flip(0).flip(0)


class Opaque(nn.Module):
    """A convolution and an activation that nobody shall look at."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = conv(), nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv(x))


class Net(nn.Module):
    """Three convolutions with one module behind each."""

    def __init__(self, make, first=conv):
        super().__init__()
        self.a, self.b, self.c = first(), conv(), conv()
        self.one, self.two = make(), make()

    def forward(self, x):
        return self.c(self.two(self.b(self.one(self.a(x)))))


def plan_of(model, ratio="2:1"):
    return nmconv.make_plan(model, ratio, example_inputs=X)


def real(model):
    return [(site.id, site.kind) for site in plan_of(model).sites if site.is_real]


def test_an_activation_is_known_while_it_is_registered():
    model = Net(Act)
    with pytest.raises(nmconv.NoSitesError):
        plan_of(model)
    with nmconv.register(Act, "activation"):
        assert real(model) == [("one#1", "Act"), ("two#1", "Act")]
    with pytest.raises(nmconv.NoSitesError):
        plan_of(model)


@pytest.mark.parametrize("make", [Act, Scaled])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_dropped_as_the_oracle_drops_it(make, training):
    model = Net(make).train(training)
    with nmconv.register(make, "activation"):
        converted = nmconv.convert(model, "2:1", example_inputs=X)
        with dropped(model, nmconv.get_plan(converted).changes) as log:
            wanted = model(X)
        log.assert_all_hit(training=training)
        assert_same(converted(X), wanted)
        assert list(converted.state_dict()) == list(model.state_dict())
        nmconv.verify(model, converted, example_inputs=X)
    assert_same(converted(X), wanted)  # it needs nobody's word to run


def test_a_shared_one_is_rewritten_and_one_in_double_precision_trains():
    class Shared(Net):
        def forward(self, x):
            return self.c(self.one(self.b(self.one(self.a(x)))))

    model = Shared(Act).double().train()
    with nmconv.register(Act, "activation"):
        converted = nmconv.convert(model, "2:1", example_inputs=X.double(), keep="boundary")
    assert_same(converted(X.double()), model.c(model.one(model.b(model.a(X.double())))))
    converted(X.double()).sum().backward()
    assert converted.a.weight.grad is not None


def test_a_norm_is_passed_and_never_folded():
    model = nn.Sequential(conv(), Norm(4), nn.ReLU(), conv(), Norm(4), nn.ReLU()).eval()
    with nmconv.register(Norm, "norm"):
        assert real(model) == [("2#1", "ReLU"), ("5#1", "ReLU")]
        folded = nmconv.fold_norms(copy.deepcopy(model), example_inputs=X)
    assert type(folded[1]) is Norm
    assert_same(folded(X), model(X))


@pytest.mark.parametrize("at", [0, 1])
def test_a_norm_between_convolutions_ends_what_merges(at):
    parts = [conv(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(*parts[: at + 1], Norm(4), *parts[at + 1 :]).eval()
    with nmconv.register(Norm, "norm"):
        runs = nmconv.find_runs(model, example_inputs=X)
        merged = nmconv.merge(model, gate="always", example_inputs=X)
    assert any("Norm is registered as 'norm', and its numbers are not known" in run.why for run in runs)
    assert sum(type(part) is Norm for part in merged.modules()) == 1
    torch.testing.assert_close(merged(X), model(X))


def test_a_conv_counts_and_is_never_merged():
    model = Net(nn.ReLU, first=Conv).eval()
    with nmconv.register(Conv, "conv"):
        assert plan_of(model).counts.convs == 3
        assert real(model) == [("one#1", "ReLU"), ("two#1", "ReLU")]
        converted = nmconv.convert(model, "3:1", example_inputs=X, hoist_padding=True, keep="boundary")
        runs = nmconv.find_runs(converted, example_inputs=X)
        with pytest.warns(nmconv.NoEffectWarning):
            merged = nmconv.merge(converted, gate="always", example_inputs=X)
    assert [run.convs for run in runs] == [("a", "b")]
    assert any("Conv is registered as 'conv'" in run.why for run in runs)
    assert type(merged.a) is Conv
    torch.testing.assert_close(merged(X), converted(X))


def test_what_derives_from_a_convolution_is_not_merged_either():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    with nmconv.register(Doubled, "conv"), pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(model, gate="always", example_inputs=X)
    assert type(merged[0]) is Doubled
    assert_same(merged(X), model(X))


def test_an_identity_is_nothing_between_a_convolution_and_its_activation():
    class Between(Net):
        def forward(self, x):
            return self.c(F.relu(self.two(self.b(F.relu(self.one(self.a(x)))))))

    model = Between(Passing).eval()
    assert plan_of(model).counts.activations_after == 2
    with nmconv.register(Passing, "identity"):
        converted = nmconv.convert(model, "2:1", example_inputs=X, keep="boundary")
    assert nmconv.get_plan(converted).counts.activations_after == 1
    assert_same(converted(X), model.c(F.relu(model.b(model.a(X)))))


def test_a_leaf_is_one_step_and_its_parts_are_nobodys():
    model = Net(Opaque)
    assert [name for name, _ in real(model)] == ["one.relu#1", "two.relu#1"]
    with nmconv.register(Opaque, "leaf"), pytest.raises(nmconv.NoSitesError, match="indivisible layer"):
        plan_of(model)


def test_subclasses_count_unless_they_bring_a_forward_of_their_own():
    class Same(Act):
        pass

    class Other(Act):
        def forward(self, x):
            return torch.asinh(x) + 1

    with nmconv.register(Act, "activation"):
        assert real(Net(Same)) == [("one#1", "Same"), ("two#1", "Same")]
        with pytest.raises(nmconv.NoSitesError):
            plan_of(Net(Other))
        changed = Net(Act)
        for module in (changed.one, changed.two):
            module.forward = lambda x: x
        with pytest.raises(nmconv.NoSitesError):
            plan_of(changed)


def test_nested_contexts_and_the_same_kind_again():
    with nmconv.register(Act, "activation"):
        with nmconv.register(Act, "activation"):
            pass
        assert registered_names(Net(Act)) == ((f"{Act.__module__}.Act", "activation"),)
    assert registered_names(Net(Act)) == ()


def test_without_a_context_it_stays_and_a_context_is_left_once():
    class Mine(Act):
        def forward(self, x):
            return Squash.apply(x)

    first = nmconv.register(Mine, "activation")
    with nmconv.register(Mine, "activation") as inner:
        pass
    inner.__exit__(None, None, None)
    assert real(Net(Mine))
    with first:
        pass
    with pytest.raises(nmconv.NoSitesError):
        plan_of(Net(Mine))


def test_a_context_that_fails_takes_it_back():
    with pytest.raises(KeyError), nmconv.register(Act, "activation"):
        raise KeyError
    assert registered_names(Net(Act)) == ()


def test_it_holds_in_other_threads():
    found = []
    with nmconv.register(Act, "activation"):
        thread = threading.Thread(target=lambda: found.append(real(Net(Act))))
        thread.start(), thread.join()
    assert found == [[("one#1", "Act"), ("two#1", "Act")]]


@pytest.mark.parametrize("kind", ["Activation", "act", "", None, 3, ["activation"], nn.ReLU])
def test_another_kind_is_refused(kind):
    with pytest.raises(nmconv.OptionError, match="'activation', 'norm', 'conv', 'identity', 'leaf'"):
        nmconv.register(Act, kind)


@pytest.mark.parametrize("cls", [Act(), "Act", torch.Tensor, F.relu, None, int, list[int]])
def test_what_is_no_class_of_modules_is_refused(cls):
    with pytest.raises(nmconv.OptionError, match="is not a class of modules"):
        nmconv.register(cls, "activation")


@pytest.mark.parametrize("cls", [nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict])
def test_containers_are_refused(cls):
    with pytest.raises(nmconv.OptionError, match="a class of your own"):
        nmconv.register(cls, "leaf")


@pytest.mark.parametrize(
    ("cls", "kind", "known"),
    [(nn.ReLU, "leaf", "activation"), (nn.Conv2d, "activation", "conv"), (nn.MaxPool2d, "norm", "pool")],
)
def test_what_is_known_as_something_else_is_refused(cls, kind, known):
    with pytest.raises(nmconv.OptionError, match=f"{cls.__name__} is known as '{known}' already"):
        nmconv.register(cls, kind)
    assert [name for name, _ in real(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))] == ["1#1"]


def test_two_kinds_at_a_time_are_refused():
    with nmconv.register(Act, "activation"):
        with pytest.raises(nmconv.OptionError, match="is registered as 'activation' already"):
            nmconv.register(Act, "leaf")
        assert real(Net(Act))
    with nmconv.register(Act, "leaf"):
        assert registered_names(Net(Act)) == ((f"{Act.__module__}.Act", "leaf"),)


def test_names_of_registered_classes_are_those_that_are_in_the_model():
    with nmconv.register(Act, "activation"), nmconv.register(Norm, "norm"), nmconv.register(Opaque, "leaf"):
        model = nn.Sequential(Norm(4), Act(), Act(), nn.ReLU())
        assert registered_names(model) == ((f"{__name__}.Act", "activation"), (f"{__name__}.Norm", "norm"))


def test_a_plan_of_a_model_with_a_registered_class_needs_it_again():
    model = Net(Act)
    with nmconv.register(Act, "activation"):
        plan = plan_of(model)
    with pytest.raises(nmconv.PlanError):
        nmconv.apply_plan(model, plan, example_inputs=X)


class Tanh(nn.Module):
    """Computed by numpy: what runs is no torch at all."""

    def forward(self, x):
        return torch.from_numpy(np.tanh(x.detach().numpy()))


def test_an_activation_that_is_not_computed_by_torch():
    model = Net(Tanh).eval()
    with nmconv.register(Tanh, "activation"):
        assert real(model) == [("one#1", "Tanh"), ("two#1", "Tanh")]
        converted = nmconv.convert(model, "2:1", example_inputs=X, keep="boundary")
    assert_same(converted(X), model.c(model.two(model.b(model.a(X)))))


def test_what_others_registered_with_timm_is_a_leaf():
    timm_layers = pytest.importorskip("timm.layers")
    from timm.layers import _fx

    class Untraceable(Opaque):
        pass

    model = Net(Untraceable)
    assert len(real(model)) == 2
    timm_layers.register_notrace_module(Untraceable)
    try:
        with pytest.raises(nmconv.NoSitesError):
            plan_of(model)
    finally:
        _fx._leaf_modules.discard(Untraceable)
    assert len(real(model)) == 2


def test_what_timm_itself_registered_is_looked_into():
    timm = pytest.importorskip("timm")
    from timm.models.vgg import ConvMlp

    assert timm.layers.is_notrace_module(ConvMlp)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), ConvMlp(8, 8, kernel_size=3))
    plan = nmconv.make_plan(model, "2:1", example_inputs=torch.rand(2, 3, 16, 16))
    assert [site.id for site in plan.sites if site.is_real] == ["1#1", "2.act1#1", "2.act2#1"]


def test_without_timm_nobody_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.layers", types.ModuleType("timm.layers"))
    assert len(real(Net(Opaque))) == 2


def test_a_plan_asks_for_what_was_registered(tmp_path):
    """Applied or loaded where a class is not known, it names the class and the way out."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b, self.last = conv(), Act(), conv(), Act()

        def forward(self, x):
            return self.last(self.b(self.act(self.a(x))))

    model = Twice().eval()
    with nmconv.register(Act, "activation"):
        converted = nmconv.convert(model, "2:1", example_inputs=X, keep="boundary")
        plan = nmconv.get_plan(converted)
        assert [site.action for site in plan.sites] == ["drop", "keep"]
        assert nmconv.Plan.from_json(plan.to_json()) == plan
        nmconv.save(converted, tmp_path / "model")
    name = f"{Act.__module__}.Act"
    assert plan.registered == ((name, "activation"),)
    with pytest.raises(nmconv.PlanError, match=rf"{name} registered as 'activation'.*nmconv\.register\(Act"):
        nmconv.apply_plan(model, plan)
    with pytest.raises(nmconv.FileError, match=rf"{name} registered as 'activation'"):
        nmconv.load(Twice(), tmp_path / "model")
    with nmconv.register(Act, "leaf"), pytest.raises(nmconv.PlanError, match="registered as 'activation'"):
        nmconv.apply_plan(model, plan)
    with nmconv.register(Act, "activation"):
        assert torch.equal(nmconv.load(Twice(), tmp_path / "model").eval()(X), converted(X))
