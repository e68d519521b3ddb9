"""Outputs of all sorts, compared on example inputs; and the places, dtypes and modes that merging is called in."""

import dataclasses
import types
import warnings

import pytest
import torch
from merge_nets import assert_agree, assert_near, merge, picture, settle
from torch import nn

import nmconv
from nmconv.merging.numeric_checks import check_model_outputs


@dataclasses.dataclass
class Output:
    y: object


KINDS = [
    lambda y: y, lambda y: (1, [y]), lambda y: {"y": y}, Output, lambda y: [Output({"y": (Output(y),)})],
    lambda y: types.SimpleNamespace(y=y), lambda y: types.MappingProxyType({"y": y}), lambda y: float(y.sum()),
    lambda y: torch.complex(y, -y), lambda y: torch.complex(torch.zeros_like(y), y),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_differences_are_found_wherever_they_are(kind):
    y = picture(3, 4, 4)
    other = y.clone()
    other[1, 2, 3, 0] += 1e-3
    check_model_outputs(kind(y), kind(y.clone()), lambda: kind(y), ["one"])
    with pytest.raises(nmconv.MergeError, match="one: on the example inputs"):
        check_model_outputs(kind(y), kind(other), lambda: kind(y), ["one"])
    with pytest.raises(nmconv.MergeError, match="tensors instead of"):
        check_model_outputs([kind(y), y], [kind(y)], lambda: [kind(y), y], ["one"])


def test_classes_may_flip_and_shapes_may_not():
    y = torch.arange(6)
    check_model_outputs(y, y.flip(0), lambda: y, ["one"])
    with pytest.raises(nmconv.MergeError, match="instead of"):
        check_model_outputs(y, y[1:], lambda: y, ["one"])


def test_an_object_that_holds_itself_ends():
    one = types.SimpleNamespace(y=picture(3, 4, 4))
    one.self = one
    check_model_outputs(one, one, lambda: one, ["one"])


class Masked(nn.Module):
    def __init__(self, value=-torch.inf):
        super().__init__()
        self.a, self.b, self.value = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), value

    def forward(self, x):
        return self.b(self.a(x)).masked_fill(x > 0, self.value)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_masks_of_infinities(value):
    net, x = settle(Masked(value)), picture(3, 6, 6)
    merged = nmconv.merge(net, example_inputs=x)
    torch.testing.assert_close(merged(x), net(x), equal_nan=True)
    wrong = net(x).clone()
    wrong[x > 0] = 0
    for one, other in ((net(x), wrong), (wrong, net(x)), (torch.full_like(x, value), torch.full_like(x, value))):
        with pytest.raises(nmconv.MergeError):
            check_model_outputs(one, other, lambda: net(x), ["one"])


def test_a_picture_without_a_batch():
    net = settle(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)))
    x = picture(3, 9, 8)[0]
    merged = nmconv.merge(net, example_inputs=x)
    assert_near(merged(x), net(x))
    assert (
        nmconv.find_runs(net, example_inputs=x)[0].size
        == (9, 8)
        == nmconv.find_runs(net, example_inputs=x[None])[0].size
    )
    assert len(nmconv.get_merges(merged)[0]) == 1


def test_a_default_device_says_nothing_about_the_model():
    net = settle(nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3, padding=1)))
    with torch.device("meta"):
        made = [nmconv.merge(net, gate="always"), nmconv.fold_norms(net), merge(net, live=True)]
    for one in made:
        assert assert_agree(one, net, (3, 9, 8))


@pytest.mark.parametrize("live", [False, True])
def test_what_is_merged_in_inference_mode_can_be_trained(live):
    net = settle(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 3, padding=1)))
    with torch.inference_mode():
        merged = merge(net, live=live)
    assert not any(value.is_inference() for value in merged.parameters())
    merged(picture(3, 9, 8)).sum().backward()
    assert all(value.grad is not None for value in merged.parameters())


@pytest.mark.parametrize("called", [False, True])
def test_a_weight_that_a_hook_computes_is_of_its_parameters_dtype(called, tmp_path):
    """``double()`` moves what the weight is computed from, and the weight itself at the next call only."""

    def build():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 16, 1)), nn.Conv2d(16, 4, 1)).double().eval()

    net, x = build(), picture(3, 9, 8)
    if called:
        net(x)
    merged = merge(net)
    assert {value.dtype for value in merged.parameters()} == {torch.float64}
    assert_near(merged(x), net(x))
    nmconv.save(merged, tmp_path / "merged.safetensors")
    loaded = nmconv.load(build(), tmp_path / "merged.safetensors")
    assert torch.equal(loaded(x), merged(x))


def dropping(between):
    return settle(nn.Sequential(nn.Conv2d(3, 16, 1), between, nn.Conv2d(16, 4, 1)))


@pytest.mark.parametrize("live", [False, True])
def test_dropout_that_merging_takes_away_says_so_once(live):
    with pytest.warns(nmconv.FoldedNormWarning, match="dropout of this model") as told:
        merged = merge(dropping(nn.Dropout(0.5)), live=live).train()
    assert len(told) == 1 and "norms" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged.train(), merge(dropping(nn.Dropout(0.0)), live=live).train(), merged.eval()


@pytest.mark.parametrize("live", [False, True])
def test_norms_and_dropout_say_so_together(live):
    between = nn.Sequential(nn.BatchNorm2d(16), nn.Dropout(0.5))
    with pytest.warns(nmconv.FoldedNormWarning, match="norms .*; dropout ") as told:
        merge(dropping(between), live=live).train()
    assert len(told) == 1


class TwoRuns(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two, self.inner, self.three = nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.three(self.inner(self.two(self.norm(self.one(x)).relu())))


def test_baking_speaks_no_second_time():
    baked = nmconv.merge(nmconv.merge(settle(TwoRuns()), live=True))
    with pytest.warns(nmconv.FoldedNormWarning) as told:
        baked.train()
    assert [each.filename for each in told] == [__file__]


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_what_cannot_be_a_live_factor_is_named(norm):
    warnings.simplefilter("ignore", FutureWarning)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), norm(nn.Conv2d(16, 4, 1))).eval()
    with pytest.warns(nmconv.NoEffectWarning, match="nothing to merge in this Sequential: 1: "):
        live = nmconv.merge(net, live=True)
    live.train()(torch.randn(2, 3, 8, 8)).sum().backward()
