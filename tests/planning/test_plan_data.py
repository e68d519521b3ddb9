"""The plan as data: JSON, text, counts, and files that are damaged."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import conv, convs, net
from plan_nets import PLANS, kept, label, run_of, staged, untouched
from torch import nn

import nmconv
from nmconv import (
    NmconvError,
    Plan,
    PlanError,
)


@pytest.mark.parametrize("name", PLANS)
def test_json_round_trip(name):
    plan = PLANS[name]
    for text in (plan.to_json(), json.dumps(json.loads(plan.to_json()), sort_keys=True)):
        again = Plan.from_json(text)
        assert again == plan
        assert hash(again) == hash(plan)
        assert again.to_json() == plan.to_json()
        assert str(again) == str(plan)
        assert again.counts == plan.counts


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_plain_frozen_data(name):
    plan = PLANS[name]

    def walk(value):
        if dataclasses.is_dataclass(value):
            assert type(value).__module__.startswith("nmconv.planning")
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, dataclasses.fields(value)[0].name, None)
            value = tuple(getattr(value, field.name) for field in dataclasses.fields(value) if field.compare)
        if isinstance(value, tuple):
            for part in value:
                walk(part)
        else:
            assert value is None or type(value) in (str, int, bool), value

    walk(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan
    assert len({site.id for site in plan.sites}) == len(plan.sites)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_reads_as_a_table(name):
    plan = PLANS[name]
    lines = str(plan).splitlines()
    assert plan.model in lines[0] and plan.counts.ratio_asked in lines[0] and plan.counts.ratio_reached in lines[0]
    for site in plan.sites:
        line = next(line for line in lines if line.split()[:1] == [site.id])
        assert site.action in line and site.reason in line and site.kind in line
    for part in plan.untraced:
        assert part.name in str(plan) and part.hint in str(plan)


def test_what_moved_counts_as_kept():
    plan = PLANS["moved"]
    assert kept(plan) == "dMK"
    assert plan.counts.activations_after == 2


def test_json_says_its_version_and_another_is_refused():
    data = json.loads(PLANS["plain"].to_json())
    version = data["nmconv_plan"]
    for other in (version + 1, 0, -1, None, "1", "x", [version], {}):
        with pytest.raises(PlanError, match="version"):
            Plan.from_json(json.dumps({**data, "nmconv_plan": other}))
    del data["nmconv_plan"]
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"plan"', "{}", '{"nmconv_plan": 1}', "\x00", "plan", None, 3, b"\xff", ["{}"]],
    ids=label,
)
def test_what_is_no_json_of_a_plan(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


WRONG = (None, 7, -1.5, True, "nonsense", [], ["x"], {}, {"x": 1}, [None], [[1]])


def _fits(field: str, good: Any, wrong: Any) -> bool:
    """Whether the wrong value is, by its type, one that the field could have."""
    if field in ("model", "fingerprint", "ratio", "name", "kind", "role", "reason", "hint"):
        return isinstance(wrong, str)
    if field in ("chain", "unit", "train_call"):
        return wrong is None or type(wrong) is int
    if field == "convs" and isinstance(good, list):
        return isinstance(wrong, list) and all(isinstance(part, str) for part in wrong)
    if field == "convs":
        return type(wrong) is int
    if field == "call":
        return wrong is None
    if field == "behind":
        return isinstance(wrong, str) and bool(wrong)
    return field in ("sites", "untraced", "options") and wrong == []


def _damaged() -> list[tuple[str, str, Any]]:
    moved, untraced = (json.loads(PLANS[name].to_json()) for name in ("moved", "untraced"))
    found = [("plan", key, value) for key in moved if key != "nmconv_plan" for value in WRONG]
    found += [("site", key, value) for key in moved["sites"][1] for value in WRONG]
    found += [("call", key, value) for key in ("args", "kwargs") for value in WRONG]
    found += [("tensor", key, value) for key in ("shape", "dtype") for value in WRONG]
    found += [("untraced", key, value) for key in untraced["untraced"][0] for value in WRONG]
    return found


def _part(data: dict[str, Any], where: str) -> dict[str, Any]:
    return {
        "plan": lambda: data,
        "site": lambda: data["sites"][1],
        "call": lambda: data["call"],
        "tensor": lambda: data["call"]["args"][0],
        "untraced": lambda: data["untraced"][0],
    }[where]()


def _fits_a_call(field: str, wrong: Any) -> bool:
    """The same within the call: arguments are lists of anything plain, and a dtype is looked up when it is needed."""
    if field == "args":
        return isinstance(wrong, list)
    return (
        (field == "kwargs" and wrong in ({}, {"x": 1}))
        or (field == "shape" and wrong == [])
        or (field == "dtype" and isinstance(wrong, str))
    )


def test_damaged_plans_are_refused():
    """Every field in turn is given values of other types: each is refused, by the library's own error."""
    accepted, crashed = [], []
    for where, field, value in _damaged():
        data = json.loads(PLANS["untraced" if where == "untraced" else "moved"].to_json())
        part = _part(data, where)
        inside = where in ("call", "tensor")
        if (_fits_a_call(field, value) if inside else _fits(field, part[field], value)) or part.get(field) == value:
            continue
        part[field] = value
        try:
            Plan.from_json(json.dumps(data))
            accepted.append((where, field, value))
        except PlanError:
            pass
        except Exception as error:
            crashed.append((where, field, value, repr(error)))
    assert not crashed
    assert not accepted


