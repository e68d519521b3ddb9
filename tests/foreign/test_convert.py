"""Converting: the result does what the original does less the calls dropped, or there is an error of nmconv's own."""

from __future__ import annotations

import copy
import warnings

import pytest

import nmconv

from .all_networks import NETS, Network, params
from .judge import assert_converted, assert_same, assert_untouched, attempt, calls, quiet, refused, result_of, snapshot


def converted(net: Network, inplace: bool, **options):
    """The model that was handed in, how it was, and what became of it."""
    model = net.build()
    before = snapshot(model)
    return model, before, attempt(net, nmconv.convert, model, "2:1", inplace=inplace, **options)


@pytest.mark.parametrize("net", params())
def test_converted(net: Network):
    model, before, made = converted(net, inplace=not net.copies)
    if refused(net, made, net.converts):
        return
    plan = nmconv.get_plan(made)
    if net.counts is not None:
        assert (plan.counts.activations_before, plan.counts.activations_after) == net.counts
    assert_converted(net, net.build(), made, plan)
    if net.copies:
        assert_untouched(before, model, "model")  # what was made shares nothing with it


@pytest.mark.parametrize("net", params(lambda net: not net.copies))
def test_converted_as_a_copy_where_there_is_none(net: Network):
    """A lock, a closure, a weight that is computed: the copy is one, or cannot be made."""
    model, before, made = converted(net, inplace=False)
    if not refused(net, made, False):
        assert_converted(net, net.build(), made, nmconv.get_plan(made))
        assert_untouched(before, model, "model")


@pytest.mark.parametrize("net", params(lambda net: net.copies))
def test_a_plan_applied_in_place_spread_and_saved(net: Network, tmp_path):
    plan = attempt(net, nmconv.make_plan, net.build(), "3:1", keep="first")
    if refused(net, plan, net.converts):
        return
    made = attempt(net, nmconv.apply_plan, net.build(), plan, inplace=True)
    if refused(net, made, net.converts):
        return
    assert_converted(net, net.build(), made, plan, brief=True)
    saved = attempt(net, nmconv.save, made, tmp_path / "net.safetensors")
    if refused(net, saved, net.converts):
        return
    loaded = attempt(net, nmconv.load, net.build(), tmp_path / "net.safetensors")
    if refused(net, loaded, net.converts):
        return
    made.eval()
    call = calls(net)[0]
    wanted = result_of(made, call)
    assert wanted.error is None
    assert_same(result_of(loaded, call), wanted, "loaded")
    with quiet():
        assert_same(result_of(copy.deepcopy(made), call), result_of(made, call), "a copy")


def test_a_model_that_cannot_be_guessed_is_not_said_to_have_nothing_to_give():
    """Fault L: that reading failed is no reason to say that every unit has few enough activations."""
    net = next(net for net in NETS if net.name == "hugging_face_without_examples")
    with warnings.catch_warnings():
        warnings.simplefilter("error", nmconv.NoEffectWarning)
        for make in (nmconv.convert, lambda model: nmconv.merge(nmconv.convert(model), gate="always")):
            try:
                make(net.build())
            except nmconv.NmconvError as error:
                assert "example_inputs" in str(error)
