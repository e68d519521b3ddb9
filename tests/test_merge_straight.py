"""Forwards that go by sizes: what runs alike at every size is merged, and nothing else."""

import pytest
import torch
from merge_nets import picture, settle
from torch import nn
from torch.nn import functional

import nmconv

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::nmconv.NoEffectWarning")


class Net(nn.Module):
    """Two convolutions that merge where nothing else happens at sizes below 8; traced at a larger one."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 3, 3)
        self.part = None


class Prepares(Net):
    def forward(self, x):
        if x.shape[-1] < 8 or x.shape[-2] < 8:
            x = functional.pad(x, (1,) * 4)
        x = self.a(x)
        x = self.bn(x)
        x = self.b(x)
        return x


class PreparesOne(Net):
    def forward(self, x):
        x = functional.pad(x, (max(0, 8 - x.shape[-1]), 0))
        return self.b(self.bn(self.a(x)))


class InABranch(Net):
    def forward(self, x):
        if x.shape[-1] < 8:
            y = functional.relu(x)
        else:
            y = self.a(x)
            y = self.bn(y)
            y = self.b(y)
        return y


class InAHelper(Net):
    def helper(self, x):
        x = self.bn(self.a(x))
        return self.b(x)

    def forward(self, x):
        x = x if x.shape[-1] < 8 else functional.relu(x)
        return self.helper(x)


class AsksAfterwards(Net):
    def forward(self, x):
        x = self.a(x)
        x = self.b(self.bn(x))
        return x * 2 if x.shape[-1] < 8 else x


class Alike(nn.Module):
    """Of two blocks, one that goes by sizes before it begins."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Sequential(nn.Conv2d(3, 8, 1)), nn.Sequential(nn.Conv2d(8, 3, 3))

    def forward(self, x):
        if x.shape[-1] < 8:
            x = functional.relu(x)
        x = self.one(x)
        return self.two(x)


STRAIGHT = [Prepares, PreparesOne, InABranch, InAHelper, AsksAfterwards, Alike]


class MaybeRelu(nn.Module):
    small = False

    def forward(self, x, size):
        return functional.relu(x) if size < 8 else x


class MaybeReluIfTold(MaybeRelu):
    def forward(self, x, small):
        return functional.relu(x) if small else x


class MaybeReluIfSet(MaybeRelu):
    def forward(self, x):
        return functional.relu(x) if self.small else x


class Between(Net):
    """A part that asks for a size that is not the value's."""

    def __init__(self):
        super().__init__()
        self.part = MaybeRelu()

    def forward(self, x):
        return self.b(self.part(self.a(x), x.shape[-1]))


class BetweenBySeveralLines(Between):
    def forward(self, x):
        size = x.size(3)
        x = self.a(x)
        x = self.part(x, size)
        return self.b(x)


class Told(Net):
    def __init__(self):
        super().__init__()
        self.part = MaybeReluIfTold()

    def forward(self, x):
        small = bool(x.shape[-1] < 8)
        x = self.a(x)
        x = self.part(x, small)
        return self.b(x)


class ToldByName(Told):
    def forward(self, x):
        small = bool(x.shape[-1] < 8)
        return self.b(self.part(self.a(x), small=small))


class Sets(Net):
    def __init__(self):
        super().__init__()
        self.part = MaybeReluIfSet()

    def forward(self, x):
        self.part.small = bool(x.shape[-1] < 8)
        x = self.a(x)
        x = self.part(x)
        return self.b(x)


class SetsByName(Sets):
    def forward(self, x):
        setattr(self.part, "small", bool(x.shape[-1] < 8))  # noqa: B010
        x = self.a(x)
        x = self.part(x)
        return self.b(x)


class BlockThatIsTold(Told):
    def forward(self, x, small):
        x = self.a(x)
        x = functional.relu(x) if small else x
        return self.b(x)


class TellsABlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = BlockThatIsTold()

    def forward(self, x):
        return self.block(x, bool(x.shape[-1] < 8))


class TellsABlockInAList(TellsABlock):
    def __init__(self):
        super().__init__()
        self.block = BlockThatTakesAList()

    def forward(self, x):
        return self.block(x, [None, {"small": bool(x.shape[-1] < 8)}])


class BlockThatTakesAList(BlockThatIsTold):
    def forward(self, x, flags):
        return super().forward(x, flags[1]["small"])


class Remembers(Net):
    def forward(self, x):
        small = bool(x.shape[-1] < 8)
        x = self.a(x)
        if small:
            x = functional.relu(x)
        return self.b(x)


class InOneExpression(Net):
    def forward(self, x):
        small = bool(x.shape[-1] < 8)
        return self.b(functional.relu(self.a(x)) if small else self.a(x))


class ByAFunction(Net):
    def forward(self, x):
        small = bool(x.shape[-1] < 8)

        def between(y):
            return functional.relu(y) if small else y

        x = self.a(x)
        x = between(x)
        return self.b(x)


