"""Functions that a recording cannot see into: what comes before and after them is read all the same."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from merge_nets import assert_near
from nets import convs, net, relus
from oracle import assert_same, dropped
from torch import nn

import nmconv
from nmconv.flow import record_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:FutureWarning",
    "ignore:.*jit:DeprecationWarning",
    "ignore::nmconv.NoEffectWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # torch.compile's own
)
X = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def points(names):
    return {name: nn.Conv2d(4, 4, 1) for name in names.split()}


def plain(x):
    return torch.cumsum(x.square(), 1) + 0.5


def vmapped(x):
    return torch.vmap(plain)(x)


@cache
def script():
    return torch.jit.script(plain)


def scripted(x):
    return script()(x)


def with_tangents(x):
    return sum(torch.func.jvp(plain, (x,), (x,)))


def differentiated(x):
    return torch.func.grad(lambda value: plain(value).sum())(x)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


compiled = torch.compile(plain, backend="eager")
UNSEEN = {
    "compiled": compiled,
    "vmap": vmapped,
    "scripted": scripted,
    "jvp": with_tangents,
    "grad": differentiated,
    "autograd function": Squared.apply,
}
each = pytest.mark.parametrize("unseen", UNSEEN.values(), ids=UNSEEN.keys())


def straight(unseen):
    def forward(self, x):
        x = self.q(self.b(self.p(self.a(x))))
        x = unseen(x)
        x = F.relu(self.d(self.r(self.c(x))))
        return self.head(x.mean((2, 3)))

    torch.manual_seed(1)
    return net(forward, **convs("a b c d"), **relus("p q r"), head=nn.Linear(4, 3)).eval()


def outputs(model):
    for training in (False, True):
        yield model.train(training)(X)


@each
@pytest.mark.parametrize("given", [False, True])
def test_activations_before_and_after(unseen, given):
    model = straight(unseen)
    plan = nmconv.make_plan(model, "2:1", example_inputs=X if given else None, keep="boundary")
    assert [(site.name or site.function, site.action) for site in plan.sites] == [
        ("p", "drop"), ("q", "keep"), ("r", "drop"), ("relu", "keep"),
    ]  # fmt: skip
    with dropped(model, [site for site in plan.sites if site.action == "drop"]):
        expected = list(outputs(model))
    converted = nmconv.convert(model.eval(), "2:1", example_inputs=X if given else None, keep="boundary")
    assert_same(list(outputs(converted)), expected)


@each
def test_merging_stops_there(unseen):
    def forward(self, x):
        return self.d(self.c(unseen(self.b(self.a(x)))))

    model = net(forward, **points("a b c d")).eval().double()
    merged = nmconv.merge(model, gate="always")
    groups = [{merge.head, *merge.removed} for merges in nmconv.get_merges(merged) for merge in merges]
    assert {"c", "d"} in groups
    assert not any(group & {"a", "b"} and group & {"c", "d"} for group in groups)
    assert_near(merged(X.double()), model(X.double()))


@each
@pytest.mark.parametrize("where", ["before", "after", "let go", "let go of both"])
def test_values_that_it_has_read_stay(unseen, where):
    def forward(self, x):
        x = self.a(x)
        if where == "after":
            y = self.b(x)
            return self.c(y + unseen(x))
        y = unseen(x)
        x = self.b(x)
        if where == "before":
            return self.c(x) + y
        x = self.c(x)  # by now nobody holds what it has read
        if where == "let go":
            return x + y
        return self.d(x) + unseen(y)

    model = net(forward, **points("a b c d")).eval().double()
    merged = nmconv.merge(model, gate="always")
    assert_near(merged(X.double()), model(X.double()))


@each
def test_norms_that_it_has_read_stay(unseen):
    def forward(self, x):
        x = self.a(x)
        y = unseen(x)
        x = self.n(x)
        return self.b(x) + y

    norm = nn.BatchNorm2d(4)
    norm.running_mean += 3
    model = net(forward, **points("a b"), n=norm).eval().double()
    for merged in (nmconv.merge(model, gate="always"), nmconv.fold_norms(model)):
        assert_near(merged(X.double()), model(X.double()))


def test_a_call_besides_forward():
    def forward(self, x):
        return self.b(self.a(x))

    def features(self, x):
        x = self.a(x)
        y = scripted(x)
        return self.b(x) + y

    model = net(forward, **points("a b")).eval().double()
    type(model).features = features
    merged = nmconv.merge(model, gate="always", methods={"features": X.double()})
    assert_near(merged.features(X.double()), model.features(X.double()))


def test_what_torch_computes_inside_is_no_node():
    recording = record_model(straight(scripted), X).runs[0]
    functions = [fact.label for node, fact in recording.facts.items() if node.op == "call_function"]
    assert functions == ["unknown", "relu", "mean"]


def test_what_is_called_in_a_transform():
    def forward(self, x):
        x = torch.vmap(self.a)(x)
        return self.r(self.c(self.q(self.b(self.p(x)))))

    model = net(forward, **convs("a b c"), **relus("p q r")).eval()
    plan = nmconv.make_plan(model, "2:1")
    assert plan.counts.activations_after < plan.counts.activations_before
    with dropped(model, [site for site in plan.sites if site.action == "drop"]):
        expected = list(outputs(model))
    assert_same(list(outputs(nmconv.convert(model.eval(), "2:1"))), expected)
