"""Two modes are traced alike, or not: only what a dropout is told of the mode makes no difference."""

import pytest
import torch
import torch.nn.functional as F
from nets import net
from torch import nn

import nmconv
from nmconv.finding import linear_runs


def parts():
    return {"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 3), "c": nn.Conv2d(4, 4, 3)}


def dropped(self, x):
    return self.b(F.dropout(self.a(x), 0.1, self.training))


def dropped_by_name(self, x):
    return self.b(F.dropout2d(self.a(x), training=self.training, p=0.1))


def only_asked(self, x):
    if self.training:
        pass
    return self.b(self.a(x))


def read_in_train_mode(self, x):
    y = self.a(x)
    return (self.b(y), y) if self.training else self.b(y)


def read_by_others(self, x):
    y = self.a(x)
    return self.b(y) * F.relu(y if self.training else x).mean()


def other_rate(self, x):
    return self.b(F.dropout(self.a(x), 0.2 if self.training else 0.1, True))


def other_slice(self, x):
    return self.b(self.a(x)[:, :, (1 if self.training else 0) :])


def other_module(self, x):
    return self.b((self.a if self.training else self.c)(x))


def other_function(self, x):
    return self.b((F.relu if self.training else F.gelu)(self.a(x)))


def in_place(self, x):
    return self.b(F.relu(self.a(x), inplace=self.training))


def kept(self, x):
    y = self.a(x)
    if self.training:
        self.last = y
    return self.b(y)


def two_orders(self, x):
    first, second = (self.a, self.b) if self.training else (self.b, self.a)
    return first(x) + second(x)


def one_more(self, x):
    y = self.b(self.a(x))
    return F.relu(y) if self.training else y


def one_more_elsewhere(self, x):
    y = self.a(x)
    if self.training:
        F.relu(y)
    return self.b(y)


def made_inside(self, x):
    return self.b(self.a(x) + torch.full((), 1.0 if self.training else 2.0))


ALIKE = [dropped, dropped_by_name, only_asked]
UNLIKE = [
    *(read_in_train_mode, read_by_others, other_rate, other_slice, other_module, other_function, in_place, kept),
    *(two_orders, one_more, one_more_elsewhere, made_inside),
]


@pytest.mark.parametrize("forward", ALIKE + UNLIKE, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("inner", [False, True])
def test_flows_that_are_alike_give_the_same_runs(forward, inner, monkeypatch):
    """And what is found is the same as if both were looked at."""
    model = net(forward, **parts())
    if inner:
        model = nn.Sequential(nn.Conv2d(4, 4, 3), model, nn.ReLU(), nn.Conv2d(4, 4, 1))
    runs = linear_runs(model, example_inputs=torch.zeros(1, 4, 20, 20))
    monkeypatch.setattr("nmconv.finding.runs.same_flows", lambda one, other: False)
    assert linear_runs(model, example_inputs=torch.zeros(1, 4, 20, 20)) == runs


def test_what_train_mode_keeps_ends_a_run():
    runs = [run.convs for run in nmconv.find_runs(net(kept, **parts()).eval())]
    assert runs == []
    assert [run.convs for run in nmconv.find_runs(net(only_asked, **parts()).eval())] == [("a", "b")]


def test_a_model_that_only_eval_mode_runs():
    """In train mode nothing is known of it, so that nothing is a run in both."""

    def forward(self, x):
        if self.training:
            raise ValueError("no targets")
        return self.b(self.a(x))

    model = net(forward, **parts()).eval()
    assert nmconv.find_runs(model) == ()
