"""Cropping along space by constants: passed in chains as padding is, and part of what merges where it is a module."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from merge_nets import assert_near, settle
from oracle import assert_same, dropped
from torch import nn

import nmconv
from nmconv.flow import Op, leaf_op

X = torch.rand(2, 4, 12, 13) - 0.5
conv = partial(nn.Conv2d, 4, 4, 3, padding=1)


class Net(nn.Module):
    """Convolutions with a crop behind each of the first two, and an activation behind that."""

    def __init__(self, work, make=conv, **parts):
        super().__init__()
        self.a, self.b, self.c = make(), make(), make()
        self.cut = 2
        for name, part in parts.items():
            setattr(self, name, part)
        self._work = work

    def forward(self, x):
        x = F.relu(self._work(self, self.a(x)))
        return self.c(F.relu(self._work(self, self.b(x))))


class Chomp(nn.Module):
    """As in temporal convolutional networks."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, x):
        return x[:, :, : -self.cut].contiguous()


class Sized(nn.Module):
    """The same by the input's size."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, x):
        return x[:, :, : x.size(2) - self.cut]


class Narrow(nn.Module):
    """The same by narrow."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, x):
        return torch.narrow(x, 2, 0, x.shape[2] - self.cut)


class First(nn.Module):
    """So many elements, whatever comes: what it leaves out goes by the size."""

    def forward(self, x):
        return x[:, :, :5]


CROPS = {
    "rows": lambda s, x: x[:, :, :-2],
    "dots": lambda s, x: x[..., 1:-1, 2:-2],
    "by an attribute": lambda s, x: x[:, :, : -s.cut],
    "left": lambda s, x: x[:, :, 1:, 1:],
    "by the size": lambda s, x: x[:, :, : x.size(2) - s.cut],
    "method narrow": lambda s, x: x.narrow(2, 1, x.shape[2] - 2),
    "torch.narrow": lambda s, x: torch.narrow(x, -1, 0, x.shape[3] - 1),
    "F.pad": lambda s, x: F.pad(x, (-1, -1, 0, -2)),
    "nn.ZeroPad2d": lambda s, x: s.pad(x),
    "a module": lambda s, x: s.chomp(x),
}
OTHERS = {
    "channels": lambda s, x: torch.cat([x[:, 2:], x[:, 2:]], 1),
    "dots on one side": lambda s, x: torch.cat([x[:, :2, ...], x[:, :2, ...]], 1),
    "every second": lambda s, x: x[:, :, ::2],
    "batch": lambda s, x: x[:-1],
    "an element": lambda s, x: x[:, :, 0, None].expand(-1, -1, 9, -1),
}


def net(work):
    return Net(work, pad=nn.ZeroPad2d(-1), chomp=Chomp(2)).eval()


def real(model, x=X):
    return [(site.id, site.convs) for site in nmconv.make_plan(model, example_inputs=x).sites if site.is_real]


@pytest.mark.parametrize("name", CROPS)
def test_an_activation_behind_a_crop_is_the_convolutions_before(name):
    model = net(CROPS[name])
    assert real(model) == [(":relu#1", ("a",)), (":relu#2", ("b",))]
    converted = nmconv.convert(model, "3:1", example_inputs=X)
    for training in (False, True):
        model.train(training), converted.train(training)
        with dropped(model, nmconv.get_plan(converted).changes) as log:
            wanted = model(X)
        log.assert_all_hit(training=training)
        assert_same(converted(X), wanted)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_crop_along_space_ends_a_chain(name):
    chains = {site.chain for site in nmconv.make_plan(net(OTHERS[name]), example_inputs=X).sites if site.is_real}
    assert real(net(OTHERS[name])) != real(net(CROPS["rows"]))
    assert len(chains) != 1


def test_two_crops_of_one_value_are_a_fork():
    def work(s, x):
        return torch.cat([x[:, :, :4], x[:, :, 4:]], 2)

    assert (":relu#1", ("a",)) not in real(net(work))


def test_who_overwrites_the_whole_keeps_what_was_cut_out():
    class Overwriting(Net):
        def forward(self, x):
            whole = self.a(x)
            part = F.relu(whole[:, :, :-2])
            whole.add_(1)
            return self.c(self.b(part)) + whole[:, :, :-2]

    model = Overwriting(None).eval()
    plan = nmconv.make_plan(model, example_inputs=X)
    plan = plan.edit({site.id: "drop" for site in plan.sites if site.is_real})
    converted = nmconv.apply_plan(model, plan, example_inputs=X)
    with dropped(model, plan.changes):
        wanted = model(X)
    assert_same(converted(X), wanted)


