"""``convert(..., hoist_padding=True)``: what it computes, by hand, and that linear runs merge exactly afterwards."""

import copy
import math
import pickle

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_nets import (
    CONV,
    PADS,
    assert_agree,
    assert_near,
    convs_of,
    drawn_between,
    drawn_conv,
    merge,
    picture,
    settle,
    shapes_for,
    statistics,
    steps,
)
from torch import nn

import nmconv

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
EXAMPLES = settings(
    max_examples=30,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def activated(draw, rank, shortest=2, longest=4, *, modes=("zeros",), pads=False):
    """conv → norms and the like → ReLU, several times."""
    channels, layers = draw(st.sampled_from([2, 3, 4, 6])), []
    for _ in range(draw(st.integers(shortest, longest))):
        conv = drawn_conv(draw, rank, channels, modes=modes, biggest=3)
        channels = conv.out_channels
        layers += [conv, *drawn_between(draw, rank, channels, pads=False), nn.ReLU()]
        if pads and draw(st.booleans()):
            layers.append(PADS["zeros"][rank - 1](1))
    while not isinstance(layers[-1], nn.ReLU):
        layers.pop()
    return settle(nn.Sequential(*layers), draw(st.integers(0, 9)))


def sides(conv):
    """Padding before and after, for each axis."""
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(0, 0)] * len(conv.kernel_size) if conv.padding == "valid" else [(size, size) for size in conv.padding]


def by_hand(net, mode="zeros"):
    """A net of one linear run, with all of its padding in front of it and its activation behind it."""
    net = copy.deepcopy(net)
    convs = [module for module in net if isinstance(module, CONV)]
    rank = len(convs[0].kernel_size)
    amounts, reach = [[0, 0] for _ in range(rank)], [1] * rank
    for conv in convs:
        for axis, (before, after) in enumerate(sides(conv)):
            amounts[axis][0] += reach[axis] * before
            amounts[axis][1] += reach[axis] * after
            reach[axis] *= conv.stride[axis]
        conv.padding, conv.padding_mode = (0,) * rank, "zeros"
    pad = PADS[mode][rank - 1](tuple(size for pair in reversed(amounts) for size in pair))
    last = max(at for at, module in enumerate(net) if isinstance(module, nn.ReLU))
    kept = [module for at, module in enumerate(net) if at == last or not isinstance(module, nn.ReLU)]
    return nn.Sequential(pad, *kept)


def converted_of(net, **options):
    count = sum(isinstance(module, CONV) for module in net)
    return nmconv.convert(net, f"{count}:1", hoist_padding=True, keep="boundary", **options)


@pytest.mark.parametrize("rank", [1, 2, 3])
@EXAMPLES
@given(st.data())
def test_zero_padding_is_hoisted_and_merges(rank, data):
    net = data.draw(activated(rank))
    converted = converted_of(net)
    assert list(converted.state_dict()) == list(net.state_dict())
    shapes = shapes_for(data.draw, net, rank)
    assert assert_agree(converted, by_hand(net), *shapes, tolerance=1e-12)
    merged = merge(converted)
    assert assert_agree(merged, converted, *shapes)
    assert convs_of(merged, *shapes[0]) == 1
    runs = nmconv.find_runs(converted)
    assert len(runs) == 1 and runs[0].exact


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@settings(EXAMPLES, max_examples=10)
@given(st.data())
def test_mirrored_padding_is_hoisted_where_nothing_strides_before_it(rank, mode, data):
    net = data.draw(activated(rank, modes=(mode,)))
    for module in list(net)[:-1]:
        if isinstance(module, CONV):
            module.stride = (1,) * rank
    converted = converted_of(net)
    shapes = shapes_for(data.draw, converted, rank)
    assert assert_agree(converted, by_hand(net, mode), *shapes, tolerance=1e-12)
    merged = merge(converted)
    assert assert_agree(merged, converted, *shapes)
    assert convs_of(merged, *shapes[0]) == 1


@pytest.mark.parametrize("rank", [1, 2])
@EXAMPLES
@given(st.data())
def test_anything_drawn_merges_to_the_same(rank, data):
    """Modes mixed, strides anywhere, modules that pad: hoisted or not, merged is what was converted."""
    modes = ("zeros", "zeros", "reflect", "replicate", "circular")
    net = data.draw(activated(rank, modes=modes, pads=True))
    converted = converted_of(net)
    shapes = shapes_for(data.draw, converted, rank)
    merged = merge(converted)
    assert assert_agree(merged, converted, *shapes)
    assert convs_of(merged, *shapes[0]) <= convs_of(converted, *shapes[0])


def blocks(*, stride=1, mode="zeros", act=nn.ReLU):
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, stride=stride, bias=False), nn.BatchNorm2d(6), act(),
            nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4), act(),
            nn.Conv2d(4, 6, 5, padding=2), act(),
            nn.Conv2d(6, 3, 3, padding=1, stride=2), act(),
        )
    )  # fmt: skip


