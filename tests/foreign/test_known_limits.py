"""Changes after conversion that nothing notices: the limits of docs/trust.md. These tests fail on purpose."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nmconv
from foreign.three_convs import Net, conv, picture

torch.set_num_threads(1)


def follows(original, changed, change):
    """Return whether a changed model follows a later change as the original does, or raises."""
    for model in (original, changed):
        change(model)
    try:
        result = changed(picture())
    except nmconv.NmconvError:
        return True
    return torch.allclose(result, original(picture()), atol=1e-5)


class ChildFlag(Net):
    def forward(self, x):
        for child in (self.a, self.b, self.c):
            x = F.relu(child(x)) * (2 if getattr(child, "twice", False) else 1)
        return x


class FunctionAttribute(Net):
    def __init__(self):
        super().__init__()
        self.last, self.gains = F.relu, [1.0]

    def forward(self, x):
        return self.last(self.c(F.relu(self.b(F.relu(self.a(x)))))) * self.gains[0]


@pytest.mark.parametrize(
    "cls, change",
    [
        (ChildFlag, lambda model: setattr(model.c, "twice", True)),
        (FunctionAttribute, lambda model: setattr(model, "last", F.silu)),
        (FunctionAttribute, lambda model: setattr(model, "gains", [3.0])),
    ],
    ids=["flag of a child in a loop", "function", "list"],
)
def test_a_rewritten_block(cls, change):
    model = cls()
    plan = nmconv.make_plan(model, "1:1", example_inputs=picture())
    site = next(site.id for site in plan.sites if site.action == "keep")
    converted = nmconv.apply_plan(model, plan.edit({site: "drop"}), example_inputs=picture())
    before = converted(picture())
    change(converted)
    with contextlib.suppress(nmconv.RewriteError):
        assert not torch.equal(converted(picture()), before)


class Child(nn.Module):
    double = False

    def __init__(self):
        super().__init__()
        self.c = conv(size=1)

    def forward(self, x):
        if self.double:
            x = x * 2
        return self.c(x)


class Merged(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.child = conv(3), Child()
        self.skip, self.fn, self.again = False, None, False

    def middle(self, x):
        if self.skip:
            x = x * 2
        return x

    def forward(self, x):
        x = self.middle(self.a(x))
        if self.fn is not None:
            x = self.fn(x)
        x = self.child(x)
        if self.again:
            x = self.child(x)
        return x


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.child, "double", True),
        lambda model: setattr(model, "fn", torch.tanh),
        lambda model: setattr(model, "again", True),
    ],
    ids=["flag in a child's forward", "None", "flag after the run"],
)
def test_a_merged_part(change):
    model = Merged().eval()
    merged = nmconv.merge(model, gate="always", example_inputs=picture())
    assert follows(model, merged, change)


class ComparesShapes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, size=1), conv(size=1)

    def forward(self, x):
        y = self.a(x)
        if x.shape == (2, 3, 7, 7):
            y = y * 2
        return self.b(y)


class CountsParts(ComparesShapes):
    def forward(self, x):
        y = self.a(x)
        if len(x.split(8, 3)) == 1:
            y = y * 2
        return self.b(y)


@pytest.mark.parametrize("cls", [ComparesShapes, CountsParts])
def test_conditions_on_sizes(cls):
    model = cls().eval()
    merged = nmconv.merge(model, gate="always", example_inputs=picture())
    assert torch.allclose(merged(picture(size=7)), model(picture(size=7)), atol=1e-5)


def test_a_forward_that_asks_whether_its_parameters_are_trained():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(conv(3), nn.PReLU(), conv(), nn.PReLU(), conv())

        def forward(self, x):
            trained = all(parameter.requires_grad for parameter in self.parameters())
            return self.layers(x) * 2 if trained else self.layers(x).detach()

    converted = nmconv.convert(Asks(), "2:1", example_inputs=picture())
    assert converted(picture()).requires_grad