def test_a_dropped_one_leaves_dense_memory_and_an_in_place_one_its_own():
    def inplace(s, x):
        return F.relu(x[:, :, :-2], inplace=True)

    model = net(inplace)
    plan = nmconv.make_plan(model, example_inputs=X)
    plan = plan.edit({site.id: "drop" for site in plan.sites if site.is_real})
    converted = nmconv.apply_plan(model, plan, example_inputs=X)
    with torch.no_grad(), dropped(model, plan.changes):
        wanted = model(X)
    with torch.no_grad():
        assert_same(converted(X), wanted)


# -- modules that crop, merged ----------------------------------------------------------------------------------------


rand = partial(torch.rand, dtype=torch.float64)


def near(model, sizes=((12, 13), (9, 17), (8, 8)), **options):
    """Merged always, and equal at several sizes."""
    model = settle(model)
    merged = nmconv.merge(model, gate="always", example_inputs=rand(1, 3, *sizes[0]), **options)
    for size in sizes:
        x = rand(2, 3, *size)
        with torch.no_grad():
            assert_near(merged(x), model(x))
    return merged


@pytest.mark.parametrize("pad", [0, 1, 2, 3])
@pytest.mark.parametrize("crop", [-1, (-2, 0, -1, 0), (0, -3, 0, -2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_crop_behind_a_convolution_is_so_much_less_padding(pad, crop, stride):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=pad, stride=stride), nn.ZeroPad2d(crop), nn.Conv2d(4, 4, 1))
    merged = near(model, ((16, 17), (15, 21), (14, 14)))
    assert [type(part) is nn.Identity for part in merged] == [False, True, True]
    if crop == -1 and pad >= stride:
        assert merged[0].padding == (pad - stride,) * 2
    elif crop == -1:
        assert merged[0].geometry.crop == ((stride - pad,) * 2,) * 2


def test_padding_on_one_side_and_a_crop_on_the_other_is_a_padding_behind_a_convolution():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ZeroPad2d((1, -1, -2, 0)), nn.Conv2d(4, 4, 1)))
    (run,) = nmconv.find_runs(model, example_inputs=rand(1, 3, 9, 9))
    assert "a padded convolution follows" in run.why
    before = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ZeroPad2d((1, -1, -2, 0)), nn.Conv2d(4, 4, 3))
    assert type(near(before)[2]) is nn.Identity


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_of_every_mode_is_so_much_less(mode):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=2, padding_mode=mode), nn.ZeroPad2d((-1, -2, -1, 0)), nn.Conv2d(4, 4, 3)
    )
    merged = near(model)
    assert type(merged[2]) is nn.Identity


def test_a_crop_before_a_convolution_is_what_it_does_not_look_at():
    merged = near(nn.Sequential(nn.ZeroPad2d((-1, -2, 0, -1)), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)))
    assert [type(part) for part in merged] == [nn.ZeroPad2d, nn.Conv2d, nn.Identity]


def test_a_padded_convolution_behind_a_crop_begins_anew():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ZeroPad2d(-1), nn.Conv2d(4, 4, 3, padding=1)))
    (run,) = nmconv.find_runs(model, example_inputs=rand(1, 3, 9, 9))
    assert "a padded convolution follows a crop" in run.why
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(model, gate="always", example_inputs=rand(1, 3, 9, 9))
    assert merged[2].padding == (1, 1)
    x = rand(2, 3, 9, 9)
    assert_near(merged(x), model(x))


def test_biases_that_end_at_a_border_are_not_cropped():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.ZeroPad2d(-1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    )
    merged = near(model)
    assert type(merged[2]) is nn.ZeroPad2d or type(merged[0]).__name__ == "Conv2d"


class Temporal(nn.Module):
    """A causal block: padding on both sides, and the chomp takes the right one off."""

    def __init__(self, chomp, dilation):
        super().__init__()
        pad = 2 * dilation
        self.a, self.chomp1 = nn.Conv1d(3, 4, 3, padding=pad, dilation=dilation), chomp(pad)
        self.norm, self.relu = nn.BatchNorm1d(4), nn.ReLU()
        self.b = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return self.b(self.relu(self.norm(self.chomp1(self.a(x)))))


