"""Convolutions whose weight is computed, and norms of every kind: folded by what they do in eval mode, or named."""

import pytest
import torch
from merge_nets import SHAPES, C, assert_agree, conv, convs_of, counts, made, merge, picture, settle
from timm.layers import (
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    GroupNorm1,
    LayerNorm2d,
    MixedConv2d,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

import nmconv

torch.set_num_threads(1)


def run_of(*layers):
    """A 3x3 to eight channels and a 1x1 with these between them."""
    return settle(nn.Sequential(conv(3, outputs=8), *layers, conv(1, inputs=8)))


def whys(model):
    return " | ".join(run.why for run in nmconv.find_runs(model))


# Effective weights ---------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2.0


def pruned(part):
    prune.random_unstructured(part, "weight", 0.5)
    return part


def parametrized(part):
    parametrize.register_parametrization(part, "weight", Doubled())
    return part


REPARAMETRIZED = {
    "weight_norm": lambda part: parametrizations.weight_norm(part),
    "spectral_norm": lambda part: parametrizations.spectral_norm(part),
    "orthogonal": lambda part: parametrizations.orthogonal(part),
    "own": parametrized,
    "old weight_norm": lambda part: nn.utils.weight_norm(part),
    "old spectral_norm": lambda part: nn.utils.spectral_norm(part),
    "pruned": pruned,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("how", REPARAMETRIZED)
def test_reparametrized_convolutions(how, at):
    torch.manual_seed(0)
    model = run_of(nn.BatchNorm2d(8))
    REPARAMETRIZED[how](model[at])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    assert convs_of(merged, C, 8, 8) == 1 or whys(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


STANDARDIZED = {
    "StdConv2d": lambda **more: StdConv2d(C, 8, 3, bias=True, padding=1, **more),
    "ScaledStdConv2d": lambda **more: ScaledStdConv2d(C, 8, 3, bias=True, padding=1, **more),
    "StdConv2dSame": lambda **more: StdConv2dSame(C, 8, 3, bias=True, **more),
    "ScaledStdConv2dSame": lambda **more: ScaledStdConv2dSame(C, 8, 3, bias=True, **more),
}


@pytest.mark.parametrize("name", STANDARDIZED)
def test_weight_standardized_convolutions_fold_by_their_effective_weight(name):
    model = settle(nn.Sequential(STANDARDIZED[name](), nn.BatchNorm2d(8), conv(1, inputs=8)))
    if hasattr(model[0], "gain"):
        nn.init.uniform_(model[0].gain, 0.5, 2.0)
    merged = merge(model)
    assert convs_of(merged, C, 8, 8) == 1
    assert assert_agree(merged, model, *SHAPES)
    stripped = nmconv.fold_norms(model)
    assert counts(stripped, picture(C, 8, 8)).norms == 0
    assert assert_agree(stripped, model, *SHAPES)


def test_split_convolutions_of_timm_stay_right():
    model = settle(nn.Sequential(MixedConv2d(C, C, [1, 3], bias=True), nn.BatchNorm2d(C), conv(1)))
    assert assert_agree(merge(model, example_inputs=picture(C, 9, 9)), model, *SHAPES)


# Norms ---------------------------------------------------------------------------------------------------------------


def randomized(norm):
    with torch.no_grad():
        for value in (norm.running_mean, norm.weight, norm.bias):
            value.copy_(torch.linspace(-1.0, 1.5, 8))
        norm.running_var.copy_(torch.linspace(0.2, 3.0, 8))
    return norm


def frozen_of_timm(channels):
    return FrozenBatchNormAct2d(channels, apply_act=False)


@pytest.mark.parametrize("make", [FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, frozen_of_timm])
def test_norms_that_fold(make):
    model = run_of(randomized(make(8)))
    merged = merge(model)
    if make is not nn.SyncBatchNorm:
        assert convs_of(merged, C, 8, 8) == 1
    assert assert_agree(merged, model, *SHAPES)
    assert assert_agree(nmconv.fold_norms(model), model, *SHAPES)


@pytest.mark.parametrize("kept", [True, False])
def test_norm_and_activation_in_one(kept):
    """With its activation it ends the run, and the activation is kept; with an identity in its place it folds."""
    model = run_of(BatchNormAct2d(8, apply_act=kept, drop_layer=None))
    merged = merge(model)
    assert convs_of(merged, C, 8, 8) == (2 if kept else 1)
    assert assert_agree(merged, model, *SHAPES)
    folded = nmconv.fold_norms(model)
    assert assert_agree(folded, model, *SHAPES)
    assert convs_of(folded, C, 8, 8) == 2


def test_a_norm_without_statistics_is_refused_by_name():
    model = run_of(nn.BatchNorm2d(8, track_running_stats=False))
    merged = merge(model)
    assert convs_of(merged, C, 8, 8) == 2
    assert assert_agree(merged, model, *SHAPES[:9])
    reason = whys(model)
    assert "1" in reason and any(word in reason.lower() for word in ("statistic", "running", "batch")), reason


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), LayerNorm2d(8), GroupNorm1(8)])
def test_norms_that_end_a_run(norm):
    model = run_of(norm)
    merged = merge(model)
    assert convs_of(merged, C, 8, 8) == 2
    assert assert_agree(merged, model, *SHAPES[2:9])


def test_instance_norm_with_statistics_stays_right():
    model = run_of(randomized(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)))
    assert assert_agree(merge(model), model, *SHAPES[2:9])


def test_a_norm_before_a_padded_convolution():
    """The classic trap: its shift must not reach into the padding."""
    for layers in ([nn.BatchNorm2d(C), conv(3)], [nn.BatchNorm2d(C), conv(3, stride=2), nn.BatchNorm2d(C)]):
        model = settle(nn.Sequential(*layers))
        assert assert_agree(nmconv.fold_norms(model), model, *SHAPES)
        assert assert_agree(merge(model), model, *SHAPES)


def test_a_norm_that_something_else_reads_is_not_folded():
    model = made(lambda self, x: (lambda y: (self.n(y), y))(self.a(x)), a=conv(3), n=nn.BatchNorm2d(C))
    for each in (merge(model), nmconv.fold_norms(model)):
        assert assert_agree(each, model, *SHAPES)


def test_one_norm_after_two_convolutions():
    model = made(lambda self, x: self.n(self.a(x)) + self.n(self.b(x)), a=conv(3), b=conv(1), n=nn.BatchNorm2d(C))
    for each in (merge(model), nmconv.fold_norms(model)):
        assert assert_agree(each, model, *SHAPES)


ENDS = {
    "constant": lambda: [nn.ConstantPad2d(1, 0.7), nn.BatchNorm2d(4)],
    "zeros": lambda: [nn.ZeroPad2d(1), nn.BatchNorm2d(4)],
    "reflect": lambda: [nn.ReflectionPad2d(1), nn.BatchNorm2d(4)],
    "norm first": lambda: [nn.BatchNorm2d(4), nn.ZeroPad2d((0, 1, 2, 0))],
}


@pytest.mark.parametrize("end", ENDS)
def test_a_network_that_ends_in_padding_and_a_norm(end):
    """Nothing convolves after them."""
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), *ENDS[end]()))
    merged = nmconv.merge(model, gate="always")
    assert assert_agree(merged, model, (3, 9, 9), (3, 1, 1), (3, 4, 7)) >= 2
    assert convs_of(merged, 3, 9, 9) == 1
