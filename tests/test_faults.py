"""Faults found on networks that nobody here wrote: each in one small network, judged by the test's own computation."""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
import importlib.util
import io
import json
import linecache
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import conv, net, skipped
from torch import Tensor, nn

import nmconv

torch.manual_seed(0)
X = torch.randn(2, 4, 12, 12)


def same(model: nn.Module, expected: Tensor, *args: Tensor, **kwargs: object) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(*(args or (X,)), **kwargs), expected)


def actions(model: nn.Module) -> dict[str, str]:
    plan = nmconv.get_plan(model)
    assert plan is not None
    return {site.id: site.action for site in plan.sites}


# -- H: settings that are no plain numbers --------------------------------------------------------------------------------

Setting = namedtuple("Setting", "scale name")
Other = namedtuple("Other", "scale name")


class Mode(enum.Enum):
    DOUBLE = 2
    TRIPLE = 3


@dataclasses.dataclass
class Record:
    scale: float


class Scaled(nn.Module):
    """Two convolutions that share an activation, so that the forward is rewritten, and a setting that it reads."""

    def __init__(self, cfg: object) -> None:
        super().__init__()
        self.c1, self.c2, self.act, self.cfg = conv(), conv(), nn.ReLU(), cfg

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.c2(self.act(self.c1(x)) * self.cfg.scale))


class Moded(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.c2(self.act(self.c1(x)) * (2.0 if self.cfg is Mode.DOUBLE else 3.0)))


SETTINGS = {
    "namedtuple": lambda: Scaled(Setting(2.5, "a")),
    "nan in it": lambda: Scaled(Setting(2.5, float("nan"))),
    "dataclass": lambda: Scaled(Record(2.5)),
    "enum": lambda: Moded(Mode.TRIPLE),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_of_other_kinds_are_read_in_a_rewritten_block(kind):
    model = SETTINGS[kind]().eval()
    scale = 3.0 if kind == "enum" else 2.5
    with torch.no_grad():
        expected = F.relu(model.c2(model.c1(X) * scale))
    made = nmconv.convert(model, "2:1")
    assert actions(made) == {"act#1": "drop", "act#2": "keep"}
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False)):
        same(one, expected)


def test_a_setting_that_changes_later_is_noticed():
    for made, other in (
        (nmconv.convert(Scaled(Setting(2.5, "a"))), Setting(3.0, "a")),
        (nmconv.convert(Scaled(Setting(2.5, "a"))), Other(2.5, "a")),
        (nmconv.convert(Moded(Mode.TRIPLE)), Mode.DOUBLE),
    ):
        made.cfg = other
        with pytest.raises(nmconv.RewriteError, match=r"self\.cfg"):
            made(X)


def test_settings_that_are_equal_and_of_other_types_are_told_apart():
    one, two = Setting(2.0, "a"), Setting(2, "a")
    for cfg in (one, two, Other(2, "a"), Setting(2.0, "a")):
        made = nmconv.convert(Scaled(cfg).eval(), "2:1")
        made(X)  # raises if it was written for another's


# -- S: rewritten classes go ----------------------------------------------------------------------------------------------


def test_rewritten_classes_and_their_sources_go_with_the_last_model():
    def sources() -> set[str]:
        gc.collect()
        return {name for name in linecache.cache if name.startswith("<nmconv ")}

    def made() -> type:
        model = nmconv.convert(Scaled(Setting(7.25, "gone")).eval(), "2:1")
        nmconv.find_runs(model)
        model(X)
        assert len(sources() - before) == 1, "its source shows in tracebacks"
        return type(model)

    before = sources()
    count = len(Scaled.__subclasses__())
    assert made().__name__ == "Scaled"
    assert sources() == before
    assert len(Scaled.__subclasses__()) == count


def test_models_that_are_rewritten_alike_share_a_class():
    one, two = (nmconv.convert(Scaled(Setting(2.5, "a")), "2:1") for _ in range(2))
    assert type(one) is type(two) is type(copy.deepcopy(one))


# -- P: source is believed if it is that of the code ----------------------------------------------------------------------