@pytest.mark.parametrize("chomp", [Chomp, Sized, Narrow])
@pytest.mark.parametrize("dilation", [1, 4])
def test_causal_convolutions_merge_with_their_chomp(chomp, dilation):
    model = settle(Temporal(chomp, dilation))
    x = rand(2, 3, 40)
    assert leaf_op(model.chomp1) is Op.PAD
    plan = nmconv.make_plan(model, example_inputs=x)
    assert [(site.id, site.convs) for site in plan.sites] == [("relu#1", ("a",))]
    converted = nmconv.apply_plan(model, plan.edit({"relu#1": "drop"}), example_inputs=x)
    merged = nmconv.merge(converted, gate="always", example_inputs=x)
    assert type(merged.chomp1) is nn.Identity
    assert type(merged.b) is nn.Identity
    for length in (40, 41, 23):
        x = rand(2, 3, length)
        with torch.no_grad():
            assert_near(merged(x), converted(x))


def test_a_causal_network_trains_saves_and_loads(tmp_path):
    model = settle(Temporal(Chomp, 2))
    x = rand(2, 3, 40)
    plan = nmconv.make_plan(model, example_inputs=x).edit({"relu#1": "drop"})
    converted = nmconv.apply_plan(model, plan, example_inputs=x)
    assert list(converted.state_dict()) == list(model.state_dict())
    converted.train()(x).sum().backward()
    merged = nmconv.merge(converted.eval(), gate="always", example_inputs=x)
    nmconv.save(merged, tmp_path / "net.safetensors")
    loaded = nmconv.load(settle(Temporal(Chomp, 2), seed=3), tmp_path / "net.safetensors", example_inputs=x)
    assert_same(loaded(x), merged(x))


@pytest.mark.parametrize("module", [First(), Chomp(0), nn.Flatten(), nn.Identity()])
def test_what_crops_by_the_size_or_not_at_all_is_looked_into(module):
    assert leaf_op(module) is not Op.PAD


def test_so_many_elements_end_a_run_and_pass_in_a_chain():
    model = settle(nn.Sequential(nn.Conv1d(3, 4, 3), First(), nn.ReLU(), nn.Conv1d(4, 4, 1)))
    x = rand(2, 3, 40)
    plan = nmconv.make_plan(model, example_inputs=x)
    assert [(site.id, site.convs) for site in plan.sites] == [("2#1", ("0",))]
    converted = nmconv.apply_plan(model, plan.edit({"2#1": "drop"}), example_inputs=x)
    assert nmconv.find_runs(converted, example_inputs=x) == ()


def test_a_slice_in_a_forward_merges():
    model = settle(net(CROPS["rows"]))
    converted = nmconv.apply_plan(
        model,
        nmconv.make_plan(model, example_inputs=X.double()).edit({":relu#1": "drop", ":relu#2": "drop"}),
        example_inputs=X.double(),
    )
    assert nmconv.find_runs(converted, example_inputs=X.double())


def test_a_slice_in_a_forward_ends_a_run():
    model = settle(net(CROPS["rows"]))
    plan = nmconv.make_plan(model, example_inputs=X.double()).edit({":relu#1": "drop", ":relu#2": "drop"})
    converted = nmconv.apply_plan(model, plan, example_inputs=X.double())
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(converted, gate="always", example_inputs=X.double())
    assert_same(merged(X.double()), converted(X.double()))


def test_padding_hoisted_before_a_crop_is_refused_or_right():
    model = Temporal(Chomp, 1)
    x = rand(2, 3, 40)
    model.b = nn.Conv1d(4, 4, 3, padding=1)
    settle(model)
    plan = nmconv.make_plan(model, hoist_padding=True, example_inputs=x).edit({"relu#1": "drop"})
    result = nmconv.apply_plan(model, plan, example_inputs=x)
    assert result.b.padding == (1,)
    assert result(x).shape == model(x).shape


def test_another_thread_sees_the_same():
    found = []
    thread = threading.Thread(target=lambda: found.append(leaf_op(Chomp(3))))
    thread.start(), thread.join()
    assert found == [Op.PAD]
