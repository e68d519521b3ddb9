"""Forwards that do more with a convolution or a norm than call it: what they see must not change with merging."""

import copy
import functools

import pytest
import torch
from merge_nets import assert_agree, picture, settle
from torch import nn

import nmconv


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def run(self, x):
        return self.b(self.bn(self.a(x)))


class Property(Net):
    @property
    def width(self):
        return self.a.out_channels

    def forward(self, x):
        return self.run(x) * self.width


class Local(Net):
    def forward(self, x):
        first = self.a
        return self.b(self.bn(first(x))) * first.out_channels


class ByName(Net):
    def forward(self, x):
        return self.run(x) * getattr(self.a, "out_" + "channels")


def width_of(net):
    return net.a.out_channels


class Helper(Net):
    def forward(self, x):
        return self.run(x) * width_of(self)


class Looping(Net):
    def forward(self, x):
        return self.run(x) * sum(part.out_channels for part in self.children() if hasattr(part, "out_channels"))


class AsksClass(Net):
    def forward(self, x):
        return self.run(x).abs() if isinstance(self.bn, nn.BatchNorm2d) else self.run(x)


class AsksType(Net):
    def forward(self, x):
        return self.run(x).abs() if type(self.bn) is nn.BatchNorm2d else self.run(x)


class AsksAttribute(Net):
    def forward(self, x):
        return self.run(x).abs() if hasattr(self.bn, "running_mean") else self.run(x)


class Weighs(Net):
    def forward(self, x):
        return self.run(x) * sum(value.pow(2).sum() for value in self.parameters())


class Dumps(Net):
    def forward(self, x):
        return self.run(x) * self.state_dict()["b.weight"].sum()


class Walks(Net):
    def forward(self, x):
        return self.run(x) * sum(part.kernel_size[0] for part in self.modules() if isinstance(part, nn.Conv2d))


class Indexed(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1))

    def forward(self, x):
        return self.parts(x) * self.parts[0].out_channels


class Branches(Indexed):
    """Cannot be traced as a whole: its parts are, one by one, and none of these sees who looks."""

    def forward(self, x):
        y = self.parts(x) * vars(self)["_modules"]["parts"][0].out_channels
        return y if float(x.detach().sum()) > 1e9 else -y


LOOKING = [
    Property, Local, ByName, Helper, Looping, AsksClass, AsksType, AsksAttribute, Weighs, Dumps, Walks, Indexed,
    Branches,
]  # fmt: skip


@pytest.mark.parametrize("kind", LOOKING)
@pytest.mark.parametrize("live", [False, True])
def test_what_a_forward_looks_at_stays(kind, live):
    net = settle(kind())
    with pytest.warns(nmconv.NoEffectWarning):  # no example inputs, which would tell
        merged = nmconv.merge(net, gate="always", live=live)
    assert assert_agree(merged, copy.deepcopy(net), (3, 9, 8))
    whys = [run.why for run in nmconv.find_runs(net)]
    reason = "reads its parameters" if kind is Weighs else "a forward looks at its settings, class or parameters"
    assert whys and all(reason in why for why in whys)
    assert not any(len(merge.convs) > 1 for merges in nmconv.get_merges(merged) for merge in merges)


@pytest.mark.parametrize("kind", LOOKING)
def test_norms_that_a_forward_looks_at_are_not_folded(kind):
    net = settle(kind())
    assert assert_agree(nmconv.fold_norms(net), net, (3, 9, 8))


class Quiet(Net):
    """What every model does: nothing is looked at."""

    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(4, 1, 1)), 0

    def forward(self, x):
        if x.shape[1] != 3 or not isinstance(x, torch.Tensor):
            return self.a(x)
        return self.run(x) * self.scale


def test_classes_are_as_they_were_and_calls_are_no_looks():
    before = {cls: dict(vars(cls)) for cls in (nn.Conv2d, nn.BatchNorm2d, nn.Module)}
    net = settle(Quiet())
    assert [run.merges for run in nmconv.find_runs(net, example_inputs=picture(3, 9, 8))] == [(("a", "b"),)]
    assert {cls: dict(vars(cls)) for cls in before} == before
    assert net.a.out_channels == 16  # read for good, and by nobody noted


