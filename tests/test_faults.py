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