EARLY = """
from torch import nn


class Early(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)

    def forward(self, x, stop=False):
        y = self.a(x)
        if stop:
            return y
        return self.b(y)


class Straight(Early):
    def forward(self, x):
        y = self.a(x)
        return self.b(y)
"""


def loaded(path, text):
    path.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def never_wrong(model: nn.Module) -> int:
    """How many convolutions a merged model has: it gives what the original does, or an error of the library's own."""
    model = model.eval()
    with torch.no_grad():
        expected = model(X), model(X, stop=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        fast = nmconv.merge(model, gate="always")
    for wanted, options in zip(expected, ({}, {"stop": True}), strict=True):
        try:
            with torch.no_grad():
                found = fast(X, **options)
        except nmconv.NmconvError:
            continue
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    return sum(isinstance(part, nn.Conv2d) for part in fast.modules())


@pytest.mark.parametrize("before", ["# new\n" * 9, "# new\n" * 3, ""])
def test_a_file_that_has_changed_since_it_was_imported_is_not_believed(tmp_path, before):
    path = tmp_path / "early_exit_of_a_file_that_changes.py"
    module = loaded(path, EARLY)
    path.write_text(before + path.read_text())
    linecache.checkcache()
    assert never_wrong(module.Early()) == 2


def test_a_file_whose_exit_has_gone_is_not_believed(tmp_path):
    path = tmp_path / "early_exit_that_is_gone.py"
    module = loaded(path, EARLY)
    path.write_text(EARLY.replace("if stop:\n            return y", "pass\n"))
    linecache.checkcache()
    assert never_wrong(module.Early()) == 2


@pytest.mark.parametrize(
    "body",
    [
        "if stop: return y",
        "y = y * 2 if stop else y",
        "for _ in range(int(stop)): y = y * 2",
        "y = (lambda: y * 2 if stop else y)()",
        "y = sum([y for _ in range(1 + stop)])",
    ],
)
def test_classes_without_source_are_merged_up_to_where_they_may_turn(body):
    space = {"__name__": __name__}
    exec(EARLY.replace("if stop:\n            return y", body), space)  # no file has this
    assert never_wrong(space["Early"]()) == 2


def test_classes_without_source_that_go_straight_on_are_merged():
    space = {"__name__": __name__}
    exec(EARLY, space)
    model = space["Straight"]().eval()
    with torch.no_grad():
        expected = model(X)
    fast = nmconv.merge(model, gate="always")
    same(fast, expected)
    assert sum(isinstance(part, nn.Conv2d) for part in fast.modules()) == 1


def test_a_wrapper_that_takes_anything_may_turn_off():
    def skipping(forward):
        def wrapped(*args, **options):
            return args[0].a(args[1]) if options.get("stop") else forward(*args)

        wrapped.__wrapped__ = forward
        return wrapped

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), nn.Conv2d(4, 4, 3)

        @skipping
        def forward(self, x):
            return self.b(self.a(x))

    assert never_wrong(Wrapped()) == 2


# -- I: activations on parameters -----------------------------------------------------------------------------------------