def test_damaged_plans_lack_nothing_and_have_nothing_more():
    usual = {"convs", "role", "chain", "unit", "call", "untraced"}  # what a site or a plan need not have
    for where in ("plan", "site", "untraced"):
        text = PLANS["untraced" if where == "untraced" else "moved"].to_json()
        for key in _part(json.loads(text), where):
            data = json.loads(text)
            del _part(data, where)[key]
            if key in usual and (where, key) != ("plan", "convs"):
                continue
            with pytest.raises(PlanError):
                Plan.from_json(json.dumps(data))
        data = json.loads(text)
        _part(data, where)["more"] = 1
        with pytest.raises(PlanError):
            Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("action", value) for value in ("DROP", "", "move")),
        *(("site", value) for value in ("stem.1", "stem.1#x", "")),
        ("modes", "all"),
        ("behind", "stem.0"),
        ("name", "stem.1"),
        ("owner", "stem"),
        ("locked", "it is so"),
    ],
)
def test_words_that_no_plan_has(field, value):
    data = json.loads(PLANS["plain"].to_json())
    assert data["sites"][0]["action"] == "drop"
    data["sites"][0][field] = value
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "call",
    [
        {"args": [{"shape": [10**12]}]},
        {"args": [{"shape": [1] * 100}]},
        {"args": [{"shape": [1.5]}]},
        {"args": [{"shape": [1], "more": 1}]},
        {"args": [{"tuple": 3}]},
        {"args": [{"list": []}]},
        {"args": [10**12]},
        {"args": [[[[[[[[[[[[1]]]]]]]]]]]]},
        {"args": [0] * 100},
        {"args": [], "more": 1},
    ],
    ids=label,
)
def test_calls_that_no_model_has(call):
    data = json.loads(PLANS["plain"].to_json())
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps({**data, "call": call}))


def test_a_call_says_what_it_was():
    """What can be said of the arguments comes back; the model's own dtype is no part of it."""

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.r, self.b, self.s = conv(), nn.ReLU(), conv(), nn.ReLU()

        def forward(self, x, pair, options, scale=1.0, mode="max", flag=None):
            x = x + pair[1].to(x.dtype)[:, None, None, None]
            return self.s(self.b(self.r(self.a(x)))) * options["size"][0] * scale

    given = {"x": torch.zeros(2, 4, 8, 8), "pair": (3, torch.zeros(2, dtype=torch.int64)), "options": {"size": [1, 2]}}
    given |= {"scale": 2.0, "mode": "min", "flag": True}
    plan = nmconv.make_plan(Called(), "2:1", example_inputs=given, keep="boundary")
    again = Plan.from_json(plan.to_json())
    assert again.call == plan.call and again == plan
    assert json.loads(plan.to_json())["call"]["kwargs"]["x"] == {"shape": [2, 4, 8, 8]}
    assert json.loads(plan.to_json())["call"]["kwargs"]["pair"]["tuple"][1] == {"shape": [2], "dtype": "int64"}
    assert nmconv.get_plan(nmconv.apply_plan(Called(), again)) == plan  # no guess could call it
    assert nmconv.get_plan(nmconv.apply_plan(Called().double(), again, witness=False)) == plan
    more = dataclasses.replace(plan, call=None)
    assert more == plan and hash(more) == hash(plan)
    with pytest.raises(nmconv.OptionError):
        nmconv.apply_plan(Called(), more)
    assert nmconv.get_plan(nmconv.apply_plan(Called(), more, example_inputs=given)) == plan


