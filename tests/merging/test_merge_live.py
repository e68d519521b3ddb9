"""``live=True``: the factors stay parameters under their keys, and their gradients are the sequential model's."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_nets import BATCH, assert_agree, assert_near, convs_of, counts, merge, picture, runs, settle, shapes_for
from nets import net
from test_merge_usage import SHAPES, original
from torch import nn

import nmconv
from nmconv.algebra import Affine, Geometry, Refusal, compose

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def gradients(model, x):
    """Of every parameter that has one, and of the input, under a loss that weighs every output differently."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"": x.grad} | found


def assert_same_gradients(live, model, x, tolerance=1e-8):
    """Factors' gradients agree; the sequential model's norms count as frozen, as they are in eval mode."""
    found, wanted = gradients(live, x), gradients(model, x)
    norms = {name for name, part in model.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    wanted = {name: value for name, value in wanted.items() if name.rpartition(".")[0] not in norms}
    assert wanted.keys() <= found.keys()
    largest = max(value.abs().max() for value in wanted.values())
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        assert (found[name] - value).abs().max() <= tolerance * max(value.abs().max(), 1e-3 * largest), name


@pytest.fixture
def model():
    return original()


@pytest.mark.parametrize(("batch", "merges"), [(None, 1), (1, 0), (9, 0), (10, 1), (32, 1)])
def test_what_a_kernel_takes_to_make_is_shared_by_the_batch(batch, merges):
    """2 x 16 x 64 an image before, 16 x 16 after, and 16 x 64 x 16 in each forward: it pays from ten images on."""
    net = settle(nn.Sequential(nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 16, 1)))
    inputs = None if batch is None else torch.randn(batch, 16, 1, 1, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        live = nmconv.merge(net, live=True, min_gain=1.05, example_inputs=inputs)
        assert len(nmconv.get_merges(live)) == merges
    baked = nmconv.merge(net, example_inputs=inputs)
    assert [len(merge.convs) for merge in nmconv.get_merges(baked)[0]] == [2], "made once"


def test_keys_values_and_outputs(model):
    live = merge(model, live=True)
    assert list(live.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(live.state_dict()[key], value), key
    assert [name for name, _ in live.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert convs_of(live, 3, 24, 24) == 4
    assert counts(live, picture(3, 24, 24)).norms <= 1  # the stem's is in no run
    assert assert_agree(live, model, *SHAPES)


def test_gradients(model):
    live = merge(model, live=True)
    assert_same_gradients(live, model, picture(3, 24, 24))
    assert_same_gradients(live, model, picture(3, 11, 14))


def test_one_merged_kernel_for_the_whole_batch(model):
    """The kernel is computed once a call, so that its cost is shared: multiply-adds on the batch are the baked ones."""
    live, baked = merge(model, live=True), merge(model)
    x = picture(3, 24, 24)
    assert counts(live, x).multiply_adds == counts(baked, x).multiply_adds


def test_steps_of_an_optimizer_go_the_same_way(model):
    """Five steps on the merged conv and five on the sequential model, norms frozen in both."""
    live = merge(model, live=True)
    finals = []
    for one in (live, model):
        frozen = {name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)}
        chosen = [value for name, value in one.named_parameters() if name.rpartition(".")[0] not in frozen]
        optimizer = torch.optim.SGD(chosen, 0.01, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            one(picture(3, 24, 24, seed=step)).square().mean().backward()
            optimizer.step()
        finals.append(one)
    assert assert_agree(*finals, *SHAPES, tolerance=1e-8)
    for key, value in model.state_dict().items():
        assert_near(live.state_dict()[key], value, 1e-8)


def test_merging_again_bakes_in(model):
    live = merge(model, live=True)
    with torch.no_grad():
        for one in (live, model):
            one.blocks[0].deep.weight.mul_(1.7)
            one.blocks[1].bn2.running_mean.add_(0.3)
            one.blocks[1].up.weight[0].zero_()
            one.stem[1].weight.mul_(-1.0)
    assert assert_agree(live, model, *SHAPES)
    baked = merge(live)
    assert assert_agree(baked, model, *SHAPES)
    assert convs_of(baked, 3, 24, 24) == 4
    assert sum(value.numel() for value in baked.parameters()) < sum(value.numel() for value in live.parameters())
    assert list(baked.state_dict()) == list(merge(model).state_dict())
    assert list(live.state_dict()) == list(model.state_dict()), "a copy was merged"


def test_loading_a_checkpoint_of_the_original(model):
    live = merge(model, live=True)
    other = original()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(0.6)
        live(picture(3, 24, 24))
    live.load_state_dict(other.state_dict())
    assert assert_agree(live, other, *SHAPES)
    fresh = original()
    fresh.load_state_dict(live.state_dict())
    assert assert_agree(fresh, other, *SHAPES)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_live_too(model, duplicate):
    live = merge(model, live=True)
    again = duplicate(live)
    assert list(again.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        again.blocks[0].up.weight.mul_(2.0)
    assert assert_agree(live, model, *SHAPES)
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(2.0)
    assert assert_agree(again, model, *SHAPES)
    assert_same_gradients(again, model, picture(3, 24, 24))


def test_in_place_and_frozen_factors(model):
    other = copy.deepcopy(model)
    for value in model.blocks[0].parameters():
        value.requires_grad_(False)
    assert merge(model, live=True, inplace=True) is model
    assert not any(value.requires_grad for value in model.blocks[0].parameters())
    assert assert_agree(model, other, *SHAPES)
    found = gradients(model, picture(3, 24, 24))
    assert not any(name.startswith("blocks.0") for name in found)


def test_train_mode_keeps_norms_frozen(model):
    live = merge(model, live=True)
    before = {key: value.clone() for key, value in live.state_dict().items()}
    with pytest.warns(UserWarning, match="norm") as caught:
        live.train()
        live(picture(3, 24, 24))
    assert len(caught) == 1
    live.eval()
    for key, value in live.state_dict().items():
        if key.startswith("stem."):  # no part of what was merged, and a norm like any other
            value.copy_(before[key])
        assert torch.equal(before[key], value), key
    assert assert_agree(live, model, *SHAPES)


def test_joins_are_live(model):
    """RepVGG: three branches and their norms."""

    def forward(self, x):
        return self.n3(self.a(x)) + self.n1(self.b(x)) + self.n0(x)

    parts = {name: nn.BatchNorm2d(4) for name in ("n0", "n1", "n3")}
    block = settle(net(forward, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1), **parts))
    live = merge(block, live=True)
    assert list(live.state_dict()) == list(block.state_dict())
    assert convs_of(live, 4, 8, 9) == 1
    assert assert_agree(live, block, (4, 8, 9), (4, 1, 2))
    assert_same_gradients(live, block, picture(4, 8, 9))
    assert assert_agree(merge(live), block, (4, 8, 9), (4, 1, 2))


def test_gradients_of_gradients(model):
    live = merge(model, live=True)
    for name in ("blocks.0.deep.weight", "stem.0.weight"):
        seconds = []
        for one in (live, model):
            value = one.get_parameter(name)
            (first,) = torch.autograd.grad(one(picture(3, 12, 12)).sum(), value, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), one.get_parameter("blocks.0.up.weight"))[0])
        assert_near(*seconds, 1e-8)


def test_autocast_and_low_precision(model):
    single = model.float()
    live = merge(single, live=True)
    x = picture(3, 24, 24).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live(x).float().sum().backward()
    assert all(value.grad.isfinite().all() for value in live.parameters() if value.grad is not None)
    with torch.no_grad():
        assert_near(live(x).double(), single(x).double(), 1e-4)
        lower = copy.deepcopy(live).bfloat16()
        assert lower(x.bfloat16()).dtype == torch.bfloat16


def test_gates_apply_to_live_ones_too(model):
    with pytest.warns(nmconv.NoEffectWarning):
        live = nmconv.merge(model, live=True, min_gain=1000.0)
    assert convs_of(live, 3, 24, 24) == 8
    assert list(live.state_dict()) == list(model.state_dict())


def test_vmap_over_any_parameter():
    """What is added in place must not be smaller than what is added to it."""
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)))
    deep = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    x = picture(3, 9, 8)
    for merged in (merge(net), merge(net, live=True), merge(deep, live=True)):
        for name, value in merged.named_parameters():
            stack = torch.stack([value.detach(), value.detach() * 2])

            def call(part, merged=merged, name=name):
                return torch.func.functional_call(merged, {name: part}, (x,))

            found = torch.vmap(call)(stack)
            assert torch.allclose(found, torch.stack([call(part) for part in stack])), name


