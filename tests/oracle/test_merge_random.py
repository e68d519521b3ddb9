"""Random nets, converted and merged: hypothesis draws the source of modules as test_random_nets does.

Outputs, what becomes of the input, and buffers must be those of the model that was merged, in float64; a second size
was not known when it was merged. Nothing of the original may change.
"""

import copy
import os
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from merge_nets import BATCH, assert_near, counts, merge, picture, settle

import nmconv
from oracle.test_random_nets import build, quiet, sources

torch.set_num_threads(1)
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
SIZES = ((6, 6), (7, 5), (1, 2))


def ran(model, size):
    """Output and input after one forward; None where it does not run on this size."""
    x = picture(4, *size)
    with torch.no_grad():
        try:
            return model(x), x
        except (RuntimeError, TypeError, ValueError):
            return None


X = picture(4, 6, 6)


def check(source, ratio, hoist, gate, live):
    model = settle(build(source))
    if ran(copy.deepcopy(model), SIZES[0]) is None:
        event("x.float() before a convolution in float64")
        return
    if ratio is not None:
        try:
            model = quiet(nmconv.convert, model, ratio, hoist_padding=hoist, example_inputs=X)
        except (nmconv.NoSitesError, nmconv.RewriteError):
            event("not converted")
    model.eval()
    wanted = [ran(copy.deepcopy(model), size) for size in SIZES]
    assert wanted[0] is not None
    before = copy.deepcopy(model.state_dict())
    merged = merge(model, gate=gate, live=live, example_inputs=X)
    event("merged" if nmconv.get_merges(merged) else "nothing merged")
    kinds = [merged, pickle.loads(pickle.dumps(merged))]
    if live:
        assert list(merged.state_dict()) == list(before)
        kinds.append(merge(merged, example_inputs=X))
    for size, expected in zip(SIZES, wanted, strict=True):
        if expected is None:
            continue
        for each in kinds:
            found = ran(each, size)
            assert found is not None
            assert_near(found[0], expected[0], 1e-9)
            assert_near(found[1], expected[1], 1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    one, other = counts(merged, picture(4, 6, 6, batch=BATCH)), counts(copy.deepcopy(model), picture(4, 6, 6))
    assert one.convs <= other.convs and one.norms <= other.norms
    for run in nmconv.find_runs(model, example_inputs=X):
        assert run.exact or run.why
    folded = nmconv.fold_norms(model, example_inputs=X)
    for size, expected in zip(SIZES, wanted, strict=True):
        if expected is not None:
            assert_near(ran(folded, size), expected, 1e-9)


examples = given(
    source=sources(),
    ratio=st.sampled_from((None, "2:1", "3:1", "100:1", "100:1")),
    hoist=st.booleans(),
    gate=st.sampled_from(("always", "always", "multiply_adds")),
    live=st.booleans(),
)


@pytest.mark.filterwarnings("ignore::nmconv.NoEffectWarning")
@settings(max_examples=60, derandomize=True, **COMMON)
@examples
def test_random_nets_merge_to_the_same(source, ratio, hoist, gate, live):
    check(source, ratio, hoist, gate, live)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("NMCONV_EXAMPLES", "2000")), print_blob=True, **COMMON)
@examples
def test_many_random_nets_merge_to_the_same(source, ratio, hoist, gate, live):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        check(source, ratio, hoist, gate, live)
