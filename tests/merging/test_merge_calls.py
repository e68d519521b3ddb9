"""Calls of a merged model other than the one it was merged for: right, or a clear error, in every form it takes."""

import copy
import enum
import pickle

import pytest
import torch
from torch import nn

import nmconv
from nmconv.merging.call_guards import check_argument

X = torch.rand(2, 4, 9, 9)
quiet = pytest.mark.filterwarnings("ignore::nmconv.NoEffectWarning")  # a run that ends leaves nothing to merge


class Kind(enum.Enum):
    PLAIN = 1
    DOUBLE = 2


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.n = nn.ModuleDict({"p": nn.BatchNorm2d(4), "q": nn.BatchNorm2d(4)})
        self.n["q"].running_mean += 1
        self.eval()


class Domain(Base):
    def forward(self, x, domain="p"):
        return self.b(self.n[domain](self.a(x)))


class RequiredDomain(Base):
    def forward(self, x, domain):
        return self.b(self.n[domain](self.a(x)))


class Helper(Base):
    def pick(self, domain):
        return self.n[domain]

    def forward(self, x, *, domain="p"):
        return self.b(self.pick(domain)(self.a(x)))


class Stops(Base):
    def forward(self, x, domain="p", aux=False):
        y = self.n[domain](self.a(x))
        return y if aux else self.b(y)


class Inner(Base):
    """Holds a block whose forward may stop, and hands the truth value on."""

    def __init__(self, cls=Stops):
        super().__init__()
        self.block = cls()
        self.eval()

    def forward(self, x, aux=False):
        return self.c(self.block(x, aux=aux))


class ByKind(Base):
    def forward(self, x, kind=Kind.PLAIN):
        y = self.a(x)
        y = y * 2 if kind is Kind.DOUBLE else y
        return self.b(y)


class Context(Base):
    def forward(self, x):
        y = self.a(x)
        if not torch.is_grad_enabled():
            y = y * 2
        if torch.is_autocast_enabled("cpu"):
            y = y * 3
        return self.b(y)


class Attribute(Base):
    doubled = False

    def forward(self, x):
        y = self.a(x)
        if self.doubled:
            y = y * 2
        return self.b(y)


class Activates(Base):
    """The same with an activation that can go; the last one is never called."""

    doubled = False

    def __init__(self):
        super().__init__()
        self.r, self.s = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.r(self.a(x))
        if self.doubled:
            y = y * 2
        return self.s(self.b(y))


class Features(Base):
    def forward_features(self, x):
        return self.b(self.a(x))

    def forward_head(self, x):
        return self.c(x)

    def forward_intermediates(self, x):
        first = self.a(x)
        return [first, self.b(first)]

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def forms(model, tmp_path, pristine, inputs):
    """The merged model as it is, and as it comes back from everything that copies it."""
    nmconv.save(model, tmp_path / "net.safetensors")
    yield "itself", model
    yield "copied", copy.deepcopy(model)
    yield "pickled", pickle.loads(pickle.dumps(model))
    yield "loaded", nmconv.load(pristine, tmp_path / "net.safetensors", example_inputs=inputs)
    yield "compiled", torch.compile(model, backend="eager")


def close(one, other):
    return torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "inputs", "same", "other"),
    [
        (Domain, (X,), {}, {"domain": "q"}),
        (RequiredDomain, (X, "p"), {"domain": "p"}, {"domain": "q"}),
        (Helper, (X,), {}, {"domain": "q"}),
    ],
)
def test_an_argument_that_picks_a_module_is_checked_in_every_form(cls, inputs, same, other, tmp_path):
    net = cls()
    merged = nmconv.merge(net, gate="always", example_inputs=inputs)
    (merge,) = nmconv.get_merges(merged)[0]
    assert merge.convs == ("a", "b")
    assert [(guard.owner, guard.argument, guard.value) for guard in merge.guards] == [("", "domain", '"p"')]
    for name, form in forms(merged, tmp_path, cls(), inputs):
        assert close(form(X, **same), net(X, **same)), name
        with pytest.raises(nmconv.MergeError, match="domain='p' and is called with 'q'"):
            form(X, **other)
    assert type(net) is cls
    assert isinstance(merged, cls)


def test_an_exported_model_is_checked_too():
    net = Domain()
    merged = nmconv.merge(net, gate="always", example_inputs=X)
    program = torch.export.export(merged, (X,), {"domain": "p"}).module()
    assert close(program(X, domain="p"), net(X))
    with pytest.raises((nmconv.MergeError, AssertionError, RuntimeError)):
        program(X, domain="q")


def test_a_second_merge_keeps_the_first_ones_guards():
    net = nn.Sequential(Domain(), nn.ReLU()).eval()
    merged = nmconv.fold_norms(nmconv.merge(net, gate="always", example_inputs=X), example_inputs=X)
    with pytest.raises(nmconv.MergeError, match="domain"):
        merged[0](X, "q")


