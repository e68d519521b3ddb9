"""What fits and searches meet in networks and data that nobody had in mind: refused by name, or done right."""

import functools
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import nmconv
from nmconv.observing import data

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::nmconv.errors.NoEffectWarning")


def pictures(count=32, size=8):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def conv(inputs=4, padding=1):
    return nn.Conv2d(inputs, 4, 3, padding=padding)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()


class NormBehindSum(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = conv(3), conv(), conv(), conv()
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.norm(self.b(x) + self.d(F.relu(self.c(x))))
        return self.head(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize("dropped", [[":relu#2"], [":relu#1", ":relu#2"]])
def test_a_norm_behind_a_sum_of_convolutions(dropped):
    net = NormBehindSum().eval()
    plan = nmconv.make_plan(net, "1:1", example_inputs=pictures()[:1]).edit(dict.fromkeys(dropped, "drop"))
    converted = nmconv.apply_plan(net, plan)
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    fitted = nmconv.fit(converted, pictures(), reference=net, recalibrate=False)
    whys = [unit.why for unit in nmconv.get_fit(fitted).units]
    assert any("sum of convolutions" in why for why in whys)
    if len(dropped) == 2:
        assert all(torch.equal(value, before[key]) for key, value in fitted.state_dict().items())


def test_networks_of_sums_have_tables_of_factors():
    nmconv.sensitivity(NormBehindSum().eval(), pictures(), form="factors", quiet=True)
    net = timm.create_model("resnetv2_18", num_classes=4).eval()
    assert nmconv.sensitivity(net, torch.randn(8, 3, 32, 32), form="factors", max_convs=2, quiet=True).complete


@pytest.mark.parametrize("kernel", [1, 3, "exact", "auto"])
def test_fitted_convolutions_of_unpadded_runs_merge_and_fold(kernel):
    """A kernel smaller than the run's leaves a border of its input alone, which has to be there all the same."""
    torch.manual_seed(0)
    parts = [part for at in range(3) for part in (conv(4 if at else 3, 0), nn.BatchNorm2d(4), nn.ReLU())]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = pictures(24, 20)
    fitted = nmconv.fit(nmconv.convert(net, "3:1", keep="boundary"), x, reference=net, kernel=kernel)
    for made in (nmconv.merge(fitted, gate="always"), nmconv.fold_norms(fitted)):
        torch.testing.assert_close(made(x), fitted(x), rtol=1e-4, atol=1e-4)


class Functional(nn.Module):
    def __init__(self, direct):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.head, self.direct = conv(3), conv(), conv(), nn.Linear(4, 3), direct

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.b.forward(x) if self.direct else F.conv2d(x, self.b.weight, padding=1)
        return self.head(F.relu(self.c(F.relu(x))).mean((2, 3)))


@pytest.mark.parametrize("form", ["merged", "factors"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_convolution_that_is_no_call_of_a_module_is_in_no_candidate(direct, form):
    table = nmconv.sensitivity(Functional(direct).eval(), pictures(), form=form, quiet=True)
    assert table.complete and not any(":" in name or name == "b" for row in table.candidates for name in row.convs)


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_recalibration_sees_what_lies_between_batches(order):
    x = torch.cat([pictures(64), pictures(64) + 10])
    x = x if order == "sorted" else x[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    norm = nn.BatchNorm2d(3)
    nmconv.recalibrate_norms(nn.Sequential(norm, nn.ReLU()).eval(), x)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)), rtol=1e-3, atol=0)


def weighted(weight):
    return lambda one, two: (one - two).abs().mean() * weight


def by_default(one, two, weight=1):
    return (one - two).abs().mean() * weight


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, one, two):
        return (one - two).abs().mean() * self.weight

    def method(self, one, two):
        return self(one, two)


LOSSES = [
    weighted, lambda weight: functools.partial(by_default, weight=weight), Weighted,
    lambda weight: Weighted(weight).method,
    lambda weight: nn.MSELoss() if weight == 1 else nn.L1Loss(), lambda weight: weighted(torch.tensor([weight])),
]  # fmt: skip


@pytest.mark.parametrize("made", LOSSES)
def test_a_table_of_another_loss_is_not_taken_for_it(made, tmp_path):
    path = tmp_path / "table.json"
    first = nmconv.sensitivity(plain(), pictures(), loss=made(1), path=path, quiet=True)
    again = nmconv.sensitivity(plain(), pictures(), loss=made(1), path=path, quiet=True)
    assert [row.loss for row in again.candidates] == [row.loss for row in first.candidates]
    with pytest.raises(nmconv.FileError, match="loss"):
        nmconv.sensitivity(plain(), pictures(), loss=made(100), path=path, quiet=True)


@pytest.mark.parametrize(
    "change", [lambda x: x.flip(3), lambda x: x.roll(1, 2), lambda x: x[torch.arange(31, -1, -1)], lambda x: x + 1e-6]
)
def test_a_table_of_other_images_is_not_taken_for_it(change, tmp_path):
    path, x = tmp_path / "table.json", torch.randint(0, 256, (32, 3, 8, 8)).float() / 255
    nmconv.sensitivity(plain(), x, path=path, quiet=True)
    nmconv.sensitivity(plain(), x.clone(), path=path, quiet=True)
    with pytest.raises(nmconv.FileError, match="images"):
        nmconv.sensitivity(plain(), change(x), path=path, quiet=True)


class Drawn(Dataset):
    def __init__(self, noise):
        self.noise, self.images = noise, pictures()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, at):
        return self.images[at] + self.noise * torch.randn(3, 8, 8), 0


