"""Merged runs against the sequential net, borders included: pairs and runs of any convolutions, drawn by hypothesis.

``merge_nets.verdict`` says in the issue's words which runs must become one convolution and which must be left alone;
what they compute must be the same in every case, at sizes that merging was not told of.
"""

import dataclasses
import itertools
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from merge_nets import (
    CONV,
    assert_agree,
    assert_near,
    convs_of,
    counts,
    fewest,
    inputs_of,
    merge,
    picture,
    runs,
    settle,
    shapes_for,
    steps,
    verdict,
    verdict_of_run,
)
from torch import nn

import nmconv

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
QUICK = settings(max_examples=20, derandomize=True, **COMMON)
SLOW = settings(max_examples=int(os.environ.get("NMCONV_EXAMPLES", "1500")), print_blob=True, **COMMON)


def plain(value):
    """Whether a value is plain frozen data."""
    return isinstance(value, (str, int, float, bool, type(None))) or (
        isinstance(value, tuple) and all(map(plain, value))
    )


def check_runs(net, judged, example):
    """``find_runs`` says why what must be left alone is left alone, and no more than that."""
    found = nmconv.find_runs(net, example_inputs=example, witness=False)
    assert found == nmconv.find_runs(net, example_inputs=example, witness=False)
    for run in found:
        assert all(plain(getattr(run, field.name)) for field in dataclasses.fields(run))
        assert all(isinstance(net.get_submodule(name), CONV) for name in run.convs)
        assert run.exact or run.why
    if judged == "refuse":
        assert any(len(run.why.split()) > 2 and not run.exact for run in found)
    if judged == "merge":
        names = tuple(name for name, module in net.named_modules() if isinstance(module, CONV))
        whole = [run for run in found if run.convs == names]
        assert len(whole) == 1
        assert whole[0].exact or not isinstance(net[0], CONV)  # what leads a run in may not be folded
        assert not whole[0].exact or (whole[0].why == "") == (whole[0].merges == (names,))
        assert whole[0].gain == pytest.approx(whole[0].multiply_adds / whole[0].merged_multiply_adds)


def check_always(data, net, rank):
    found = steps(net)
    judged = verdict_of_run(found)
    shapes = shapes_for(data.draw, net, rank)
    example = torch.zeros(1, *shapes[0], dtype=next(net.parameters()).dtype)
    check_runs(net, judged, example)
    merged = merge(net, example_inputs=example, witness=False)
    assert assert_agree(merged, net, *shapes)
    before, after = convs_of(net, *shapes[0]), convs_of(merged, *shapes[0])
    least, most = fewest(found)
    event(f"{len(found)} convs become {least} to {most}")
    assert before == len(found)
    assert least <= after <= most, "what must merge, or what must not"


@pytest.mark.parametrize("rank", [1, 2, 3])
@QUICK
@given(st.data())
def test_a_pair(rank, data):
    check_always(data, data.draw(runs(rank)), rank)


@pytest.mark.parametrize("rank", [1, 2, 3])
@QUICK
@given(st.data())
def test_a_run_of_three_to_five(rank, data):
    check_always(data, data.draw(runs(rank, 3, 5)), rank)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
@SLOW
@given(st.data())
def test_many_runs(rank, data):
    check_always(data, data.draw(runs(rank, 2, 5)), rank)


@pytest.mark.parametrize("rank", [1, 2, 3])
@settings(QUICK, max_examples=25)
@given(st.data())
def test_the_gate_never_lets_through_what_costs_more(rank, data):
    """On a large picture, where borders hardly count, the multiply-adds that ran are fewer, or nothing was merged."""
    net = data.draw(runs(rank, 2, 4))
    shapes = shapes_for(data.draw, net, rank)
    min_gain = data.draw(st.sampled_from([1.05, 1.5, 4.0]))
    merged = merge(net, gate="multiply_adds", min_gain=min_gain, witness=False)
    assert assert_agree(merged, net, *shapes)
    large = picture(inputs_of(net), *((400, 48, 20)[rank - 1],) * rank, batch=2)
    before, after = counts(net, large), counts(merged, large)
    assert after.convs <= before.convs
    if after.convs < before.convs:
        assert after.multiply_adds < before.multiply_adds


