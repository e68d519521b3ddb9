"""Paths that no recording takes, and code that keeps what it was given: networks found by an outside reader.

`expected` is the same source, in which the dropped activations are skipped by hand.
"""

import functools
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nmconv
from foreign.three_convs import Net, conv, picture

torch.set_num_threads(1)


def expected(cls, converted):
    """Build the network without the dropped activations."""
    model = cls()
    model.skip = tuple(site.name for site in nmconv.get_plan(converted).sites if site.action == "drop")
    assert model.skip
    return model


# --- in-place writes, hooks, and gradients on other paths ------------------------------------------------------------


class WritesElsewhere(Net):
    noise = False

    def forward(self, x, bias=None):
        y = self.a(x)
        z = y.clone() if "act1" in self.skip else self.act1(y)
        if bias is not None or self.noise or x.shape[-1] < 8 or len(x) == 1:
            z += 1.0 if bias is None else bias
        return self.c(self.act2(self.b(z))) + y


@pytest.mark.parametrize("path", ["as recorded", "argument", "size", "batch", "flag"])
def test_a_write_on_a_path_that_was_not_recorded(path):
    converted = nmconv.convert(WritesElsewhere(), "2:1", example_inputs=picture())
    model = expected(WritesElsewhere, converted)
    assert model.skip == ("act1",)
    x = picture(batch=1 if path == "batch" else 2, size=7 if path == "size" else 16)
    args = (x, torch.tensor(2.0)) if path == "argument" else (x,)
    for each in (converted, model):
        each.noise = path == "flag"
    assert torch.equal(converted(*args), model(*args))


class HooksGradient(Net):
    def forward(self, x):
        y = self.a(x)
        z = y.clone() if "act1" in self.skip else self.act1(y)
        if z.requires_grad:
            z.register_hook(lambda gradient: gradient * 0.5)
        return self.c(self.act2(self.b(z))) + y


def test_a_tensor_hook_on_what_an_activation_returned():
    converted = nmconv.convert(HooksGradient(), "2:1", example_inputs=picture())
    model = expected(HooksGradient, converted)
    for each in (converted, model):
        each(picture()).sum().backward()
    assert torch.equal(converted.a.weight.grad, model.a.weight.grad)


class ClampsGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv(size=1)

    def forward(self, x):
        y = self.a(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return self.b(y)


def test_a_tensor_hook_inside_a_run_ends_it():
    with pytest.warns(nmconv.NoEffectWarning):
        nmconv.merge(ClampsGradient().eval(), gate="always", example_inputs=picture())


def test_what_a_forward_hook_keeps_is_not_overwritten():
    class Adds(Net):
        def forward(self, x):
            y = self.b(self.run("act1", self.a(x)))
            y = y.clone() if "act2" in self.skip else self.act2(y)
            y += 0.5
            return self.c(y)

    kept = []
    model = Adds()
    model.b.register_forward_hook(lambda module, args, output: kept.append(output))
    converted = nmconv.convert(model, "2:1", keep="first", example_inputs=picture())
    assert [site.name for site in nmconv.get_plan(converted).sites if site.action == "drop"] == ["act2"]
    kept.clear()
    converted(picture())
    assert torch.equal(kept[0], converted.b(converted.act1(converted.a(picture()))))


# --- calls on other paths --------------------------------------------------------------------------------------------


class CallsElsewhere(Net):
    deep = False

    def forward(self, x, extra=False):
        z = self.c(self.act2(self.b(self.act1(self.a(x)))))
        if extra or self.deep:
            z = z + self.act2(z)
        return z


class CallsAtSmallSizes(Net):
    def forward(self, x):
        z = self.c(self.act2(self.b(self.act1(self.a(x)))))
        if x.shape[-1] < 8:
            z = z + self.act2(z)
        return z


def without_second(model):
    """Drop the call of the second activation that every path makes."""
    plan = nmconv.make_plan(model, "1:1", example_inputs=picture())
    return nmconv.apply_plan(model, plan.edit({"act2#1": "drop"}), example_inputs=picture())


@pytest.mark.parametrize("path", ["argument", "flag"])
def test_a_module_that_another_path_calls_as_well_keeps_that_call(path):
    converted = without_second(CallsElsewhere())
    converted.deep = path == "flag"
    with pytest.raises(nmconv.RewriteError):
        converted(picture(), path == "argument")


def test_a_module_that_is_called_once_more_at_some_sizes_stays():
    with pytest.raises(nmconv.PlanError, match="act2#1"):
        without_second(CallsAtSmallSizes())


class OnlyTests(Net):
    def forward(self, x):
        x = self.a(x)
        if self.act1 is not None:
            x = self.act1(x)
        return self.c(self.act2(self.b(x)))


def test_a_module_that_is_only_tested_besides_is_swapped():
    converted = nmconv.convert(OnlyTests(), "2:1", keep="boundary", example_inputs=picture())
    assert type(converted) is OnlyTests and isinstance(converted.act1, nn.Identity)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2))
        self.d = nn.Sequential(conv(2, 8, 1), nn.ReLU(), conv(8, 3, 1))

    def encode(self, x):
        return self.e(x)

    def decode(self, z):
        return self.d(z)

    def forward(self, x):
        return self.decode(self.encode(x))


