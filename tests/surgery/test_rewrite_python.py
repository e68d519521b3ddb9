"""Rewritten blocks: contexts, decorators, branches, stored state and randomness stay as they were, or are refused."""

import collections
import contextlib
import copy
import functools
import random
import sys
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, dropped
from rewrite_nets import (
    LIBRARY,
    apply,
    conv,
    convs,
    droppable,
    every_subset,
    everything,
    faithful,
    net,
    outer,
    picture,
    planned,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import nmconv

torch.set_num_threads(1)


def refused(model, words, *args, **kwargs):
    """The one call that is to go at 2:1 stays instead, locked, and the plan says why; nothing else changes."""
    args = args or (() if kwargs else (picture(),))
    plan = planned(model, *args, **kwargs)
    locked = [site for site in plan.sites if site.locked]
    assert locked, str(plan)
    assert any(word in site.locked for site in locked for word in ([words] if isinstance(words, str) else words)), (
        locked
    )
    for site in locked:
        assert site.action != "drop"
        assert "cannot be dropped" in site.reason
        with pytest.raises(nmconv.PlanError, match="cannot be dropped"):
            plan.edit({site.id: "drop"})
    return plan, faithful(model, plan, *args, **kwargs)


class Doubled(torch.autograd.Function):
    """Hands the tensor on, and doubles its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "autocast to another type": lambda: torch.autocast("cpu", dtype=torch.float16),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "set_grad_enabled, true": lambda: torch.set_grad_enabled(True),
    "fork_rng": lambda: torch.random.fork_rng([]),
    "null": contextlib.nullcontext,
}


# --- what must be refused, or be done right ------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("around", ["null", "no_grad", "autocast"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_that_the_block_enters_is_never_lost(context, around, inside):
    """Whatever surrounds the conversion, the converted model computes in the context that its source enters."""

    def plain(self, x):
        with CONTEXTS[context]():
            x = self.conv(x.float())
        return F.relu(x.float().clone())

    def whole(self, x):
        with CONTEXTS[context]():
            x = F.relu(self.conv(x.float()))
        return x.float().clone()

    model = outer(net(whole if inside else plain, conv=conv()))
    with CONTEXTS[around]():
        plan = planned(model)
        plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
        converted = apply(model, plan)
    for outside in (contextlib.nullcontext, torch.no_grad, lambda: torch.autocast("cpu")):
        found = []
        for each in (model, converted):
            each.eval()
            seen = []
            each.block.conv.register_forward_hook(
                lambda m, i, o, seen=seen: seen.append((o.dtype, o.requires_grad, torch.is_inference(o)))
            )
            with outside(), dropped(model, plan.changes) if each is model else contextlib.nullcontext():
                output = each(picture())
                found.append((output.dtype, output.requires_grad, output.float().detach().clone(), seen[-1]))
        assert_same(found[1], found[0])
    if any(site.owner == "block" and site.locked for site in plan.sites):
        assert any("context" in site.locked for site in plan.sites)


def test_a_forward_with_a_decorator():
    def counted(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            return function(self, *args, **kwargs) * 2

        return wrapper

    @counted
    def part(self, x, scale=1):
        return F.relu(self.conv(x)) * scale

    model = outer(net(part, conv=conv()))
    everything(model)

    @torch.no_grad()
    def frozen(self, x):
        return F.relu(self.conv(x))

    model = outer(net(frozen, conv=conv()))
    plan = planned(model)
    converted = apply(model, plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop")))
    assert not converted.block(picture()).requires_grad


class Namespace:
    pass


STORES = {
    "tensor": lambda self, x: setattr(self, "last", x),
    "counter": lambda self, x: setattr(self, "count", self.count + 1),
    "list": lambda self, x: self.kept.append(x),
    "full list": lambda self, x: self.full.append(x),
    "dict": lambda self, x: self.table.update(x=x),
    "set": lambda self, x: self.seen.add(self.count),
    "deque": lambda self, x: self.recent.append(x),
    "object": lambda self, x: setattr(self.space, "last", x),
    "counter of an object": lambda self, x: setattr(self.space, "count", getattr(self.space, "count", 0) + 1),
    "nested list": lambda self, x: self.nested[0].append(x),
    "child's attribute": lambda self, x: setattr(self.conv, "last", x),
    "buffer in place": lambda self, x: self.steps.add_(1),
    "buffer anew": lambda self, x: setattr(self, "steps", self.steps + 1),
    "delete": lambda self, x: delattr(self, "spare") if hasattr(self, "spare") else None,
    "plain dict entry": lambda self, x: self.__dict__.update(direct=x),
    "ordered dict": lambda self, x: self.ordered.update(x=x),
    "counter class": lambda self, x: self.tally.update(["x"]),
}


def storing(what):
    def part(self, x):
        x = self.conv(x)
        STORES[what](self, x)
        return F.relu(x)

    block = net(
        part,
        conv=conv(),
        count=0,
        kept=[],
        full=[1],
        table={},
        seen=set(),
        recent=collections.deque(maxlen=2),
        space=Namespace(),
        nested=[[]],
        spare=1,
        ordered=OrderedDict(),
        tally=collections.Counter(),
        last=None,
    )
    block.register_buffer("steps", torch.zeros(()))
    return block


def state(block):
    found = {name: value for name, value in vars(block).items() if not name.startswith("_")}
    found["space"] = dict(vars(block.space))
    found["conv.last"] = getattr(block.conv, "last", None)
    found["steps"] = block.steps
    found["recent"] = list(block.recent)
    found["tally"] = dict(block.tally)
    return found


@pytest.mark.parametrize("what", STORES)
def test_a_block_that_stores_something_goes_on_storing_it(what):
    model = outer(storing(what))
    before = copy.deepcopy(state(model.block))
    plan = planned(model)
    assert_same(state(model.block), before, "planning has left something")
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = apply(model, plan)
    assert_same(state(model.block), before, "converting has left something in the original")
    assert_same(state(converted.block), before, "converting has left something")
    with torch.no_grad():
        for _ in range(2):
            with dropped(model, plan.changes):
                wanted = model(picture())
            assert_same(converted(picture()), wanted)
            assert_same(state(converted.block), state(model.block))
    if any(site.locked for site in plan.sites):
        assert any("stores" in site.locked or "attribute" in site.locked for site in plan.sites)


class AttrDict(dict):
    """As many configurations are."""

    def __init__(self, path, **more):
        super().__init__(more)
        self.path = path

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class FrozenDict(dict):
    """One that refuses to be changed."""

    def _refuse(self, *args, **kwargs):
        raise TypeError("this dict is frozen")

    def __deepcopy__(self, memo):
        return self

    __setitem__ = __delitem__ = clear = update = pop = setdefault = _refuse


@pytest.mark.parametrize("settings", [AttrDict("here", scale=2), FrozenDict(scale=2), FrozenDict(), AttrDict("here")])
def test_containers_of_unusual_classes_among_the_attributes(settings):
    def part(self, x):
        return F.relu(self.conv(x)) * 2

    model = outer(net(part, conv=conv(), settings=settings), config=settings)
    before = dict(settings)
    _, converted = every_subset(model, count=2)
    assert model.config is settings and model.block.settings is settings
    assert dict(settings) == before and type(settings) is type(converted.config)


RANDOM = {
    "random": lambda self: random.random(),
    "torch": lambda self: float(torch.rand(())),
    "own generator": lambda self: self.generator.random(),
    "torch generator": lambda self: float(torch.rand((), generator=self.torch_generator)),
    "shuffle": lambda self: random.sample([1.0, 2.0, 3.0, 4.0, 5.0], 5)[0],
    "numpy": lambda self: float(pytest.importorskip("numpy").random.rand()),
    "numpy generator": lambda self: float(self.numpy_generator.random()),
}


@pytest.mark.parametrize("what", RANDOM)
def test_random_decisions_are_not_frozen(what):
    import numpy

    def part(self, x):
        return F.relu(self.conv(x)) * RANDOM[what](self)

    block = net(
        part,
        conv=conv(),
        generator=random.Random(0),
        torch_generator=torch.Generator().manual_seed(0),
        numpy_generator=numpy.random.default_rng(0),
    )
    model = outer(block)
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = apply(model, plan).eval()
    with torch.no_grad():
        assert len({float(converted.block(picture()).sum()) for _ in range(20)}) > 2
    locked = [site for site in plan.sites if site.locked]
    assert locked and all("random" in site.locked for site in locked)


def test_planning_leaves_generators_alone():
    import numpy

    def part(self, x):
        return F.relu(self.conv(x)) * (
            random.random() + float(torch.rand(())) + self.own.random() + numpy.random.rand()
        )

    model = outer(net(part, conv=conv(), own=random.Random(0)))
    before = (
        random.getstate(),
        torch.get_rng_state().tolist(),
        model.block.own.getstate(),
        str(numpy.random.get_state()),
    )
    planned(model)
    after = (
        random.getstate(),
        torch.get_rng_state().tolist(),
        model.block.own.getstate(),
        str(numpy.random.get_state()),
    )
    assert after == before


def test_random_tensors_like_the_input_are_drawn_anew():
    def part(self, x):
        x = F.relu(self.conv(x))
        return x + torch.rand_like(x) + torch.randn(x.shape[0], 1, 1, 1) * 0

    model = outer(net(part, conv=conv()))
    converted, _plan = everything(model)
    assert not torch.equal(converted.block(picture()), converted.block(picture()))


BRANCHES = {
    "shape": lambda x: x.shape[2] > 4,
    "size": lambda x: x.size(2) > 4,
    "ndim": lambda x: x.ndim == 4,
    "numel": lambda x: x.numel() > 100,
    "data": lambda x: bool((x > 0).all()),
    "data by item": lambda x: x.sum().item() > 0,
    "data by float": lambda x: float(x.detach().sum()) > 0,
    "dtype": lambda x: x.dtype == torch.float32,
    "device": lambda x: x.device.type == "cpu",
    "requires_grad": lambda x: x.requires_grad,
    "contiguous": lambda x: x.is_contiguous(),
    "floating": lambda x: x.is_floating_point(),
    "len": lambda x: len(x) > 1,
    "any": lambda x: any(extent == 6 for extent in x.shape),
    "tuple": lambda x: tuple(x.shape[2:]) == (6, 6),
    "range": lambda x: [1 for _ in range(x.shape[0])] == [1, 1],
    "str": lambda x: str(x.dtype) == "torch.float32",
    "format": lambda x: f"{x.shape[2]}" == "6",
    "grad enabled": lambda x: torch.is_grad_enabled(),
    "autocast": lambda x: torch.is_autocast_enabled("cpu"),
    "min": lambda x: min(x.shape[2], 4) == 4,
    "int": lambda x: int(x.shape[2]) > 4,
    "equal": lambda x: x.shape == (2, 4, 6, 6),
    "in": lambda x: 6 in x.shape,
    "tracing": lambda x: torch.jit.is_tracing(),
    "compiling": lambda x: torch.compiler.is_compiling(),
    "nan": lambda x: not torch.isnan(x).any(),
    "all finite": lambda x: torch.isfinite(x).all(),
    "torch.numel": lambda x: torch.numel(x) > 100,
    "identity": lambda x: x is not None,
    "channels last": lambda x: x.is_contiguous(memory_format=torch.channels_last),
    "layout": lambda x: x.layout == torch.strided,
}


INPUTS = [
    picture(),
    picture(2, 4, 3, 3),
    picture(1, 4, 6, 6),
    -picture().abs(),
    picture().to(memory_format=torch.channels_last),
    picture(4, 6, 6),
]


@pytest.mark.parametrize("what", BRANCHES)
def test_branches_are_taken_anew_or_refused(what):
    """On inputs of other shapes, values and layouts than those of the conversion too."""

    def part(self, x):
        taken = BRANCHES[what](x)
        x = F.relu(self.conv(x))
        return x * 2 if taken else x - 1

    model = outer(net(part, conv=conv()))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = faithful(model, plan, picture())
    for context in (contextlib.nullcontext, torch.no_grad, lambda: torch.autocast("cpu")):
        for x in INPUTS:
            with context(), dropped(model, plan.changes):
                wanted = model(x.clone())
            with context():
                assert_same(converted(x.clone()), wanted)
    for site in plan.sites:
        assert not site.locked or "cannot be rewritten: " in site.locked


def test_assertions_still_speak():
    def part(self, x):
        assert x.shape[1] == 4, "four channels"
        if x.ndim != 4:
            raise ValueError("four dimensions")
        return F.relu(self.conv(x))

    model = outer(net(part, conv=conv()))
    converted, _plan = everything(model)
    with pytest.raises(ValueError, match="four dimensions"):
        converted.block(picture(4, 4, 4))
    with pytest.raises(AssertionError, match="four channels"):
        converted.block(picture(2, 3, 6, 6))


def test_an_assertion_on_a_shape():
    def part(self, x):
        assert x.shape[1] == 4, "four channels"
        return F.relu(self.conv(x))

    model = outer(net(part, conv=conv()))
    converted, _plan = everything(model)
    with pytest.raises(AssertionError, match="four channels"):
        converted.block(picture(2, 3, 6, 6))


def test_try_and_except():
    def part(self, x):
        x = F.relu(self.conv(x))
        try:
            return x + self.missing
        except AttributeError:
            return x * 2

    everything(outer(net(part, conv=conv())))

    def part(self, x):
        x = F.relu(self.conv(x))
        try:
            if x.sum() > 0:
                return x
            return x + 1
        except Exception:  # it catches the tracer's own complaint
            return x * 2

    model = outer(net(part, conv=conv()))
    everything(model)


def test_a_gradient_of_its_own_is_not_lost():
    def part(self, x):
        return F.relu(Doubled.apply(self.conv(x)))

    model = outer(net(part, conv=conv()))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = apply(model, plan)
    grads = []
    for each in (model, converted):
        with dropped(model, plan.changes) if each is model else contextlib.nullcontext():
            each(picture()).square().sum().backward()
        grads.append([parameter.grad for parameter in each.parameters()])
    assert_same(grads[1], grads[0])


def test_detach_is_not_lost():
    def part(self, x):
        y = self.conv(x)
        return F.relu(y) + y.detach() * 2 + y.data

    every_subset(outer(net(part, conv=conv())), count=1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_the_block_is_not_lost(reentrant):
    def inner(self, x):
        return F.relu(self.conv(x))

    def part(self, x):
        x = checkpoint(self.inner, x, use_reentrant=reentrant)
        return F.relu(self.conv2(x))

    model = outer(net(part, **convs("conv", "conv2"), methods={"inner": inner}))
    plan = planned(model, ratio="3:1")
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = apply(model, plan)
    counts = []
    for each in (model, converted):
        calls = []
        each.block.conv.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with dropped(model, plan.changes) if each is model else contextlib.nullcontext():
            each(picture().requires_grad_()).sum().backward()
        counts.append(len(calls))
    assert counts[0] == counts[1]  # with early stop the last convolution need not run again


def test_a_module_made_in_the_forward():
    def part(self, x):
        return F.relu(nn.Identity()(self.conv(x)))

    every_subset(outer(net(part, conv=conv())), count=2)

    def part(self, x):
        return F.relu(nn.BatchNorm2d(4)(self.conv(x)))

    assert [site.locked for site in everything(outer(net(part, conv=conv())))[1].sites if site.locked]


def test_a_closure_over_another_module():
    other = conv()

    def part(self, x):
        return F.relu(self.conv(x) + other(x))

    model = outer(net(part, conv=conv()))
    everything(model)


def test_global_names_with_the_same_name():
    """Two functions of one name, from two modules."""

    def part(self, x):
        x = F.relu(self.conv(x))
        return torch.pow(x, 2) + x.pow(2) + torch.special.expit(x) + F.softmax(x, 1) + torch.softmax(x, 1)

    every_subset(outer(net(part, conv=conv())), count=2)


def test_python_builtins_and_odd_operators():
    def part(self, x):
        x = F.relu(self.conv(x))
        y = abs(x) + max([x.mean(), x.mean()], key=id) + sum([x, x]) - -x + +x
        y = y @ y.transpose(2, 3) + (x > 0) * (x != 1) + (~(x > 0)).float() + x // 2 + x % 2 + 2**x + divmod(7, 2)[0]
        y[..., 0] = 0
        y[:, 1:3, None] = 1
        z, *rest = y.unbind(1)
        return torch.stack([z, *rest], 1) if len(rest) == 3 else y

    model = outer(net(part, conv=conv()))
    everything(model)


def test_complaints_are_named_in_the_plan():
    def part(self, x):
        x = F.relu(self.conv(x))
        return x * 2 if x.sum() > 0 else x

    _, plan = everything(outer(net(part, conv=conv())))
    (site,) = [site for site in plan.sites if site.locked]
    assert "block.forward" in site.locked and "branches on a shape or value" in site.locked

    def part(self, x):
        x = F.relu(self.conv(x))
        return x * 2 if x.shape[2] > 4 else x

    plan, _ = refused(outer(net(part, conv=conv())), "branches on a shape")
    site = next(site for site in plan.sites if site.locked)
    assert "block.forward" in site.locked and "cannot be rewritten" in site.locked
    assert site.id in str(plan) and "branches on a shape" in str(plan)


inner_of_library = LIBRARY.deep


def precise_here(x, module):
    with torch.autocast("cpu", enabled=False):
        return module(x.float())


def calls_precise_here(x, module):
    return precise_here(x, module)


class Precise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.conv(x.float())

    def run(self, x):
        return self.forward(x)

    @property
    def mode(self):
        return torch.autocast("cpu", enabled=False)


HIDDEN = {
    "a library's function": lambda self, x: LIBRARY.precise(x, self.conv),
    "a library's function that calls another": lambda self, x: LIBRARY.deep(x, self.conv),
    "an imported function": lambda self, x: inner_of_library(x, self.conv),
    "a decorated function": lambda self, x: LIBRARY.decorated(x, self.conv),
    "a function that calls another": lambda self, x: calls_precise_here(x, self.conv),
    "a child's forward": lambda self, x: self.child.forward(x),
    "a child's method": lambda self, x: self.child.run(x),
    "an exit stack": lambda self, x: [stack := contextlib.ExitStack(), stack.enter_context(self.child.mode),
                                      self.conv(x.float()), stack.close()][2],
    "by hand": lambda self, x: [mode := self.child.mode, mode.__enter__(), self.conv(x.float()),
                                mode.__exit__(None, None, None)][2],
}  # fmt: skip


# --- the same, hidden one step further away ------------------------------------------------------------------------


@pytest.mark.parametrize("how", HIDDEN)
def test_a_context_that_is_entered_out_of_sight(how):
    def part(self, x):
        return F.relu(HIDDEN[how](self, x))

    model = outer(net(part, conv=conv(), child=Precise()))
    converted, plan = everything(model)
    with torch.no_grad(), torch.autocast("cpu"):
        for each in (model, converted):
            seen = []
            for child in (each.block.conv, each.block.child.conv):
                child.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.dtype))
            with dropped(model, plan.changes) if each is model else contextlib.nullcontext():
                each(picture())
            assert seen == [torch.float32]


def test_enable_grad_in_a_library():
    def part(self, x):
        return F.relu(LIBRARY.with_grad(x, self.conv))

    model = outer(net(part, conv=conv()))
    converted, _ = everything(model)
    with torch.no_grad():
        seen = []
        converted.block.conv.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
        converted(picture())
    assert seen == [True]


def test_a_library_asks_for_the_type():
    def part(self, x):
        return F.relu(self.conv(LIBRARY.twice_if_tensor(x)))

    everything(outer(net(part, conv=conv())))


FIRST = """
import torch, torch.nn.functional as F
from math import sqrt
from torch import nn

def by_size(x):
    return x / sqrt(x.shape[-1])

def by_class(x):
    return x if isinstance(x, torch.Tensor) else x * 0 + 1

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))))
"""


SECOND = """
import torch.nn.functional as F
import ONE
from torch import nn

class Block(ONE.Block):
    def forward(self, x):
        return F.relu(self.b(ONE.HELPER(F.relu(self.a(x)))))
"""


# --- the shape of the memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("helper", ["by_size", "by_class"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_helper_of_another_package_is_understood_whatever_else_is_rewritten(helper, turned, monkeypatch):
    names = [f"{which}_{helper}_{turned}" for which in ("one", "other")]
    for name, source in zip(names, (FIRST, SECOND), strict=True):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(source.replace("HELPER", helper).replace("ONE", names[0]), module.__dict__)
    blocks = [sys.modules[name].Block() for name in names]
    model = nn.Sequential(conv(), *(reversed(blocks) if turned else blocks))
    x = picture(2, 4, 16, 16)
    plan = planned(model, x)
    assert not [site.locked for site in plan.sites if site.locked]
    faithful(model, plan, x)
    one = "2:" if turned else "1:"  # the package's own is left alone
    faithful(model, plan.edit({site.id: "keep" for site in plan.sites if site.id.startswith(one)}), x)