class ReadsItLater(Net):
    def forward(self, x):
        small = bool(x.shape[-1] < 8)
        y = self.a(x)
        z = self.b(y)
        return z + y.mean() if small else z


class AsksThenReads(Net):
    def forward(self, x):
        y = self.a(x)
        z = self.b(y)
        if z.shape[-1] < 8:
            return z + y.mean()
        return z


class NamesItTwice(Net):
    def forward(self, x):
        small = bool(x.shape[-1] < 8)
        x = y = self.a(x)
        x = self.b(x)
        return x + y.mean() if small else x


class CallsItElsewhere(Net):
    def forward(self, x):
        if x.shape[-1] < 8:
            return self.a(x)
        x = self.a(x)
        return self.b(x)


class CallsItInAHelper(Net):
    def small(self, x):
        return self.a(x)

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.small(x)
        x = self.a(x)
        return self.b(x)


class CallsItInABase(CallsItInAHelper):
    def forward(self, x):
        if x.shape[-1] < 8:
            return super().forward(x)
        x = self.a(x)
        return self.b(x)


class CallsItByAnotherName(Net):
    def __init__(self):
        super().__init__()
        self.also = self.a

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.also(x)
        x = self.a(x)
        return self.b(x)


class CallsAnInnerOneByAnotherName(Net):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(self.a)
        self.also = self.a
        del self.a

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.also(x)
        x = self.one(x)
        return self.b(x)


class HoldsItInAList(Net):
    def __init__(self):
        super().__init__()
        self.parts = [self.a]

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.parts[0](x)
        x = self.a(x)
        return self.b(x)


class CallsAll(Net):
    def forward(self, x):
        if x.shape[-1] < 8:
            return next(self.children())(x)
        x = self.a(x)
        return self.b(x)


class HandsItselfOn(Net):
    def forward(self, x):
        if x.shape[-1] < 8:
            return getattr(self, "a")(x)  # noqa: B009
        x = self.a(x)
        return self.b(x)


class Loops(Net):
    def forward(self, x):
        times = 1 if x.shape[-1] < 8 else 2
        for part in (self.a, self.b)[:times]:
            x = part(x)
        return x


class Picks(Net):
    def forward(self, x):
        last = functional.relu if x.shape[-1] < 8 else self.b
        x = self.a(x)
        x = last(x)
        return x


class LeavesABlock(nn.Module):
    """The first block goes by sizes, and what comes next is in another."""

    def __init__(self):
        super().__init__()
        self.one, self.two = First(), nn.Sequential(nn.Conv2d(16, 3, 3))

    def forward(self, x):
        return self.two(self.one(x))


class First(Net):
    def forward(self, x):
        small = bool(x.shape[-1] < 8)
        x = self.bn(self.a(x))
        return functional.relu(x) if small else x


TURNING = [
    Between,
    BetweenBySeveralLines,
    Told,
    ToldByName,
    Sets,
    SetsByName,
    TellsABlock,
    TellsABlockInAList,
    Remembers,
    InOneExpression,
    ByAFunction,
    ReadsItLater,
    AsksThenReads,
    NamesItTwice,
    CallsItElsewhere,
    CallsItInAHelper,
    CallsItInABase,
    CallsItByAnotherName,
    CallsAnInnerOneByAnotherName,
    HoldsItInAList,
    CallsAll,
    HandsItselfOn,
    Loops,
    Picks,
    LeavesABlock,
]


def merges_of(net):
    merged = nmconv.merge(net, gate="always")
    for size in (16, 8, 7, 5):
        x = picture(3, size, size)
        with torch.no_grad():
            found, wanted = merged(x), net(x)
        assert found.shape == wanted.shape and float((found - wanted).abs().max()) < 1e-10
    return [merge.convs for merges in nmconv.get_merges(merged) for merge in merges if len(merge.convs) == 2]


@pytest.mark.parametrize("cls", STRAIGHT)
def test_what_runs_alike_at_every_size_is_merged(cls):
    assert len(merges_of(settle(cls()))) == 1


@pytest.mark.parametrize("cls", TURNING)
def test_what_may_run_otherwise_is_not(cls):
    net = settle(cls())
    net = net.eval()
    assert merges_of(net) == []
    assert all(run.merges == () for run in nmconv.find_runs(net))


def test_timms_classifier_of_two_convolutions():
    vgg = pytest.importorskip("timm.models.vgg")
    net = vgg.ConvMlp(4, 12, kernel_size=7, drop_rate=0.5)
    merged = nmconv.merge(settle(nmconv.convert(net)), gate="always")
    wanted = settle(nmconv.convert(net))
    assert [merge.convs for merge in nmconv.get_merges(merged)[0]] == [("fc1", "fc2")]
    for size in (9, 7, 5, 1):
        x = picture(4, size, size)
        with torch.no_grad():
            assert float((merged(x) - wanted(x)).abs().max()) < 1e-10