@pytest.mark.parametrize("rank", [1, 2, 3])
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_kernels_computed_in_single_are_those_computed_in_double(rank, data):
    """They are computed in two ways: oneDNN has no float64."""

    def each(*choices):
        return tuple(data.draw(st.sampled_from(choices)) for _ in range(rank))

    groups = data.draw(st.sampled_from([1, 2, 4]))
    factors = []
    for channels, outputs in ((4, 8), (8, 12)):
        kernel, stride, dilation, padding = each(1, 2, 3), each(1, 2), each(1, 2, 3), ((0, 0),) * rank
        own = Geometry(channels, outputs, kernel, stride, dilation, groups, padding, "zeros", (), (), False)
        factors.append(Affine(own, torch.randn(outputs, channels // groups, *own.kernel, dtype=torch.float64)))
    try:
        double = compose(*factors).weight
    except Refusal:
        return
    single = compose(*(Affine(part.geometry, part.weight.float()) for part in factors)).weight
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 1e-5 * double.abs().max()


@pytest.mark.parametrize("rank", [1, 2, 3])
@settings(max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_drawn_runs(rank, data):
    """Whatever merges live: keys, outputs, gradients; and baked in, the outputs again."""
    sequential = data.draw(runs(rank, 2, 4))
    shapes = shapes_for(data.draw, sequential, rank)
    live = merge(sequential, live=True)
    assert list(live.state_dict()) == list(sequential.state_dict())
    assert assert_agree(live, sequential, *shapes)
    assert convs_of(live, *shapes[0]) == convs_of(merge(sequential), *shapes[0])
    assert_same_gradients(live, sequential, picture(*shapes[0], batch=BATCH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert assert_agree(merge(live), sequential, *shapes)