def test_example_inputs_win_over_the_call():
    model = staged()
    plan = nmconv.make_plan(model, keep="boundary")
    strange = dataclasses.replace(plan, call=nmconv.planning.Signature((nmconv.planning.TensorSpec((1, 9, 8, 8)),), {}))
    with pytest.raises(PlanError, match=r"9, 8, 8.*the one that the plan states"):
        nmconv.apply_plan(model, strange)
    assert nmconv.get_plan(nmconv.apply_plan(model, strange, example_inputs=torch.zeros(1, 4, 8, 8))) == plan
    odd = dataclasses.replace(
        plan, call=nmconv.planning.Signature((nmconv.planning.TensorSpec((1, 4, 8, 8), "no"),), {})
    )
    with pytest.raises(PlanError, match="'no', which torch does not have"):
        nmconv.apply_plan(model, odd)


def test_a_page_that_people_read():
    text = nmconv.make_plan(timm.create_model("resnet18"), "2:1", keep="boundary").to_json()
    assert len(text) < 6000
    assert len([line for line in text.splitlines() if line.startswith('  {"site": ')]) == 17
    edited = text.replace(
        '{"site": "layer1.0.act1#1", "action": "drop"', '{"site": "layer1.0.act1#1", "action": "keep"'
    )
    assert edited != text
    converted = nmconv.apply_plan(timm.create_model("resnet18"), Plan.from_json(edited))
    assert isinstance(converted.layer1[0].act1, nn.ReLU) and isinstance(converted.layer1[1].act1, nn.Identity)


def test_a_plan_of_an_older_version_names_both_versions_and_the_way_out():
    old = json.dumps({"nmconv_plan": 4, "model": "Net"})
    with pytest.raises(PlanError, match=r"version 4.*reads 5.*nmconv\.make_plan"):
        Plan.from_json(old)


def test_a_site_twice_is_damage():
    data = json.loads(PLANS["plain"].to_json())
    data["sites"].append(data["sites"][0])
    with pytest.raises(PlanError, match="twice"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "position", "changes"),
    [
        ("plain", 0, {"site": "nowhere.relu#1"}),
        ("plain", 0, {"site": "stem.0#1"}),
        ("plain", 0, {"site": "#1"}),
        ("plain", 0, {"site": "stem.1#1@nowhere"}),
        ("plain", 0, {"site": "stem.1#7"}),
        ("plain", 0, {"site": "stem.1#1(train)"}),
        ("functional", 0, {"site": "nowhere:relu#1"}),
        ("functional", 0, {"site": ":relu#7"}),
        ("functional", 0, {"site": ":silu#1"}),
        ("functional", 0, {"site": ":__class__#1"}),
        ("moved", 1, {"behind": "nowhere"}),
        ("moved", 1, {"behind": "0.0"}),
        ("moved", 1, {"behind": "__class__"}),
    ],
    ids=str,
)
def test_a_plan_that_names_what_the_model_has_not_changes_nothing(name, position, changes):
    """The fingerprint is right, the content is not: an error of the library's own, and the model as it was."""
    models = {
        "plain": staged(),
        "functional": net(lambda self, x: F.relu(self.c2(F.relu(self.c1(x)))), **convs("c1 c2")),
        "moved": nn.Sequential(run_of(2), conv(), nn.MaxPool2d(2), conv(), nn.ReLU()),
    }
    model = models[name]
    data = json.loads(PLANS[name].to_json())
    data["sites"][position].update(changes)
    before = untouched(model)
    for inplace in (False, True):
        with pytest.raises(NmconvError):
            nmconv.apply_plan(model, Plan.from_json(json.dumps(data)), inplace=inplace)
        assert untouched(model) == before
