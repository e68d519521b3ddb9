"""Forwards that go another way when they are asked to: nothing is merged across the place where they may."""

import functools
import importlib.util
import linecache
import warnings
from collections import OrderedDict

import pytest
import torch
from merge_nets import picture, settle
from torch import nn

import nmconv

torch.set_num_threads(1)


class Net(nn.Module):
    flag = False
    depth = 9

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 3, 3)
        self.down = None


class ReturnsEither(Net):
    def forward(self, x, stop=False):
        y = self.bn(self.a(x))
        return y if stop else self.b(y)


class ReturnsEitherOnSeveralLines(Net):
    def forward(self, x, *, stop=False):
        y = self.bn(self.a(x))
        return (
            self.b(
                y,
            )
            if not stop
            else y
        )


class ReturnsEarly(Net):
    def forward(self, x, stop=None):
        y = self.bn(self.a(x))
        if stop is not None:
            return y
        return self.b(y)


class SkipsAStep(Net):
    def forward(self, x, stop=False):
        y = self.bn(self.a(x))
        if not stop:
            y = self.b(y)
        return y


class MultipliesBetween(Net):
    def forward(self, x, stop=None):
        y = self.bn(self.a(x))
        y = y * stop if stop is not None else y
        return self.b(y)


class HasAHelper(Net):
    def features(self, x, stop=False):
        y = self.bn(self.a(x))
        if stop:
            return y
        return self.b(y)

    def forward(self, x, stop=False):
        return self.features(x, stop)


class TwoHelpers(Net):
    def first(self, x):
        return self.bn(self.a(x))

    def second(self, y, stop=False):
        if stop:
            return y
        return self.b(y)

    def forward(self, x, stop=False):
        return self.second(self.first(x), stop)


class Loops(Net):
    def forward(self, x, stop=9):
        for at, part in enumerate((self.a, self.bn, self.b)):
            x = part(x)
            if at == stop:
                return x
        return x


class Nested(Net):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Sequential(self.a, self.bn), nn.Sequential(self.b)
        del self.a, self.bn, self.b

    def forward(self, x, stop=False):
        x = self.one(x)
        if stop:
            return x
        return self.two(x)


class WithAText(Net):
    def forward(self, x, stop=False):
        assert """a text
that begins further left"""
        y = self.bn(self.a(x))
        if stop:
            return y
        return self.b(y)


class BetweenHelpers(Net):
    def first(self, x):
        return self.bn(self.a(x))

    def second(self, y):
        return self.b(y)

    def forward(self, x, stop=False):
        x = self.first(x)
        if stop:
            return x
        return self.second(x)


class SkipsTheFirst(Net):
    def __init__(self):
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b = nn.Conv2d(3, 3, 3)

    def forward(self, x, stop=False):
        if not stop:
            x = self.bn(self.a(x))
        return self.b(x)


class CallsItElsewhere(Net):
    def forward(self, x, stop=False):
        if stop:
            return self.bn(self.a(x))
        return self.b(self.bn(self.a(x)))


class CallsItElsewhereInOneLine(Net):
    def forward(self, x, stop=False):
        return self.bn(self.a(x)) if stop else self.b(self.bn(self.a(x)))


class LoopsInLoops(Net):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([self.a, self.bn]), nn.ModuleList([self.b])])
        del self.a, self.bn, self.b

    def forward(self, x, stop=9):
        for at, stage in enumerate(self.stages):
            if at == stop:
                break
            for part in stage:
                x = part(x)
        return x


class LoopsInAHelper(LoopsInLoops):
    def stage(self, x, stage):
        for part in stage:
            x = part(x)
        return x

    def forward(self, x, stop=9):
        for at, stage in enumerate(self.stages):
            if at == stop:
                break
            x = self.stage(x, stage)
        return x


class Inherits(ReturnsEarly):
    def forward(self, x, stop=None):
        return super().forward(x, stop)


def twice(method):
    for _ in range(2):

        def inner(*args, method=method, **options):
            return method(*args, **options)

        method = functools.wraps(method)(inner)
    return method


class Decorated(Net):
    @twice
    def forward(self, x, stop=False):
        y = self.bn(self.a(x))
        if stop:
            return y
        return self.b(y)


class Matches(Net):
    def forward(self, x, stop=False):
        y = self.bn(self.a(x))
        match stop:
            case False:
                return self.b(y)
        return y


class TakesAnyKeyword(Net):
    def forward(self, x, **options):
        y = self.bn(self.a(x))
        if options.get("stop"):
            return y
        return self.b(y)


class RenamesIt(Net):
    def forward(self, x, stop=False):
        ends = stop or False
        y = self.bn(self.a(x))
        if ends:
            return y
        return self.b(y)


class LoopsSoFar(Net):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([self.a, self.bn, self.b])
        del self.a, self.bn, self.b

    def forward(self, x, stop=3):
        for part in self.parts[:stop]:
            x = part(x)
        return x


class Picks(Net):
    def forward(self, x, stop=False):
        last = nn.functional.relu if stop else self.b
        y = self.bn(self.a(x))
        return last(y)


class FlagGivesAll(Net):
    def forward(self, x):
        y = self.bn(self.a(x))
        if self.flag:
            return OrderedDict(out=y)["out"]
        return self.b(y)


