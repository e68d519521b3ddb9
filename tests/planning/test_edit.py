"""Edited plans."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import convs, net
from plan_nets import PLANS, kept, run_of, staged
from torch import nn

import nmconv
from nmconv import (
    NoEffectWarning,
    Plan,
    PlanError,
)


def test_edit():
    plan = nmconv.make_plan(staged(), keep="boundary")
    assert kept(plan) == "dKdKdK"
    new = plan.edit({"stem.1#1": "keep", plan.sites[1]: "drop"})
    assert kept(new) == "KddKdK"
    assert kept(plan) == "dKdKdK"
    assert new.counts.activations_after == 3
    assert (new.fingerprint, new.ratio, new.options) == (plan.fingerprint, plan.ratio, plan.options)
    assert "hand" in new.sites[0].reason
    assert new.sites[2:] == plan.sites[2:]
    converted = nmconv.apply_plan(staged(), new)
    assert [type(part[1]).__name__ for part in (converted.stem, converted.layer1)] != ["ReLU", "ReLU"]
    assert nmconv.get_plan(converted) == new


def test_edit_may_leave_a_unit_with_none_or_all():
    plan = nmconv.make_plan(staged(), keep="boundary")
    none = plan.edit(dict.fromkeys(plan.sites, "drop"))
    assert none.counts == nmconv.Counts(6, 6, 0, "2:1", "6:0")
    x = torch.randn(1, 4, 8, 8)
    model = staged()
    linear = nmconv.apply_plan(model, none)
    y = x
    for part in (model.stem, model.layer1, model.layer2):
        for layer in part:
            y = layer(y) if isinstance(layer, nn.Conv2d) else y
    assert torch.equal(linear(x), y)
    everything = plan.edit({site.id: "keep" for site in plan.sites})
    assert everything.counts.activations_after == 6
    with pytest.warns(NoEffectWarning):
        nmconv.apply_plan(staged(), everything)


def test_edits_that_are_nearly_right():
    plan = nmconv.make_plan(staged(), keep="boundary")
    site = plan.sites[0].id
    with pytest.raises(PlanError, match="map sites to actions"):
        plan.edit([(site, "keep")])
    with pytest.raises(PlanError, match=f"did you mean .*{site}"):
        plan.edit({site[:-1] + "7": "keep"})


def test_edit_of_a_moved_site_puts_it_back():
    plan = PLANS["moved"]
    site = plan.sites[1]
    assert site.action == "move"
    for action in ("keep", "drop"):
        new = plan.edit({site: action}).sites[1]
        assert (new.action, new.behind) == (action, "")


@pytest.mark.parametrize(
    "actions",
    [
        {"stem.1": "keep"},
        {"stem.1#2": "keep"},
        {"nowhere#1": "drop"},
        {"": "drop"},
        {3: "drop"},
        {None: "drop"},
        {"stem.1#1": "skip"},
        {"stem.1#1": "move"},
        {"stem.1#1": "Keep"},
        {"stem.1#1": None},
        {"stem.1#1": True},
        {"stem.1#1": "drop", "nowhere#1": "drop"},
    ],
    ids=str,
)
def test_edits_that_are_none(actions):
    plan = nmconv.make_plan(staged(), keep="boundary")
    with pytest.raises(PlanError):
        plan.edit(actions)


def test_edit_names_near_ids():
    with pytest.raises(PlanError, match=r"stem\.1#1"):
        nmconv.make_plan(staged(), keep="boundary").edit({"stem.1": "keep"})


def test_edit_of_a_site_that_is_skipped():
    model = nn.Sequential(run_of(2), nn.Flatten(), nn.Linear(4, 4), nn.ReLU())
    plan = nmconv.make_plan(model, example_inputs=torch.zeros(2, 4, 1, 1), keep="boundary")
    for action in ("keep", "drop"):
        with pytest.raises(PlanError, match="linear"):
            plan.edit({"3#1": action})


def test_edit_of_a_site_that_is_locked():
    """A method that stores attributes is not rewritten: what it calls cannot go, and the plan says so."""

    def forward(self, x):
        self.seen = x.shape
        return F.relu(self.c2(F.relu(self.c1(x))))

    plan = nmconv.make_plan(nn.Sequential(net(forward, **convs("c1 c2"), seen=None), run_of(2)), keep="boundary")
    site = plan.sites[0]
    assert site.locked and site.action == "keep"
    with pytest.raises(PlanError, match="cannot be dropped"):
        plan.edit({site: "drop"})
    assert plan.edit({site: "keep"}).sites[0].action == "keep"


def test_an_edited_plan_is_checked_like_any_other():
    plan = nmconv.make_plan(staged(), keep="boundary").edit({"stem.1#1": "keep"})
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError):
        nmconv.apply_plan(run_of(3), plan)