# Pairs by hand -------------------------------------------------------------------------------------------------------


def pair(first, second, *between):
    return settle(nn.Sequential(first, *between, second))


def many_sizes(channels, upto=11):
    return [(channels, height, width) for height in range(1, upto) for width in (height, upto - height)]


MERGED = {
    "no second padding": lambda: pair(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3)),
    "second padding is valid": lambda: pair(nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 6, 2, padding="valid")),
    "1x1 first, zero padding after": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1)),
    "1x1 first, much padding after": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=4)),
    "1x1 first, stride 2 after": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, stride=2, padding=1)),
    "strided 1x1 first": lambda: pair(nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(4, 6, 3, padding=1)),
    "1x1 first, same padding of an even kernel": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 4, padding="same")),
    "1x1 first, padding along one axis": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, (3, 2), padding=(2, 0))),
    "reflect after 1x1": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
    "replicate after 1x1": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate")),
    "circular after 1x1": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
    "reflect first": lambda: pair(nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), nn.Conv2d(4, 6, 3)),
    "a module that pads, after 1x1": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3), nn.ZeroPad2d((1, 0, 2, 1))),
    "groups that do not divide": lambda: pair(nn.Conv2d(12, 12, 3, groups=4), nn.Conv2d(12, 12, 2, groups=6)),
    "depthwise then pointwise": lambda: pair(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 3, 1)),
    "dilations": lambda: pair(nn.Conv2d(3, 4, 2, dilation=3), nn.Conv2d(4, 6, 3, dilation=2)),
    "stride and dilation": lambda: pair(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 6, 2, dilation=3)),
    "norm between": lambda: pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
}
REFUSED = {
    "padding after 3x3": (lambda: pair(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)), "pad"),
    "padded 1x1 after 3x3": (lambda: pair(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1, padding=1)), "pad"),
    "same padding after 2x2": (lambda: pair(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 6, 3, padding="same")), "pad"),
    "reflect after strided 1x1": (
        lambda: pair(nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
        "reflect",
    ),
    "replicate after strided 1x1": (
        lambda: pair(nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate")),
        "replicate",
    ),
    "circular after strided 1x1": (
        lambda: pair(nn.Conv2d(3, 4, 1, stride=(1, 3)), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
        "circular",
    ),
    "a module that pads, after 3x3": (
        lambda: pair(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.ReflectionPad2d(1)),
        "pad",
    ),
    "transposed after": (lambda: pair(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3)), "transposed"),
    "transposed before": (lambda: pair(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Conv2d(4, 6, 1)), "transposed"),
}


@pytest.mark.parametrize("name", MERGED)
def test_a_pair_that_must_merge(name):
    net = MERGED[name]()
    check_runs(net, "merge", None)
    merged = merge(net, witness=False)
    assert convs_of(merged, net[0].in_channels, 12, 13) == 1
    assert assert_agree(merged, net, *many_sizes(net[0].in_channels))


@pytest.mark.parametrize("name", REFUSED)
def test_a_pair_that_must_not_merge(name):
    make, word = REFUSED[name]
    net = make()
    merged = merge(net, witness=False)
    assert assert_agree(merged, net, *many_sizes(3))
    assert convs_of(merged, 3, 12, 13) == convs_of(net, 3, 12, 13)
    reasons = [run.why for run in nmconv.find_runs(net, witness=False) if run.why]
    assert any(word in why.lower() for why in reasons), reasons


@pytest.mark.parametrize("bias", [False, True])
def test_a_padded_1x1(bias):
    """Without a bias its border is zeros, and a later padding adds more of them; with one it is a border of its own."""
    net = pair(nn.Conv2d(3, 4, 1, padding=1, bias=bias), nn.Conv2d(4, 6, 3, padding=1))
    merged = merge(net, witness=False)
    assert assert_agree(merged, net, *many_sizes(3))
    assert convs_of(merged, 3, 12, 13) == 1 + bias
    assert bool(nmconv.find_runs(net, witness=False)[0].why) == bias


@pytest.mark.parametrize("own", [0, 1])
def test_zeros_by_a_module_and_by_the_convolution_itself(own):
    net = pair(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=own), nn.ZeroPad2d((1, 0, 0, 2)))
    merged = merge(net, witness=False)
    assert assert_agree(merged, net, *many_sizes(3))
    assert convs_of(merged, 3, 12, 13) == 1