@quiet
@pytest.mark.parametrize("cls", [Stops, Inner])
def test_truth_values_are_recorded_both_ways(cls):
    net = cls()
    merged = nmconv.merge(net, gate="always", example_inputs=X)
    for aux in (False, True):
        assert close(merged(X, aux=aux), net(X, aux=aux))


def test_enums_are_recorded_with_every_member():
    net = ByKind()
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net, gate="always", example_inputs=X)
    for kind in Kind:
        assert close(merged(X, kind), net(X, kind))


def test_contexts_that_a_forward_asks_for_end_a_run():
    net = Context()
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net, gate="always", example_inputs=X)
    with torch.no_grad():
        assert close(merged(X), net(X))
    assert close(merged(X), net(X))
    (run,) = nmconv.find_runs(net, example_inputs=X)
    assert run.why == "b is given something other than what comes before it returns (eval, no_grad)"


@pytest.mark.parametrize("way", ["merged", "live", "loaded", "fitted"])
def test_a_flag_that_adds_a_step_is_guarded(way, tmp_path):
    """What it would do lies inside of one convolution now: with the flag set it raises, and without it is right."""
    net = Attribute().eval()
    if way == "fitted":
        plan = nmconv.make_plan(Activates(), "2:1", example_inputs=X, keep="boundary")
        net = Activates().eval()
        merged = nmconv.fit(nmconv.apply_plan(net, plan), torch.rand(16, *X.shape[1:]), reference=net, kernel="exact")
    else:
        merged = nmconv.merge(net, gate="always", example_inputs=X, live=way == "live")
    if way == "loaded":
        nmconv.save(merged, tmp_path / "model")
        merged = nmconv.load(Attribute().eval(), tmp_path / "model")
    assert len(nmconv.get_merges(merged)[0][0].convs) == 2
    if way != "fitted":
        assert close(merged(X), net(X))
    merged(X)
    merged.doubled = True
    with pytest.raises(nmconv.MergeError, match=r"the model was merged by nmconv for self\.doubled=False"):
        merged(X)
    merged.doubled = False
    merged(X)


def test_entry_points_are_right_or_raise(tmp_path):
    net = Features()
    merged = nmconv.merge(net, gate="always", example_inputs=X)
    (merge,) = nmconv.get_merges(merged)[0]
    assert (merge.convs, merge.closed) == (("a", "b"), ("forward_intermediates",))
    for name, form in forms(merged, tmp_path, Features(), X):
        assert close(form(X), net(X)), name
        if name != "compiled":
            assert type(form) is Features
            assert close(form.forward_features(X), net.forward_features(X))
            assert close(form.forward_head(X), net.forward_head(X))
            with pytest.raises(nmconv.MergeError, match="forward_intermediates reads values inside"):
                form.forward_intermediates(X)
    with pytest.warns(nmconv.NoEffectWarning):
        open_one = nmconv.merge(net, gate="always", example_inputs=X, methods={"forward_intermediates": X})
    assert all(map(close, open_one.forward_intermediates(X), net.forward_intermediates(X)))
    with pytest.raises(nmconv.OptionError, match="forward_intermediates of this Features cannot be called"):
        nmconv.merge(net, example_inputs=X, methods={"forward_intermediates": torch.zeros(1, 7, 3, 3)})


def test_what_is_only_a_list_to_its_forward_is_left():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))

        def forward(self, x):
            if x.mean() > 9:
                x = -x
            for part in self.l:
                x = torch.relu(part(x))
            return x

    net = Listed().eval()
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net, gate="always", example_inputs=X)
    assert torch.equal(merged(X), net(X))
    assert torch.equal(nmconv.fold_norms(net, example_inputs=X)(X), net(X))


@quiet
def test_an_attribute_with_another_value_is_to_be_set_back():
    with pytest.raises(nmconv.MergeError, match=r"self\.depth is now 1: set it back to 2, or set it before merging"):
        check_argument(1, 2, "body", "self.depth")


def test_a_forward_set_on_the_object_is_what_counts():
    class Two(Base):
        def fast(self, x):
            return self.b(self.a(x))

        def forward(self, x):
            return self.b(self.n["p"](self.a(x)))

    net = Two()
    net.n["p"].running_mean += 3
    net.forward = net.fast
    for made in (nmconv.merge(net, gate="always", example_inputs=X), nmconv.fold_norms(net, example_inputs=X)):
        assert close(made(X), net.b(net.a(X)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_a_compiled_function_that_reads_inside_ends_a_run():
    @torch.jit.script
    def gate(x):
        return x * torch.sigmoid(x)

    class Scripted(Base):
        def forward(self, x):
            y = self.a(x)
            z = gate(y)
            return self.b(y) + z

    net = Scripted()
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net, gate="always", example_inputs=X)
    assert torch.equal(merged(X), net(X))
