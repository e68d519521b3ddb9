"""Networks and judges for the tests of plans."""

from __future__ import annotations

import random
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import conv, convs, net
from torch import nn
from zoo import models as zoo

import nmconv
from nmconv import (
    NmconvError,
    Plan,
)


def label(value: Any) -> str | None:
    """A parameter's id without addresses in it: every worker must give it the same."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def run_of(count: int) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(count) for part in (conv(), nn.ReLU())))


def staged() -> nn.Sequential:
    """One chain of six convs in three places: stem.0, layer1.0, .2, layer2.0, .2, .4."""
    return nn.Sequential(OrderedDict(stem=run_of(1), layer1=run_of(2), layer2=run_of(3)))


def kept(plan: Plan) -> str:
    """One letter per site: K, d, M, s."""
    letters = {"keep": "K", "drop": "d", "move": "M", "skip": "s"}
    return "".join(letters[site.action] for site in plan.sites)


def untouched(model: nn.Module) -> Any:
    """Everything about a model that a call could change: classes, attributes, containers, tensors, random states."""

    def seen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return id(value), value._version, value.requires_grad, value.detach().clone().flatten().tolist()
        if isinstance(value, dict):
            return type(value), [(key, id(part), seen(part)) for key, part in value.items()]
        if isinstance(value, (list, tuple, set)):
            return type(value), [(id(part), seen(part)) for part in value]
        return id(value) if isinstance(value, nn.Module) else repr(value)

    return (
        [(name, id(module), type(module), seen(module.__dict__)) for name, module in model.named_modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
        nn.Module.__call__,
        nn.Module.__getattr__,
        "training" in vars(nn.Module),
    )


CALLS = {
    "make_plan": nmconv.make_plan,
    "convert": nmconv.convert,
    "convert in-place": lambda *args, **options: nmconv.convert(*args, inplace=True, **options),
}


def refused(error: type[Exception], model: nn.Module, *args: Any, match: str | None = None, **options: Any) -> None:
    """All three calls raise the error and leave the model as it was."""
    before = untouched(model)
    for call in CALLS.values():
        with pytest.raises(error, match=match) as caught:
            call(model, *args, **options)
        assert isinstance(caught.value, NmconvError)
        assert str(caught.value)
        assert untouched(model) == before


def zoo_of_plans() -> dict[str, Plan]:
    def middle(unit):
        return [0]

    def aux(self, x):
        x = self.relu(self.c1(x))
        side = self.relu(self.c3(x)) if self.training else x
        return self.relu(self.c2(x)), side

    def broken(self, x):
        if self.training:
            raise ValueError("no targets")
        return -x

    # three convs, two activations, then one more conv: something to move
    to_move = nn.Sequential(run_of(2), conv(), nn.MaxPool2d(2), conv(), nn.ReLU())
    return {
        "plain": nmconv.make_plan(staged(), keep="boundary"),
        "mapping": nmconv.make_plan(staged(), {"layer1": None, "*": "3:1"}, keep="boundary"),
        "patterns": nmconv.make_plan(staged(), include=["layer1", "layer2"], exclude="layer2.0", keep="boundary"),
        "function": nmconv.make_plan(staged(), keep=middle),
        "moved": nmconv.make_plan(to_move, "3:1", relocate=True, keep="boundary"),
        "functional": nmconv.make_plan(
            net(lambda self, x: F.relu(self.c2(F.relu(self.c1(x)))), **convs("c1 c2")), keep="boundary"
        ),
        "train": nmconv.make_plan(net(aux, **convs("c1 c2 c3"), relu=nn.ReLU()), keep="boundary"),
        "untraced": nmconv.make_plan(nn.Sequential(staged(), net(broken), run_of(2)), keep="boundary"),
        "resnet": nmconv.make_plan(zoo.build("torchvision/resnet18", "meta"), keep="boundary"),
        "edited": nmconv.make_plan(staged(), keep="boundary").edit({"stem.1#1": "keep"}),
    }


PLANS = zoo_of_plans()