class OwnGet(nn.Conv2d):
    def __getattribute__(self, name):
        return 7 if name == "lucky" else super().__getattribute__(name)


def test_a_class_with_a_getattribute_of_its_own_keeps_it():
    own = OwnGet.__getattribute__
    net = settle(nn.Sequential(OwnGet(3, 16, 1), nn.Conv2d(16, 4, 1)))
    assert nmconv.find_runs(net) and OwnGet.__getattribute__ is own and net[0].lucky == 7


class Holder:
    def __init__(self, module):
        self.module = module


class Held(nn.Module):
    """One of its convolutions is also called through something that no one can put another module into."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.c, self.d = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.way = how(self.a)

    def forward(self, x):
        way = self.way
        while not callable(way) or isinstance(way, Holder):
            way = way.module if isinstance(way, Holder) else next(iter(way.values() if isinstance(way, dict) else way))
        return self.b(way(x)).relu() + self.d(self.c(x)).relu()


@pytest.mark.parametrize(
    "how",
    [
        Holder, lambda a: Holder([a]), lambda a: [[[[a]]]], lambda a: {"k": ({"k": Holder(a)},)}, lambda a: (a,),
        lambda a: Holder(Holder(a)), lambda a: functools.partial(nn.Module.__call__, a), lambda a: a.forward,
    ],
)  # fmt: skip
def test_what_else_holds_a_module(how):
    """Only that module stays: the rest of the network merges."""
    net = settle(Held(how))
    merged = nmconv.merge(net, gate="always")
    assert [merge.convs for merges in nmconv.get_merges(merged) for merge in merges] == [("c", "d")]
    assert assert_agree(merged, net, (3, 9, 8))
    assert [run.merges for run in nmconv.find_runs(net) if run.convs != ("c", "d")] in ([], [()])


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


class OwnCall(nn.Conv2d):
    def __call__(self, input):
        return super().__call__(input) * 2


@pytest.mark.parametrize("kind", [OwnConv, OwnCall])
def test_one_convolution_of_its_own_kind_leaves_the_rest_to_merge(kind):
    net = settle(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1), nn.ReLU(), kind(4, 4, 1), nn.BatchNorm2d(4)))
    for made in (nmconv.merge(net), nmconv.fold_norms(net)):
        assert assert_agree(made, net, (3, 9, 8))
    assert [merge.convs for merge in nmconv.get_merges(nmconv.merge(net))[0]] == [("0", "1")]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16))
        self.down = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return x + self.down(self.up(x))


@pytest.mark.parametrize("live", [False, True])
def test_a_hook_inside_a_branch(live):
    net, seen = settle(Residual()), []
    net.up.register_forward_hook(lambda module, inputs, output: seen.append(output.shape) or output * 2)
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net, live=live)
    x = picture(4, 9, 8)
    assert float((merged(x) - net(x)).detach().abs().max()) < 1e-10 and len(set(seen)) == 1 and seen[0][1] == 16
    assert not any(run.merges for run in nmconv.find_runs(net))


class Counting(nn.Module):
    """A sum in a forward that cannot be rewritten."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.calls = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), 0

    def forward(self, x):
        self.calls = self.calls + 1
        return self.one(x) + self.two(x)


def test_find_runs_knows_which_sums_cannot_be_taken_out():
    (run,) = nmconv.find_runs(settle(Counting()))
    assert run.merges == () and "cannot be rewritten" in run.why


def test_runs_and_merges_print_as_sentences():
    one, two, three, four = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    model = nn.Sequential(one, two, nn.ReLU(), three, four).eval()
    first, last = nmconv.find_runs(model)
    assert str(first) == f"0, 1: merges 0 + 1, gain {first.gain:.2f}"
    assert last.why and str(last) == f"3, 4: merges nothing ({last.why})"
    ((merge,),) = nmconv.get_merges(nmconv.merge(model))
    assert str(merge) == f"{merge.head}: one convolution for 0, 1"
