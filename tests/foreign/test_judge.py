"""The judge itself: it drops what it is told to, sees what is wrong, and leaves no trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .dropping import Dropping
from .judge import assert_converted, assert_untouched, snapshot
from .networks import Network, conv, image


def site(name, function=None, call=1):
    same = {"owner": "", "modes": "both", "action": "drop", "id": f"{name}:{function}#{call}"}
    return SimpleNamespace(name=name, function=function, call=call, train_call=call, **same)


class Mixed(nn.Module):
    """A module that is called twice, in-place, and two functional calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.r, self.seen = conv(3), conv(), nn.ReLU(inplace=True), []
        self.r.register_forward_hook(lambda module, args, output: self.seen.append(output.min().item()))
        self.dropped = set()

    def act(self, number, function, x):
        return x if number in self.dropped else function(x)

    def forward(self, x):
        x = self.act(1, self.r, self.a(x))
        x = self.act(2, F.relu, self.b(x))
        x = self.act(3, self.r, self.b(x))
        return self.act(4, torch.Tensor.relu_, self.b(x))


SITES = {1: site("r"), 2: site("", function="relu"), 3: site("r", call=2), 4: site("", function="relu", call=2)}
NET = Network("mixed", Mixed, image())


@pytest.mark.parametrize("numbers", [{1}, {2}, {3}, {4}, {1, 4}, {2, 3}, set()], ids=str)
def test_it_drops_what_it_is_told_to(numbers):
    by_hand = NET.build()
    by_hand.dropped = numbers
    plan = SimpleNamespace(sites=[SITES[number] for number in numbers])
    assert_converted(NET, NET.build(), by_hand, plan)


@pytest.mark.parametrize("numbers", [{1}, {2}, {3}, {4}], ids=str)
def test_it_sees_that_another_was_dropped(numbers):
    by_hand = NET.build()
    by_hand.dropped = {number % 4 + 1 for number in numbers}
    plan = SimpleNamespace(sites=[SITES[number] for number in numbers])
    with pytest.raises(AssertionError, match="apart"):
        assert_converted(NET, NET.build(), by_hand, plan)


def test_it_sees_that_there_is_no_such_call():
    with pytest.raises(AssertionError, match="no call is"):
        assert_converted(NET, NET.build(), NET.build(), SimpleNamespace(sites=[site("r", call=3)]))


def test_hooks_of_a_dropped_activation_see_what_it_was_given():
    model = NET.build()
    with Dropping(model, [SITES[1]]):
        model(torch.randn(1, 3, 8, 8))
    assert model.seen[0] < 0 <= model.seen[1]
    assert "forward" not in vars(model.r)


@pytest.mark.parametrize(
    "touch",
    [
        lambda model: model.a.weight.data.add_(1),
        lambda model: model.train(),
        lambda model: setattr(model, "r", nn.ReLU()),
        lambda model: model.seen.append(0.0),
        lambda model: model.b.register_forward_hook(print),
        lambda model: torch.rand(1),
        lambda model: setattr(model.a, "note", 1),
    ],
    ids=["weight", "mode", "module", "list", "hook", "generator", "attribute"],
)
def test_it_sees_what_was_touched(touch):
    model = NET.build()
    before = snapshot(model)
    assert_untouched(before, model)
    touch(model)
    with pytest.raises(AssertionError, match="touched"):
        assert_untouched(before, model)