class Weighted(nn.Module):
    """BiFPN's fast normalised fusion, with a module or a function on the weights."""

    def __init__(self, act: object, weights_act: object) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = conv(), conv(), conv()
        self.relu, self.weights_act = act, weights_act
        self.w = nn.Parameter(torch.tensor([-1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights_act(self.w)
        return self.relu(self.c3(self.relu(self.c2(self.relu(self.c1(x))) * (w[1] + w[0]))))


@pytest.mark.parametrize("kind", ["shared", "own", "function"])
def test_an_activation_on_a_parameter_is_no_site(kind):
    act = nn.ReLU()
    model = Weighted(act, {"shared": act, "own": nn.ReLU(), "function": F.relu}[kind]).eval()
    made = nmconv.convert(model, "3:1")
    with torch.no_grad():  # the weight -1 stays cut off
        expected = F.relu(model.c3(model.c2(model.c1(X)) * 0.5))
    same(made, expected)
    found = actions(made)
    assert sorted(found.values()) == ["drop", "drop", "keep", "skip"]
    name = next(name for name, action in found.items() if action == "skip")
    assert "parameter" in skipped(nmconv.get_plan(made), name)


def test_an_activation_on_a_tensor_made_from_sizes_is_no_site():
    def forward(self, x):
        return self.relu(self.c2(self.relu(self.c1(x)))) * self.relu(torch.ones(x.shape[1]) - 2).sum()

    made = nmconv.convert(net(forward, c1=conv(), c2=conv(), relu=nn.ReLU()).eval(), "2:1")
    same(made, torch.zeros_like(X))  # the third call is made all the same
    assert sorted(actions(made).values()) == ["drop", "keep", "skip"]


def test_convolutions_and_norms_of_parameters_do_not_lose_the_model():
    def forward(self, x):
        places = self.norm(self.position(self.table))
        return self.r2(self.c2(self.r1(self.c1(x)))) + places

    model = net(
        forward,
        table=torch.randn(1, 4, 12, 12),
        **{name: conv() for name in ("position", "c1", "c2")},
        norm=nn.BatchNorm2d(4),
        r1=nn.ReLU(),
        r2=nn.ReLU(),
    ).eval()
    made = nmconv.convert(model, "2:1")
    with torch.no_grad():
        expected = F.relu(model.c2(model.c1(X))) + model.norm(model.position(model.table))
    assert actions(made) == {"r1#1": "drop", "r2#1": "keep"}
    same(made, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        same(nmconv.fold_norms(made), expected)


# -- K: branches that end in anything -------------------------------------------------------------------------------------

ENDS = {
    "slice": lambda self, p: torch.cat([p, self.b(p)], 1)[:, :4],
    "number": lambda self, p: self.b(p) / 2,
    "number in front": lambda self, p: 2 - self.b(p),
    "operator": lambda self, p: -self.b(p),
    "sizes before": lambda self, p: torch.cat([p, self.b(p)], 1)[:, : p.shape[1]],
}


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("kind", ENDS)
def test_a_residual_branch_may_end_in_anything(kind, flipped):
    end = ENDS[kind]

    def forward(self, x):
        y = end(self, self.act(self.a(x)))
        x = y + x if flipped else x + y
        return self.head(self.act(self.last(x)).mean((2, 3)))

    parts = {"a": conv(), "b": conv(), "last": conv(), "act": nn.ReLU(), "head": nn.Linear(4, 5)}
    model = net(forward, **parts).eval()
    images = torch.randn(16, 4, 12, 12)
    table = nmconv.sensitivity(model, images, quiet=True)
    (branch,) = [one for one in table.candidates if one.size == "none"]
    assert branch.convs == ("a", "b")
    held = images[3::4]
    with torch.no_grad():
        wanted = model(held).double().log_softmax(1)
        found = model.head(F.relu(model.last(held)).mean((2, 3))).double().log_softmax(1)
        loss = (wanted.exp() * (wanted - found)).sum(1).mean()
    assert branch.loss == pytest.approx(float(loss), rel=1e-3)
    plan = nmconv.search(model, images, budget=0.5, cost="multiply_adds", sensitivity=table, quiet=True)
    nmconv.fit(nmconv.apply_plan(model, plan), images, reference=model)


# -- L: forwards that require nothing -------------------------------------------------------------------------------------


class Optional(nn.Module):
    """What models of Hugging Face look like."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.relu, self.other = conv(), conv(), nn.ReLU(), nn.ReLU()

    def forward(self, pixel_values=None, labels=None, return_dict=True):
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        y = self.other(self.c2(self.relu(self.c1(pixel_values))))
        return {"logits": y} if return_dict else (y,)


def test_a_forward_without_required_arguments_is_given_the_image():
    model = Optional().eval()
    assert actions(nmconv.convert(model, "2:1")) == {"relu#1": "drop", "other#1": "keep"}
    assert len(nmconv.find_runs(nmconv.convert(model, "2:1"))) == 1
    inner = nn.Sequential(conv(), nn.ReLU(), model)  # the argument is what it is called with
    with torch.no_grad():
        expected = F.relu(model.c2(model.c1(F.relu(inner[0](X)))))
    assert actions(made := nmconv.convert(inner, {"2": "2:1", "*": None})) == {
        "1#1": "keep", "2.relu#1": "drop", "2.other#1": "keep",
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(made(X)["logits"], expected)