class FlagBreaks(Net):
    def forward(self, x):
        for at, part in enumerate((self.a, self.bn, self.b)):
            if at == self.depth + 1:
                break
            x = part(x)
        return x


class FlagReturns(Net):
    def forward(self, x):
        y = self.bn(self.a(x))
        if self.flag:
            return y
        return self.b(y)


class FlagReturnsEither(Net):
    def forward(self, x):
        y = self.bn(self.a(x))
        return self.b(y) if not self.flag else y


class NumberReturns(Net):
    def forward(self, x):
        y = self.bn(self.a(x))
        if self.depth < 2:
            return y
        return self.b(y)


def quietly(make, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        return make(*args, **options)


def same(merged, net, *args, **options):
    with torch.no_grad():
        found, wanted = merged(*args, **options), net(*args, **options)
    return found.shape == wanted.shape and (found - wanted).abs().max() < 1e-10


ASKED = {Loops: 1, MultipliesBetween: 3.0, LoopsInLoops: 1, LoopsInAHelper: 1, LoopsSoFar: 2}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    "cls",
    [
        ReturnsEither,
        ReturnsEitherOnSeveralLines,
        ReturnsEarly,
        SkipsAStep,
        MultipliesBetween,
        HasAHelper,
        TwoHelpers,
        Loops,
        Nested,
        WithAText,
        BetweenHelpers,
        SkipsTheFirst,
        CallsItElsewhere,
        CallsItElsewhereInOneLine,
        LoopsInLoops,
        LoopsInAHelper,
        Inherits,
        Decorated,
        Matches,
        TakesAnyKeyword,
        RenamesIt,
        LoopsSoFar,
        Picks,
    ],
)
def test_arguments(cls, live):
    net, x = settle(cls()), picture(3, 9, 8)
    merged = quietly(nmconv.merge, net, gate="always", live=live)
    assert same(merged, net, x)
    assert same(merged, net, x, stop=ASKED.get(cls, True))
    assert same(merged, net, x)
    assert all(run.merges == () for run in nmconv.find_runs(net))


@pytest.mark.parametrize("cls", [FlagReturns, FlagReturnsEither, FlagGivesAll, FlagBreaks, NumberReturns])
def test_flags(cls):
    net, x = settle(cls()), picture(3, 9, 8)
    merged = quietly(nmconv.merge, net, gate="always")
    assert same(merged, net, x)
    net.flag = merged.flag = True
    net.depth = merged.depth = 1
    assert net(x).shape[1] == 16 and same(merged, net, x)


class Activated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.b, self.two = nn.Conv2d(4, 3, 3, padding=1), nn.ReLU()

    def forward(self, x, stop=False):
        y = self.one(self.a(x))
        if stop:
            return y
        return self.two(self.b(y))


def test_hoisting_stops_there_too():
    net, x = settle(Activated()), picture(3, 9, 8)
    plain, hoisted = nmconv.convert(net, keep="boundary"), nmconv.convert(net, hoist_padding=True, keep="boundary")
    assert not same(plain, net, x)
    assert same(hoisted, plain, x) and same(hoisted, plain, x, stop=True)


class Structural(Net):
    """Conditions that are no choice of the caller's, and those that lie elsewhere."""

    def forward(self, x, early=False):
        if early:
            return x
        if self.down is not None:
            return self.down(x)
        y = self.bn(self.a(x))
        if self.down is not None:
            return y
        w = self.b(y)
        return w.relu() if early else w * 2


class OneExpression(Net):
    def forward(self, x, stop=False):
        if not stop:
            return self.b(self.bn(self.a(x)))
        return x


class PlainLoop(Net):
    def forward(self, x, stop=False):
        for part in (self.a, self.bn, self.b):
            x = part(x)
        if stop:
            return x * 2
        return x


@pytest.mark.parametrize("cls", [Structural, OneExpression, PlainLoop])
def test_what_lies_elsewhere_ends_no_run(cls):
    net, x = settle(cls()), picture(3, 9, 8)
    merged = nmconv.merge(net, gate="always")
    assert [len(merge.convs) for merge in nmconv.get_merges(merged)[0]] == [2]
    assert same(merged, net, x)
    option = "early" if cls is Structural else "stop"
    assert same(merged, net, x, **{option: True})


@pytest.mark.parametrize(
    "text", ["# nothing\n", "def forward(self, x, stop=(1,\n", 'def forward(self):\n    """open\n', "x = 1\n"]
)
def test_source_that_has_changed_since(text, tmp_path, monkeypatch):
    path = tmp_path / "made.py"
    path.write_text(
        "from test_merge_exits import Net\n\n\nclass Made(Net):\n    def forward(self, x, stop=False):\n"
        "        return self.b(self.bn(self.a(x)))\n"
    )
    spec = importlib.util.spec_from_file_location("made", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path.write_text("\n\n\n\n" + text)
    linecache.clearcache()
    net = settle(module.Made())
    assert same(nmconv.merge(net, gate="always"), net, picture(3, 9, 8))


def test_source_that_cannot_be_read_is_taken_as_it_was_traced():
    space = {"Net": Net}
    exec("class Made(Net):\n    def forward(self, x):\n        return self.b(self.bn(self.a(x)))\n", space)
    net = settle(space["Made"]())
    assert same(nmconv.merge(net, gate="always"), net, picture(3, 9, 8))
