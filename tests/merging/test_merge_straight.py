"""Forwards that go by sizes: what runs alike at every size is merged, and nothing else."""

import functools

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


class WithinLargerExpressions(Net):
    """What is outside of the two calls does not matter, nor what is done with the value before and after."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(x) if x.shape[-1] < 8 else x
        return functional.relu(self.b(self.bn(self.a(self.relu(x) * 2)))) + 1


class Plain(nn.Module):
    """A part that has conditions, but on what it has only."""

    def __init__(self):
        super().__init__()
        self.act = None

    def forward(self, x):
        if self.act is not None and not self.training:
            x = self.act(x)
        return x


class WithAPart(Net):
    def __init__(self):
        super().__init__()
        self.part = Plain()

    @staticmethod
    def halved(x):
        return x / 2

    def init_weights(self):
        for part in self.modules():
            part.done = True

    def forward(self, x, /):
        if x.shape[-1] < 8:
            x = self.halved(x)
        x = self.part(self.bn(self.a(x)))
        x = self.b(x)
        self.seen = True
        return x


class AsksAtTheTop(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.grid = PlainBlock(), 3

    def forward(self, x):
        if x.shape[-1] < self.block.limit:
            x = functional.relu(x)
        return self.block(x)


class PlainBlock(Net):
    limit = 8

    def forward(self, x):
        return self.b(self.bn(self.a(x)))


STRAIGHT = [
    Prepares,
    PreparesOne,
    InABranch,
    InAHelper,
    AsksAfterwards,
    Alike,
    WithinLargerExpressions,
    WithAPart,
    AsksAtTheTop,
]


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


class CallsSmall(Net):
    """What ``small`` is, is up to those below."""

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.small(x)
        x = self.a(x)
        return self.b(x)


class CallsItInAHelper(CallsSmall):
    def small(self, x):
        return self.a(x)


class CallsItInABase(CallsItInAHelper):
    def forward(self, x):
        if x.shape[-1] < 8:
            return super().forward(x)
        x = self.a(x)
        return self.b(x)


class CallsItByAnotherName(CallsSmall):
    def __init__(self):
        super().__init__()
        self.small = self.a


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


class Mixin:
    """No nn.Module."""

    def small(self, x):
        return self.a(x)


class CallsItInAMixin(Mixin, CallsSmall):
    pass


class HasAFunction(CallsSmall):
    def __init__(self):
        super().__init__()
        self.small = lambda x: self.a(x)


class CachedProperty(CallsSmall):
    @functools.cached_property
    def small(self):
        return self.a


class Tries(Net):
    def forward(self, x):
        x = x + 1 if x.shape[-1] < 12 else x
        try:
            x = self.a(x)
            if self.part is None:
                x = self.b(x)
        except RuntimeError:
            pass
        return x


class SharesADict(Net):
    def __init__(self):
        super().__init__()
        self.state = {"small": False}
        self.part = ReadsADict(self.state)

    def forward(self, x):
        self.state["small"] = bool(x.shape[-1] < 8)
        x = self.a(x)
        x = self.part(x)
        return self.b(x)


class ReadsADict(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, x):
        return functional.relu(x) if self.state["small"] else x


class SharesAGlobal(SharesADict):
    def __init__(self):
        super().__init__()
        self.part = ReadsAGlobal()

    def forward(self, x):
        SHARED["small"] = bool(x.shape[-1] < 8)
        x = self.a(x)
        x = self.part(x)
        return self.b(x)


class ReadsAGlobal(nn.Module):
    def forward(self, x):
        return functional.relu(x) if SHARED["small"] else x


SHARED = {}


class Block(Net):
    def forward(self, x):
        if x.shape[-1] < 12:
            x = x + 1
        x = self.a(x)
        return self.b(x)


class ReachesIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.block.a(x)
        return self.block(x)


class ReachesIntoAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([PlainBlock()])

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.blocks[0].a(x)
        return self.blocks[0](x)


class ReachesIntoALaterOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ReLU(), PlainBlock()])

    def forward(self, x):
        x = self.blocks[0](x)
        if x.shape[-1] < 8:
            return self.blocks[1].a(x)
        return self.blocks[1](x)


class ReachesIntoASequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 3))

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.block[0](x)
        return self.block(x)


class CallsAnotherMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = HasAnotherMethod()

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.block.features(x)
        return self.block(x)


class HasAnotherMethod(PlainBlock):
    def features(self, x):
        return self.a(x)


class HasItToo(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = PlainBlock()
        self.also = self.block.a

    def forward(self, x):
        if x.shape[-1] < 8:
            return self.also(x)
        return self.block(x)


class IsSmall(nn.Module):
    def forward(self, x):
        return bool(x.shape[-1] < 8)


class IsAnswered(Net):
    def __init__(self):
        super().__init__()
        self.ask = IsSmall()

    def forward(self, x):
        small = self.ask(x)
        x = self.a(x)
        x = functional.relu(x) if small else x
        return self.b(x)


class TellsAText(TellsABlock):
    def __init__(self):
        super().__init__()
        self.block = BlockThatIsToldAText()

    def forward(self, x):
        return self.block(x, "small" if x.shape[-1] < 8 else "large")


class BlockThatIsToldAText(Net):
    def forward(self, x, kind):
        x = self.a(x)
        x = functional.relu(x) if kind == "small" else x
        return self.b(x)


class TellsByNothing(TellsABlock):
    def __init__(self):
        super().__init__()
        self.block = BlockThatIsToldNothing()

    def forward(self, x):
        return self.block(x, x.sum() if x.shape[-1] < 8 else None)


class BlockThatIsToldNothing(Net):
    def forward(self, x, mask):
        x = self.a(x)
        x = x if mask is None else x * mask
        return self.b(x)


class TellsAPartAText(Told):
    def __init__(self):
        super().__init__()
        self.part = MaybeReluByText()

    def forward(self, x):
        kind = "small" if x.shape[-1] < 8 else "large"
        x = self.a(x)
        x = self.part(x, kind)
        return self.b(x)


class MaybeReluByText(MaybeRelu):
    def forward(self, x, kind):
        return functional.relu(x) if kind == "small" else x


class CountsRows(Net):
    def forward(self, x):
        small = len(x[0, 0]) < 8
        x = self.a(x)
        x = functional.relu(x) if small else x
        return self.b(x)


class CountsPictures(Net):
    def forward(self, x):
        one = len(x) == 1
        x = self.a(x)
        x = functional.relu(x) if one else x
        return self.b(x)


class CountsTokens(Net):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2).shape[1]
        x = self.a(x)
        x = functional.relu(x) if tokens < 64 else x
        return self.b(x)


class CountsInASlice(Net):
    def forward(self, x):
        size = x.shape[-2:]
        x = self.a(x)
        x = functional.relu(x) if size[1] < 8 else x
        return self.b(x)


TURNING = [
    CallsItInAMixin,
    HasAFunction,
    CachedProperty,
    Tries,
    SharesADict,
    SharesAGlobal,
    ReachesIn,
    ReachesIntoAList,
    ReachesIntoALaterOne,
    ReachesIntoASequence,
    CallsAnotherMethod,
    HasItToo,
    IsAnswered,
    TellsAText,
    TellsByNothing,
    TellsAPartAText,
    CountsRows,
    CountsPictures,
    CountsTokens,
    CountsInASlice,
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


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        small = x.shape[-1] < 8
        y = self.c(x)
        return functional.relu(y) if small else y


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.p(x) + self.q(x)


class BranchesBehindAStem(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = Stem(), Branches()

    def forward(self, x):
        return self.block(self.stem(x))


class BranchesBehindAQuestion(BranchesBehindAStem):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1))

    def forward(self, x):
        small = x.shape[-1] < 8
        x = self.stem(x)
        x = functional.relu(x) if small else x
        return self.block(x)


def merges_of(net, **options):
    """Of how many convolutions each is made, with the outputs compared at sizes that it was not traced with, too."""
    merged = nmconv.merge(net, gate="always", example_inputs=picture(3, 16, 16), **options)
    for size in (16, 9, 8, 7, 5, 3):
        for batch in (1, 3):
            x = picture(3, size, size, batch=batch)
            with torch.no_grad():
                found, wanted = merged(x), net(x)
            assert found.shape == wanted.shape and float((found - wanted).abs().max()) < 1e-10
    return [merge.convs for merges in nmconv.get_merges(merged) for merge in merges if len(merge.convs) > 1]


@pytest.mark.parametrize("cls", [BranchesBehindAStem, BranchesBehindAQuestion])
def test_sums_do_not_reach_back_past_a_question(cls):
    assert merges_of(settle(cls())) == [("block.p", "block.q")]


@pytest.mark.parametrize("cls", STRAIGHT)
def test_what_runs_alike_at_every_size_is_merged(cls):
    net = settle(cls())
    assert len(merges_of(net)) == len(merges_of(net, live=True)) == 1


@pytest.mark.parametrize("cls", TURNING)
def test_what_may_run_otherwise_is_not(cls):
    net = settle(cls())
    assert merges_of(net) == merges_of(net, live=True) == []
    assert all(run.merges == () for run in nmconv.find_runs(net, example_inputs=picture(3, 16, 16)))


def test_timms_classifier_of_two_convolutions():
    vgg = pytest.importorskip("timm.models.vgg")
    net = vgg.ConvMlp(4, 12, kernel_size=7, drop_rate=0.5)
    merged = nmconv.merge(settle(nmconv.convert(net, keep="boundary")), gate="always")
    wanted = settle(nmconv.convert(net, keep="boundary"))
    assert [merge.convs for merge in nmconv.get_merges(merged)[0]] == [("fc1", "fc2")]
    for size in (9, 7, 5, 1):
        x = picture(4, size, size)
        with torch.no_grad():
            assert float((merged(x) - wanted(x)).abs().max()) < 1e-10
