"""Average pools behind convolutions: taken before a 1x1, where there are fewer elements; part of what is larger."""

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_nets import convs_of, picture, settle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nmconv

torch.set_num_threads(1)

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def transition(kernel=1, pool=None, **options):
    """As between two blocks of a DenseNet."""
    return settle(
        nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, kernel, **options), nn.BatchNorm2d(6), pool or nn.AvgPool2d(2, 2))
    )


def work(net, x):
    """Multiply-adds."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops() // 2


def assert_same(merged, net, *inputs, tolerance=1e-11):
    for x in inputs:
        with torch.no_grad():
            found, wanted = merged(x), net(x)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def pictures(*sizes):
    return [picture(4, *size) for size in sizes]


def test_a_pointwise_convolution_comes_after_the_average():
    net = transition()
    merged = nmconv.merge(net)
    assert_same(merged, net, *pictures((8, 8), (9, 7), (2, 3), (17, 4)))
    x = picture(4, 8, 8)
    assert work(net, x) == 4 * work(merged, x) and convs_of(merged, 4, 8, 8) == 1
    assert isinstance(merged[3], nn.Identity) and merged[1].weight.shape == (6, 4, 1, 1)
    assert "averaged first" in repr(merged[1])
    with pytest.raises(RuntimeError):
        net(picture(4, 1, 9))
    with pytest.raises(RuntimeError):
        merged(picture(4, 1, 9))
    (run,) = nmconv.find_runs(net)
    assert run.convs == ("1",) and run.exact and run.merges == (("1",),) and run.gain > 3.5


@pytest.mark.parametrize("rank", [1, 2, 3])
@settings(max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_of_them(rank, data):
    def each(*choices):
        return tuple(data.draw(st.sampled_from(choices)) for _ in range(rank))

    kernel, groups = each(1, 1, 3), data.draw(st.sampled_from([1, 2]))
    conv = CONVS[rank - 1](4, 6, kernel, each(1, 1, 2), each(0, 0, 1), each(1, 2), groups, data.draw(st.booleans()))
    parts = [conv, POOLS[rank - 1](each(1, 2, 3), each(1, 2, 3))]
    if data.draw(st.booleans()):
        parts.insert(1, NORMS[rank - 1](6))
    if data.draw(st.booleans()):
        parts.insert(0, CONVS[rank - 1](4, 4, 1))
    net = settle(nn.Sequential(*parts))
    for gate in ("always", "multiply_adds"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nmconv.NoEffectWarning)
            merged = nmconv.merge(net, gate=gate)
        for sizes in itertools.islice(itertools.product((9, 12, 10), repeat=rank), 4):
            x = torch.randn(2, 4, *sizes, dtype=torch.float64)
            assert_same(merged, net, x, *([] if any(isinstance(part, NORMS) for part in parts) else [x[0]]))
            if gate == "multiply_adds" and sizes == (12,) * rank:
                assert work(merged, x) <= work(net, x)


def test_a_larger_one_takes_the_average_in():
    net = transition(3)
    merged = nmconv.merge(net)
    assert merged[1].weight.shape == (6, 4, 4, 4) and type(merged[1]) is nn.Conv2d
    assert_same(merged, net, *pictures((8, 8), (9, 7), (4, 5)))
    assert work(net, picture(4, 10, 10)) == pytest.approx(36 / 16 * work(merged, picture(4, 10, 10)))


def test_a_padded_one_may_not_cut_into_the_average():
    """The pool does not pad, so that all padding is in the first: 3x3, padded, then averaged."""
    net = transition(3, padding=1)
    assert_same(nmconv.merge(net), net, *pictures((8, 8), (9, 7), (2, 2)))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, 2, padding=1),
        nn.AvgPool2d(3, 2, padding=(0, 1), count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d(2),
        nn.MaxPool2d(2),
        nn.LPPool2d(2, 2),
    ],
)
def test_other_pools_stay(pool):
    net = transition(pool=pool)
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net, gate="always")
    assert type(merged[3]) is type(pool) and isinstance(merged[2], nn.Identity)
    assert_same(merged, net, *pictures((8, 8), (9, 7)))


class Branches(nn.Module):
    """A pool that two read, one that is called twice, one in a branch, one that something follows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.pool, self.twice, self.branch = nn.AvgPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(2)

    def forward(self, x):
        y = self.a(x).relu()
        z = self.b(y)
        x = self.pool(z) + self.branch(self.d(y)) + z[..., ::2, ::2]
        x = self.twice(self.c(x.relu()))
        return self.twice(self.c(x.relu()))


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d([2, 2]), nn.AvgPool2d((2,)), nn.AvgPool2d(2, [2, 1]), nn.AvgPool2d((3, 2))]
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_sizes_in_any_form(pool, kernel):
    net = transition(kernel, pool)
    merged = nmconv.merge(net, gate="always")
    assert isinstance(merged[3], nn.Identity)
    assert_same(merged, net, *pictures((8, 8), (9, 7)))
    assert nmconv.find_runs(net)


