"""Converting: the result does what the original does less the calls dropped, or there is an error of nmconv's own."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
from torch import nn

import nmconv

from .all_networks import NETS, Network, params
from .judge import assert_converted, assert_same, assert_untouched, attempt, calls, refused, result_of, snapshot

pytestmark = pytest.mark.slow


def converted(net: Network, inplace: bool, **options):
    """The model that was handed in, how it was, and what became of it."""
    model = net.build()
    before = snapshot(model)
    return model, before, attempt(net, nmconv.convert, model, "2:1", inplace=inplace, **options)


@pytest.mark.parametrize("net", params())
def test_converted_and_saved(net: Network, tmp_path):
    model, before, made = converted(net, inplace=not net.copies)
    if refused(net, made, net.converts):
        return
    plan = nmconv.get_plan(made)
    if net.counts is not None:
        assert (plan.counts.activations_before, plan.counts.activations_after) == net.counts
    assert_converted(net, net.build(), made, plan)
    if net.copies:
        assert_untouched(before, model, "model")  # what was made shares nothing with it
        check_saved(net, made.eval(), tmp_path / "net.safetensors")


def check_saved(net: Network, made: nn.Module, path: Path) -> None:
    """Saved and loaded, and copied, it is what it was."""
    loaded = attempt(net, nmconv.save, made, path)
    if not refused(net, loaded, net.converts):
        loaded = attempt(net, nmconv.load, net.build(), path)
    if not refused(net, loaded, net.converts):
        copied, call = copy.deepcopy(made), calls(net)[0]
        wanted = result_of(made, call)
        assert wanted.error is None
        assert_same(result_of(loaded, call), wanted, "loaded")
        assert_same(result_of(copied, call), wanted, "a copy")


@pytest.mark.parametrize("net", params(lambda net: not net.copies))
def test_converted_as_a_copy_where_there_is_none(net: Network):
    """A lock, a closure, a weight that is computed: the copy is one, or cannot be made."""
    model, before, made = converted(net, inplace=False)
    if not refused(net, made, False):
        assert_converted(net, net.build(), made, nmconv.get_plan(made))
        assert_untouched(before, model, "model")


def test_a_model_that_cannot_be_guessed_is_not_said_to_have_nothing_to_give():
    """Fault L: that reading failed is no reason to say that every unit has few enough activations."""
    net = next(net for net in NETS if net.name == "hugging_face_without_examples")
    with warnings.catch_warnings():
        warnings.simplefilter("error", nmconv.NoEffectWarning)
        try:
            nmconv.convert(net.build(), keep="boundary")
        except nmconv.NmconvError as error:
            assert "example_inputs" in str(error)


def test_it_is_read_where_examples_are_given():
    """Fault L again: whether runs merge or not, its convolutions are there to be counted."""
    net = next(net for net in NETS if net.name == "hugging_face")
    examples = calls(net)[0].args
    plan = nmconv.get_plan(nmconv.convert(net.build(), example_inputs=examples, keep="boundary"))
    assert plan.counts.convs == 4
    assert not plan.untraced