def test_methods_that_can_be_called_on_their_own_compute_the_same_after_a_merge():
    model, x = Autoencoder().double().eval(), picture().double()
    plan = nmconv.make_plan(model, "1:1", hoist_padding=True, example_inputs=x)
    model = nmconv.apply_plan(model, plan.edit({site.id: "drop" for site in plan.sites}), example_inputs=x)
    merged = nmconv.merge(model, gate="always", example_inputs=x)
    assert nmconv.get_merges(merged)
    z = model.encode(x)
    torch.testing.assert_close(merged.encode(x), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.decode(z), model.decode(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(merged(x), model(x), rtol=0, atol=1e-12)


# --- caches of the user's code ---------------------------------------------------------------------------------------

GRIDS, LAST = {}, [None]


@functools.cache
def window(channels):
    return torch.ones(channels, 1, 3, 3) / 9


@functools.lru_cache(maxsize=4)
def small_window(channels):
    return torch.ones(channels, 1, 3, 3) / 9


class Caches(Net):
    scales: ClassVar = {}

    def forward(self, x):
        x = self.act2(self.b(self.act1(self.a(x))))
        key = str(tuple(x.shape))
        if key not in GRIDS:
            GRIDS[key] = [torch.linspace(-1, 1, x.shape[3]).expand(x.shape)]
        if key not in self.scales:
            type(self).scales[key] = torch.full((1,), 2.0)
        LAST[0] = GRIDS[key][0]
        x = x * self.scales[key] + GRIDS[key][0] + LAST[0]
        return self.c(F.conv2d(F.conv2d(x, window(4), groups=4), small_window(4), groups=4))


@pytest.mark.parametrize("filled", [False, True])
def test_recording_leaves_the_users_caches_alone(filled):
    GRIDS.clear()
    Caches.scales.clear()
    LAST[0] = None
    window.cache_clear()
    small_window.cache_clear()
    model, x = Caches().eval(), picture()
    wanted = model(x)
    if not filled:
        GRIDS.clear()
        Caches.scales.clear()
        LAST[0] = None
        window.cache_clear()
        small_window.cache_clear()
    before = {key: grids[0] for key, grids in GRIDS.items()}
    nmconv.make_plan(model, example_inputs=x)
    assert {key: grids[0] for key, grids in GRIDS.items()} == before
    assert set(Caches.scales) == set(before)
    assert LAST[0] is None or not LAST[0].is_meta
    assert not window(4).is_meta and not small_window(4).is_meta
    assert torch.equal(model(x), wanted)


# --- what tracing would lose -----------------------------------------------------------------------------------------


def locks(plan):
    return [site.locked for site in plan.sites if site.action != "skip"]


class SetsData(Net):
    def forward(self, x):
        self.b.weight.data = self.b.weight.data * 0.5
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def test_a_block_that_assigns_the_data_of_a_parameter_stays():
    plan = nmconv.make_plan(SetsData(), example_inputs=picture())
    assert [("'data'" in reason) for reason in locks(plan)] == [True, True]


class NumpyNumber(Net):
    def forward(self, x):
        x = F.leaky_relu(self.a(x), 0.2) * np.sqrt(2)
        return self.c(F.leaky_relu(self.b(x), 0.2) * np.sqrt(2))


def test_numpys_numbers_in_a_rewritten_block():
    model = NumpyNumber()
    converted = nmconv.convert(model, "2:1", example_inputs=picture())
    x = F.leaky_relu(model.a(picture()), 0.2) * np.sqrt(2)
    assert torch.equal(converted(picture()), model.c(model.b(x) * np.sqrt(2)))


class NumpyOfSizes(Net):
    def forward(self, x):
        x = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return x / np.prod(x.shape[2:])


def test_numpy_on_sizes_is_named_in_the_plan():
    plan = nmconv.make_plan(NumpyOfSizes(), example_inputs=picture())
    assert [("numpy" in reason) for reason in locks(plan)] == [True, True]


@pytest.mark.parametrize("name", ["class", "None", "self", "conv-1"])
def test_children_whose_names_are_no_names_in_source(name):
    class Named(Net):
        def __init__(self):
            super().__init__()
            self.add_module(name, conv(3))

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(getattr(self, name)(x)))))

    plan = nmconv.make_plan(Named(), example_inputs=picture())
    assert [bool(reason) for reason in locks(plan)] == [name != "conv-1"] * 2


# --- settings that change later --------------------------------------------------------------------------------------


class ClassFlag(Net):
    double = False

    def forward(self, x):
        x = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return x * 2 if self.double else x


class ClassNumber(Net):
    double = 1.0

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x))))) * self.double


class ByGetattr(ClassFlag):
    def forward(self, x):
        x = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return x * 2 if getattr(self, "double", False) else x


class ByProperty(ClassFlag):
    @property
    def twice(self):
        return self.double

    def forward(self, x):
        x = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return x * 2 if self.twice else x


@pytest.mark.parametrize("cls", [ClassFlag, ClassNumber, ByGetattr, ByProperty])
def test_a_setting_that_changes_later_is_an_error(cls):
    converted = nmconv.convert(cls(), "2:1", example_inputs=picture())
    converted(picture())
    converted.double = 3.0
    with pytest.raises(nmconv.RewriteError, match=r"self\.double"):
        converted(picture())


# --- gradually -------------------------------------------------------------------------------------------------------


class CountsActivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv())

    def forward(self, x):
        count = 0
        for layer in self.layers:
            x = layer(x)
            count += isinstance(layer, nn.ReLU)
        return x / count


@pytest.mark.parametrize("inplace", [False, True])
def test_a_gradual_conversion_is_refused_if_its_end_would_be(inplace):
    model = CountsActivations()
    with pytest.raises(nmconv.WitnessError):
        nmconv.convert(model, "2:1", gradual=True, inplace=inplace, example_inputs=picture())
    assert type(model.layers[1]) is type(model.layers[3]) is nn.ReLU
    assert nmconv.get_plan(model) is None