def test_data_that_is_read_again_must_be_the_same(monkeypatch):
    net = plain()
    converted = nmconv.apply_plan(net, nmconv.make_plan(net, "1:1"))
    monkeypatch.setattr(data, "_MAX_BYTES", 0)
    fitted = nmconv.fit(converted, DataLoader(Drawn(0), 8), reference=net, recalibrate=False)
    assert nmconv.get_fit(fitted).converted.loss == 0
    with pytest.raises(nmconv.OptionError, match="returns other images each time"):
        nmconv.fit(converted, DataLoader(Drawn(1), 8), reference=net)
    monkeypatch.undo()
    fitted = nmconv.fit(converted, DataLoader(Drawn(1), 8), reference=net, recalibrate=False)  # kept: drawn once
    assert nmconv.get_fit(fitted).converted.loss == 0


def test_one_candidate_with_an_infinite_loss_leaves_the_others():
    def losses(limit):
        return lambda one, two: math.inf if (error := float((one - two).abs().max())) > limit else error

    all_of_them = nmconv.sensitivity(plain(), pictures(), quiet=True, loss=losses(math.inf))
    found = sorted(row.loss for row in all_of_them.candidates)
    assert found[0] < found[-1]
    some = nmconv.sensitivity(plain(), pictures(), quiet=True, loss=losses((found[0] + found[-1]) / 2))
    assert some.complete and 0 < len(some.candidates) < len(found)


def test_a_small_float_that_overflows_before_it_is_fitted():
    torch.manual_seed(0)
    parts = [part for at in range(6) for part in (nn.Conv2d(8 if at else 3, 8, 3, padding=1), nn.ReLU6())]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    for part in parts[::2]:
        part.weight.data.mul_(20)
    net.half()
    fitted = nmconv.fit(nmconv.convert(net, "6:1", keep="boundary"), pictures(), reference=net, kernel=3)
    report = nmconv.get_fit(fitted)
    assert math.isnan(report.converted.loss) and math.isfinite(report.returned.loss)
    assert bool(torch.isfinite(fitted(pictures().half())).all())


@pytest.mark.parametrize(
    "kind", [torch.Tensor.tolist, torch.Tensor.numpy, lambda value: value, lambda value: value.mean()]
)
def test_a_loss_for_each_image_may_be_any_sequence(kind):
    net = plain()
    converted = nmconv.convert(net, "2:1", keep="boundary")
    fitted = nmconv.fit(converted, pictures(), reference=net, loss=lambda one, two: kind((one - two).square().mean(1)))
    wanted = nmconv.fit(converted, pictures(), reference=net, loss=lambda one, two: (one - two).square().mean())
    assert nmconv.get_fit(fitted).returned.loss == pytest.approx(nmconv.get_fit(wanted).returned.loss)


def test_budgets_come_as_numpy_has_them():
    table = nmconv.sensitivity(plain(), pictures(), quiet=True)
    options = {"cost": "multiply_adds", "sensitivity": table, "quiet": True}
    one = nmconv.search(plain(), pictures(), budget=0.8, **options)
    assert nmconv.search(plain(), pictures(), budget=np.float64(0.8), **options) == one
    for budgets in (np.array([0.8, 0.9]), (part for part in (0.8, 0.9)), [0.8, 0.9]):
        assert nmconv.search(plain(), pictures(), budget=budgets, **options)[0] == one


def test_too_few_images_to_hold_out_names_a_way_that_works():
    with pytest.raises(nmconv.OptionError, match="give more, or another holdout"):
        nmconv.search(plain(), pictures(1), budget=0.8, cost="multiply_adds")
