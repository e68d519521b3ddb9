"""Merging and folding: nothing changes beyond rounding, at no size, in no context, with no argument."""

from __future__ import annotations

import copy

import pytest
from torch import nn

import nmconv

from .all_networks import Network, params
from .judge import assert_merged, assert_untouched, attempt, calls, convolutions, quiet, refused, snapshot

pytestmark = pytest.mark.slow


def prepared(net: Network) -> nn.Module:
    return net.build(net.finest)


def merged(net: Network, model: nn.Module, reference: nn.Module, must: bool) -> nn.Module | None:
    """The model with all merged that can be, judged; None if that is refused."""
    before = snapshot(model)
    made = attempt(net, nmconv.merge, model, gate="always", inplace=not net.copies)
    if refused(net, made, must):
        return None
    assert_merged(net, reference, made)
    if must:
        call = calls(net, net.finest)[0]
        assert convolutions(made, call) < convolutions(reference, call), "nothing merged"
    if net.copies and reference is not model:
        assert_untouched(before, model, "model")  # what was made shares nothing with it
    return made


@pytest.mark.parametrize("net", params())
def test_merged_as_it_is(net: Network):
    merged(net, prepared(net), prepared(net), net.merges_plain)


@pytest.mark.parametrize("net", params())
def test_merged_after_converting_and_saved(net: Network, tmp_path):
    plan = attempt(net, nmconv.make_plan, prepared(net), keep="boundary", hoist_padding=True)
    if refused(net, plan, net.merges):
        return
    models = [attempt(net, nmconv.apply_plan, prepared(net), plan, inplace=True) for _ in range(2 - net.copies)]
    if refused(net, models[0], net.merges):
        return
    model, reference = models[0], models[-1]
    made = merged(net, model, reference, net.merges)
    if made is None or not net.copies:
        return
    made.load_state_dict(copy.deepcopy(made.state_dict()))
    with quiet():
        assert_merged(net, made, copy.deepcopy(made), brief=True)
    saved = attempt(net, nmconv.save, made, tmp_path / "net.safetensors")
    if not refused(net, saved, net.merges):
        loaded = attempt(net, nmconv.load, prepared(net), tmp_path / "net.safetensors")
        if not refused(net, loaded, net.merges):
            assert_merged(net, made, loaded, brief=True)


@pytest.mark.parametrize("net", params())
def test_runs_are_found_and_norms_folded(net: Network):
    model, reference = prepared(net), prepared(net)
    runs = attempt(net, nmconv.find_runs, model)
    if not refused(net, runs, net.merges_plain):
        assert all(run.convs for run in runs)
    made = attempt(net, nmconv.fold_norms, model, inplace=not net.copies)
    if not refused(net, made, False):
        assert_merged(net, reference, made)