def test_values_that_others_read():
    net = settle(Branches())
    merged = nmconv.merge(net, gate="always")
    assert_same(merged, net, *pictures((16, 16), (8, 24)))
    assert isinstance(merged.pool, nn.AvgPool2d) and isinstance(merged.twice, nn.AvgPool2d)
    assert isinstance(merged.branch, nn.Identity)


def test_what_follows_the_pool_is_another_run():
    net = settle(nn.Sequential(nn.Conv2d(4, 6, 1), nn.AvgPool2d(2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)))
    merged = nmconv.merge(net)
    assert_same(merged, net, *pictures((12, 12), (9, 16)))
    assert work(merged, picture(4, 12, 12)) < work(net, picture(4, 12, 12))
    for run in nmconv.find_runs(net):
        assert len(run.convs) == 1


def test_a_hook_on_the_pool_keeps_it():
    net, seen = transition(), []
    net[3].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net)
    merged(picture(4, 8, 8))
    assert [shape[1:] for shape in seen] == [(6, 8, 8)]


def test_live_models_keep_their_pools():
    net = settle(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3), nn.AvgPool2d(2)))
    live = nmconv.merge(net, live=True)
    assert_same(live, net, *pictures((8, 8), (9, 7)))
    assert list(live.state_dict()) == list(net.state_dict()) and isinstance(live[2], nn.AvgPool2d)
    assert_same(nmconv.merge(live), net, *pictures((8, 8), (9, 7)))


def test_merging_again_leaves_it(tmp_path):
    net = transition()
    once = nmconv.merge(net)
    with pytest.warns(nmconv.NoEffectWarning):
        twice = nmconv.merge(once, gate="always")
    assert_same(twice, net, *pictures((8, 8), (9, 7)))
    more = nn.Sequential(once, settle(nn.Conv2d(6, 4, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        assert_same(nmconv.merge(more.eval(), gate="always"), more, *pictures((8, 8)))


@pytest.mark.parametrize("kernel", [1, 3])
def test_saving_and_loading(kernel, tmp_path):
    net = transition(kernel)
    merged = nmconv.merge(net)
    nmconv.save(merged, tmp_path / "net.safetensors")
    again = nmconv.load(transition(kernel), tmp_path / "net.safetensors")
    x = picture(4, 9, 8)
    assert torch.equal(again(x), merged(x))
    assert torch.equal(copy.deepcopy(merged)(x), merged(x))
    assert nmconv.get_merges(again) == nmconv.get_merges(merged)
    other = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, kernel), nn.BatchNorm2d(6), nn.MaxPool2d(2, 2))
    before = [type(part) for part in other]
    with pytest.raises(nmconv.FileError, match="MaxPool2d"):
        nmconv.load(other, tmp_path / "net.safetensors")
    assert [type(part) for part in other] == before


@pytest.mark.parametrize("gate", ["multiply_adds", "latency"])
def test_training_goes_on(gate):
    net = settle(nn.Sequential(nn.ReLU(), nn.Conv2d(64, 64, 1), nn.AvgPool2d(2, 2))).float()
    x = torch.randn(2, 64, 32, 32)
    merged = nmconv.merge(net, gate=gate, example_inputs=x)
    assert isinstance(merged[2], nn.Identity)
    for model in (net, merged):
        model.train()(x).square().sum().backward()
    torch.testing.assert_close(merged[1].weight.grad, net[1].weight.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(merged[1].bias.grad, net[1].bias.grad, rtol=1e-3, atol=1e-3)


def test_where_it_goes(tmp_path):
    net = transition().float()
    merged, x = nmconv.merge(net), picture(4, 8, 10).float()
    with torch.no_grad():
        wanted = net(x)
        sizes = ({2: torch.export.Dim("h", min=4, max=64), 3: torch.export.Dim("w", min=4, max=64)},)
        program = torch.export.export(merged, (x,), dynamic_shapes=sizes).module()
        y = picture(4, 12, 7).float()
        for found, model, given in ((program(x), net, x), (program(y), net, y)):
            torch.testing.assert_close(found, model(given), rtol=1e-4, atol=1e-5)
        compiled = torch.compile(merged, fullgraph=True)(x)
        torch.testing.assert_close(compiled, wanted, rtol=1e-4, atol=1e-5)
        channels_last = merged.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(channels_last, wanted, rtol=1e-4, atol=1e-5)


def test_transitions_of_densenet_cost_a_quarter():
    import timm

    torch.manual_seed(0)
    net = timm.create_model("densenet121", num_classes=10).eval()
    merged = nmconv.merge(net)
    x = torch.randn(1, 3, 64, 64)
    transitions = sum(56 * 56 // 49 * 4 // 4**at * 2 ** (2 * at) * 256 * 128 for at in range(3))
    assert work(net, x) - work(merged, x) == transitions * 3 // 4
    with torch.no_grad():
        torch.testing.assert_close(merged(x), net(x), rtol=1e-3, atol=1e-4)