@pytest.mark.parametrize("own", [0, 1])
def test_zeros_that_lead_a_run_in(own):
    """A run that merges as a whole is exact, and needs no reason why not."""
    net = settle(nn.Sequential(nn.ZeroPad2d((1, 0, 0, 2)), nn.Conv2d(3, 4, 3, padding=own), nn.Conv2d(4, 2, 1)))
    merged = merge(net, witness=False)
    assert assert_agree(merged, net, *many_sizes(3))
    assert convs_of(merged, 3, 12, 13) == 1
    (run,) = nmconv.find_runs(net, witness=False)
    assert run.merges == (("1", "2"),) and run.exact and run.why == ""


def test_what_find_runs_counts():
    """A 3x3 of 3 to 8 channels and a 1x1 of 8 to 4, with biases: 216 + 32 multiply-adds a pixel become 108."""
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)))
    (run,) = nmconv.find_runs(net, witness=False)
    assert run.convs == ("0", "1") and run.exact and run.why == ""
    assert (run.parameters, run.merged_parameters) == (3 * 8 * 9 + 8 + 8 * 4 + 4, 3 * 4 * 9 + 4)
    assert run.gain == pytest.approx((216 + 32) / 108, rel=0.01)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.exact = False
    parted = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    assert all(len(run.convs) < 2 for run in nmconv.find_runs(parted, witness=False))


def test_a_strided_run_counts_the_maps_it_computes():
    """The first of these works on four times the pixels: 4 * 27 * 16 + 16 * 16 against 27 * 16 a pixel of the last."""
    net = settle(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1, stride=2)))
    (run,) = nmconv.find_runs(net, witness=False)
    assert run.gain == pytest.approx((4 * 27 * 16 + 16 * 16) / (27 * 16), rel=0.03)


@pytest.mark.parametrize("last", [nn.ReLU(), nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.PixelShuffle(2)])
def test_what_ends_a_run(last):
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 1), last, nn.Conv2d(1 if type(last) is nn.PixelShuffle else 4, 4, 1)))
    merged = merge(net, witness=False)
    assert convs_of(merged, 3, 8, 8) == 2
    assert assert_agree(merged, net, *many_sizes(3))


@pytest.mark.parametrize("factor", [1e-6, 1e5])
def test_scales_of_channels_are_harmless(factor):
    net = settle(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)))
    with torch.no_grad():
        net[1].weight[::2] *= factor
        net[1].running_var[1::2] *= factor
    merged = merge(net, witness=False)
    assert convs_of(merged, 3, 8, 8) == 1
    assert assert_agree(merged, net, *many_sizes(3))


# Bracketing ----------------------------------------------------------------------------------------------------------


def bracketings(n):
    """Every way to cut a run of n into consecutive parts."""
    for cuts in itertools.product([False, True], repeat=n - 1):
        at = [0, *(index + 1 for index, cut in enumerate(cuts) if cut), n]
        yield [range(low, high) for low, high in itertools.pairwise(at)]


def cost_of(convs, part):
    """Multiply-adds a pixel of the last map, by the formulas of the algebra: extents, gcd of groups, strides."""
    group = [convs[index] for index in part]
    extent, reach, stride, dilation = 1, 1, 1, 0
    for conv in group:
        step = stride * conv.dilation[0]
        if conv.kernel_size[0] > 1:
            dilation = math.gcd(dilation, step)
        extent, stride = extent + step * (conv.kernel_size[0] - 1), stride * conv.stride[0]
    reach = (extent - 1) // (dilation or 1) + 1
    groups = math.gcd(*[conv.groups for conv in group])
    after = math.prod(conv.stride[0] for conv in convs[part[-1] + 1 :])
    return reach**2 * group[0].in_channels // groups * group[-1].out_channels * after**2