def test_every_linear_run_keeps_its_own_padding():
    """2:1 makes two runs of two: each gets its padding in front, and nothing goes past the kept activation."""
    converted = nmconv.convert(blocks(), "2:1", hoist_padding=True, keep="boundary")
    paddings = [module.padding for module in converted if isinstance(module, nn.Conv2d)]
    assert paddings == [(2, 2), (0, 0), (3, 3), (0, 0)]
    merged = merge(converted)
    assert convs_of(merged, 3, 16, 17) == 2
    assert assert_agree(merged, converted, *[(3, size, size + 1) for size in range(1, 20)])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_what_cannot_be_hoisted_says_so(mode):
    """After a strided conv: it stays as it was, its run is refused by name, and nothing is approximated."""
    net = blocks(stride=2, mode=mode)[:6].eval()
    converted, plain = (nmconv.convert(net, "2:1", hoist_padding=value, keep="boundary") for value in (True, False))
    shapes = [(3, size, size + 3) for size in range(1, 20)]
    assert assert_agree(converted, plain, *shapes, tolerance=1e-12)
    assert assert_agree(merge(converted), converted, *shapes)
    whys = [run.why for run in nmconv.find_runs(converted) if run.convs[:2] == ("0", "3")]
    assert whys and all(mode in why for why in whys)


def test_the_inside_of_a_map_is_what_it_was():
    net = blocks()
    hoisted, plain = (nmconv.convert(net, "2:1", hoist_padding=value, keep="boundary") for value in (True, False))
    x = picture(3, 64, 65)
    with torch.no_grad():
        one, other = hoisted(x), plain(x)
    assert_near(one[..., 8:-8, 8:-8], other[..., 8:-8, 8:-8], 1e-12)
    assert (one - other).abs().max() > 1e-3


def test_the_gate_compares_with_the_run_as_it_was():
    """3x3 and 3x3 make a 5x5: hoisting enlarges the inner map, and must not make the merge look better."""
    net = settle(nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 9, 3, padding=4), nn.ReLU()))
    hoisted, plain = (nmconv.convert(net, "2:1", hoist_padding=value, keep="boundary") for value in (True, False))
    (one,), (other,) = nmconv.find_runs(hoisted), nmconv.find_runs(plain)
    assert one.multiply_adds == other.multiply_adds
    assert one.exact and not other.exact and "hoist" in other.why


def test_hoisting_is_off_unless_asked_for():
    net = blocks()
    converted = nmconv.convert(net, "2:1", keep="boundary")
    paddings = [module.padding for module in net if isinstance(module, nn.Conv2d)]
    assert paddings == [module.padding for module in converted if isinstance(module, nn.Conv2d)]
    assert convs_of(merge(converted), 3, 16, 17) == 4


@pytest.mark.parametrize("inplace", [True, False])
def test_a_hoisted_model_is_trained_copied_and_pickled(inplace):
    net = blocks()
    before = [module.padding for module in net if isinstance(module, nn.Conv2d)]
    converted = nmconv.convert(net, "4:1", hoist_padding=True, inplace=inplace, keep="boundary")
    assert (converted is net) == inplace
    if not inplace:
        assert [module.padding for module in net if isinstance(module, nn.Conv2d)] == before
    converted.train()
    converted(picture(3, 16, 16)).sum().backward()
    with torch.no_grad():
        for value in converted.parameters():
            value -= 1e-3 * value.grad
    converted.eval()
    for one in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert convs_of(merge(one), 3, 16, 17) == 1
        assert assert_agree(merge(one), converted, *[(3, size, size + 1) for size in range(1, 20)])


def test_a_plan_carries_hoisting():
    """Plans are replayed: what the plan of a hoisted model does to another copy is the same."""
    net = blocks()
    converted = nmconv.convert(net, "2:1", hoist_padding=True, keep="boundary")
    plan = nmconv.get_plan(converted)
    again = nmconv.apply_plan(blocks(), nmconv.Plan.from_json(plan.to_json()))
    assert assert_agree(again, converted, (3, 16, 17), (3, 9, 9), tolerance=1e-12)
    assert nmconv.make_plan(net, "2:1", hoist_padding=True, keep="boundary") == plan


def test_hoisting_through_modules_and_norms_of_timm():
    """mobilenetv2_100 at 3:1: every inverted residual becomes one convolution."""
    torch.manual_seed(0)
    model = statistics(timm.create_model("mobilenetv2_100"))
    converted = nmconv.convert(model, "3:1", relocate=True, hoist_padding=True, keep="boundary")
    merged = merge(converted)
    assert convs_of(model, 3, 64, 64) == 52
    assert convs_of(merged, 3, 64, 64) <= 18
    assert assert_agree(merged, converted, (3, 64, 64), (3, 65, 97), (3, 33, 32), tolerance=1e-8, batch=2) == 3
    assert not math.isnan(sum(run.gain for run in nmconv.find_runs(converted)))
    assert type(merged) is type(model)


def test_steps_of_what_was_hoisted():
    """The judge agrees with the library on what was hoisted: no padding but the first."""
    converted = converted_of(blocks())
    assert [any(step.padded) for step in steps(converted)] == [True, False, False, False]


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_much_reflection(mode):
    """Inputs must be larger than the padding, also those that merging tries a run on."""
    convs = [nn.Conv2d(2, 2, 1, padding=size, padding_mode=mode) for size in (3, 3, 3)]
    net = settle(nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.ReLU()))
    converted = nmconv.convert(net, "3:1", hoist_padding=True, keep="boundary")
    merged = merge(converted)
    assert convs_of(merged, 2, 16, 17) == 1
    assert assert_agree(merged, converted, *[(2, size, size + 1) for size in range(1, 16)])