FIVES = {
    # fat in the middle of each half, thin at the waist: (3x3 up, 1x1 down), then (1x1 up, 1x1, 3x3 down)
    "a thin waist": [(4, 48, 3, {}), (48, 4, 1, {}), (4, 64, 1, {}), (64, 64, 1, {}), (64, 6, 3, {})],
    "depthwise ones": [(4, 32, 1, {}), (32, 32, 3, {"groups": 32}), (32, 6, 1, {}), (6, 40, 1, {}), (40, 12, 1, {})],
    "a stride": [(4, 8, 3, {}), (8, 8, 1, {"stride": 2}), (8, 8, 3, {}), (8, 64, 1, {}), (64, 3, 1, {})],
}


@pytest.mark.parametrize("name", FIVES)
def test_the_best_bracketing_is_taken(name):
    net = settle(nn.Sequential(*[nn.Conv2d(i, o, k, **more) for i, o, k, more in FIVES[name]]))
    every = sorted((sum(cost_of(net, part) for part in each), len(each)) for each in bracketings(5))
    (least, parts), (second, _) = every[:2]
    assert second > least * 1.02, "the best must be clear"
    merged = merge(net, gate="multiply_adds")
    assert convs_of(merged, 4, 32, 32) == parts
    assert assert_agree(merged, net, (4, 12, 13), (4, 9, 9), (4, 3, 3))
    x = picture(4, 200, 200, batch=2)
    assert counts(merged, x).multiply_adds / counts(net, x).multiply_adds == pytest.approx(
        least / sum(cost_of(net, range(at, at + 1)) for at in range(5)), rel=0.03
    )


def test_two_of_five_is_the_best_and_not_from_left_to_right():
    """What the first case above is for: greedy from the left would not find it."""
    convs = [nn.Conv2d(i, o, k, **more) for i, o, k, more in FIVES["a thin waist"]]
    best = min(bracketings(5), key=lambda parts: sum(cost_of(convs, part) for part in parts))
    assert len(best) == 2
    assert cost_of(convs, range(5)) > sum(cost_of(convs, part) for part in best)


@settings(QUICK, max_examples=25)
@given(st.data())
def test_the_best_bracketing_of_drawn_runs(data):
    """Unpadded runs of three to five: what runs has no more multiply-adds than the best way to cut them."""
    channels, layers = [data.draw(st.sampled_from([2, 4, 16, 40])) for _ in range(data.draw(st.integers(4, 6)))], []
    for inputs, outputs in itertools.pairwise(channels):
        groups = data.draw(st.sampled_from([1, 1, 2, math.gcd(inputs, outputs)]))
        kernel, stride = data.draw(st.sampled_from([1, 1, 3])), data.draw(st.sampled_from([1, 1, 1, 2]))
        layers.append(nn.Conv2d(inputs, outputs, kernel, stride=stride, groups=groups))
    net = settle(nn.Sequential(*layers))
    least = min(sum(cost_of(layers, part) for part in each) for each in bracketings(len(layers)))
    alone = sum(cost_of(layers, range(at, at + 1)) for at in range(len(layers)))
    merged = merge(net, gate="multiply_adds", min_gain=1.0)
    x = picture(channels[0], 160, 160, batch=1)
    assert counts(merged, x).multiply_adds / counts(net, x).multiply_adds <= least / alone * 1.08
    with torch.no_grad():
        small = picture(channels[0], 47, 47)
        assert_near(merged(small), net(small))


def test_verdicts_of_this_file():
    """The judge itself, on pairs by hand."""
    for name, make in MERGED.items():
        assert verdict_of_run(steps(make())) == "merge", name
    for name, (make, _) in REFUSED.items():
        if "transposed" not in name:
            assert verdict_of_run(steps(make())) == "refuse", name
    first, second = steps(pair(nn.Conv2d(3, 4, (3, 1)), nn.Conv2d(4, 6, 3, padding=(0, 1))))
    assert verdict([first], second) == "open"
