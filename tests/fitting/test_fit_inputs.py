"""What a fit is given, and what is left when it is interrupted: images, loaders, budgets, hooks, statistics."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset
from torch.utils.hooks import RemovableHandle

import nmconv
from nmconv.fitting import api, fitter
from nmconv.observing import data
from nmconv.searching.budget import budgets_of


def small(norms=False):
    """Three convolutions and a classifier."""
    torch.manual_seed(0)
    layers = []
    for width in (3, 6, 6):
        layers += [nn.Conv2d(width, 6, 3), nn.BatchNorm2d(6) if norms else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()


def images(count=48, size=12):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def converted(net):
    return nmconv.convert(net, "2:1", example_inputs=images(1), keep="boundary")


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def hooks_on(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# A model that overwrites its input


class Overwriting(nn.Module):
    """Normalises its input in place: twice is not the same as once."""

    def __init__(self):
        super().__init__()
        self.body, self.head = small()[:-3], nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.body(x.sub_(0.5).div_(0.2)).mean((2, 3)))


class Clean(Overwriting):
    """The same function."""

    def forward(self, x):
        return self.head(self.body((x - 0.5) / 0.2).mean((2, 3)))


@pytest.mark.parametrize("kernel", [None, "exact", 1])
def test_the_reference_is_given_the_images_that_the_model_is_given(kernel):
    torch.manual_seed(0)
    net, clean = Overwriting().eval(), Clean().eval()
    clean.load_state_dict(net.state_dict())
    reports, x = [], torch.rand(48, 3, 12, 12)
    for model in (net, clean):
        given = x.clone()
        fitted = nmconv.fit(
            nmconv.convert(model, "2:1", example_inputs=x[:1].clone(), keep="boundary"),
            given,
            reference=model,
            kernel=kernel,
        )
        assert torch.equal(given, x)
        reports.append(nmconv.get_fit(fitted))
    one, two = reports
    assert one.returned.loss == pytest.approx(two.returned.loss, rel=1e-6)
    for first, second in zip(one.units, two.units, strict=True):
        assert first.held_after == pytest.approx(second.held_after, rel=1e-6)
    tables = [
        nmconv.sensitivity(model, x, form=form, quiet=True) for model in (net, clean) for form in ("merged", "factors")
    ]
    for first, second in zip(tables[:2], tables[2:], strict=True):
        assert [one.loss for one in first.candidates] == pytest.approx(
            [one.loss for one in second.candidates], rel=1e-6
        )


# Loaders


class Ready(Dataset):
    """Its items are batches."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures) // 8

    def __getitem__(self, at):
        return self.pictures[8 * at : 8 * at + 8]


LOADERS = {
    "batches": lambda x: DataLoader(Ready(x), batch_size=None),
    "pairs of batches": lambda x: DataLoader([(x[at : at + 8], 0) for at in range(0, len(x), 8)], batch_size=None),
    "a batch sampler as sampler": lambda x: DataLoader(
        TensorDataset(x), sampler=BatchSampler(SequentialSampler(range(len(x))), 8, False), batch_size=None
    ),
    "images": lambda x: DataLoader(TensorDataset(x), batch_size=8),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_no_image_is_lost_where_data_is_large(loader, monkeypatch):
    net, x, found = small(), images(160), []
    for most in (data._MAX_BYTES, 1):
        monkeypatch.setattr(data, "_MAX_BYTES", most)
        report = nmconv.get_fit(nmconv.fit(converted(net), LOADERS[loader](x), reference=net))
        found.append((report.images, report.held, [unit.positions for unit in report.units]))
    assert found[0] == found[1] and found[0][:2] == (120, 40)


def test_a_loader_that_repeats_images_cannot_be_read_again(monkeypatch):
    monkeypatch.setattr(data, "_MAX_BYTES", 1)
    loader = DataLoader(images(40), batch_size=8, collate_fn=lambda parts: torch.stack([*parts, *parts]))
    with pytest.raises(nmconv.OptionError, match="makes 16 images of 8"):
        nmconv.fit(converted(small()), loader, reference=small())


def test_what_cannot_be_put_into_batches():
    with pytest.raises(nmconv.OptionError, match="into tensors"):
        nmconv.recalibrate_norms(small(True), Objects())


class Objects(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, at):
        return object(), at


# Images that the network does not take


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = small()[:-3], nn.Linear(6, 4)

    def forward(self, x, mask):
        return self.head((self.body(x) * mask).mean((2, 3)))


def flat():
    """It takes pictures of 12 x 12 only."""
    return nn.Sequential(*small(True)[:-3], nn.Flatten(), nn.Linear(216, 3)).eval()


CALLS = {
    "fit": lambda net, data: nmconv.fit(
        nmconv.apply_plan(net, Asked.plan, example_inputs=Asked.example), data, reference=net
    ),
    "sensitivity": lambda net, data: nmconv.sensitivity(net, data, quiet=True),
    "search": lambda net, data: nmconv.search(net, data, budget=0.7, cost="multiply_adds", quiet=True),
    "recalibrate_norms": lambda net, data: nmconv.recalibrate_norms(net, data),
}


class Asked:
    plan = None
    example = None


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", ["two inputs", "other sizes", "one of another size", "other channels"])
def test_images_that_the_network_does_not_take(call, case):
    net = Two().eval() if case == "two inputs" else flat()
    example = (images(1), torch.ones(1, 1, 1, 1)) if case == "two inputs" else images(1)
    Asked.plan, Asked.example = nmconv.make_plan(net, "2:1", example_inputs=example, keep="boundary"), example
    data = {
        "two inputs": images(),
        "other sizes": images(size=13),
        "one of another size": [images(), images(size=13)],
        "other channels": torch.randn(16, 1, 12, 12),
    }[case]
    before = state_of(net)
    with pytest.raises(nmconv.FitError, match=r"does not accept images of shape .*: give .* wrap a model"):
        CALLS[call](net, data)
    assert equal(before, state_of(net)) and not hooks_on(net)


@pytest.mark.parametrize("loss", [lambda output, wanted: None, lambda output, wanted: "much"])
def test_a_loss_that_gives_no_number(loss):
    net = small()
    with pytest.raises(nmconv.FitError, match="loss gives a"):
        nmconv.fit(converted(net), images(), reference=net, loss=loss)


def test_a_loss_that_is_no_function():
    net = small()
    for call in (
        lambda: nmconv.fit(converted(net), images(), reference=net, loss="kl"),
        lambda: nmconv.sensitivity(net, images(), loss="kl", quiet=True),
        lambda: nmconv.search(net, images(), loss="kl", budget=0.9, quiet=True),
    ):
        with pytest.raises(nmconv.OptionError, match="loss='kl'"):
            call()


def test_a_table_whose_folder_is_not_there(tmp_path):
    with pytest.raises(nmconv.FileError, match="its folder does not exist"):
        nmconv.sensitivity(small(), images(), path=tmp_path / "none" / "table.json", quiet=True)


# Budgets


@pytest.mark.parametrize(
    ("given", "amount", "part"),
    [(1.0, 1.0, True), (1, 1.0, False), (0.999, 0.999, True), (1.5, 1.5, False), (torch.tensor(0.5), 0.5, True)],
)
def test_all_of_it_is_a_part(given, amount, part):
    (budget,) = budgets_of(given, "activations")
    assert (budget.amount, budget.is_fraction) == (amount, part)


def test_several_budgets_are_a_front():
    """A looser budget never gets a plan that loses more than a tighter one's."""
    turned = 0
    for seed in (22, 29):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()]
        for _ in range(5):
            layers += [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.data *= 2
        x = torch.randn(16, 3, 12, 12)
        options = {"cost": "multiply_adds", "sensitivity": nmconv.sensitivity(net, x, quiet=True)}
        budgets = [0.5, 0.6, 0.7, 0.8, 1.0]
        told = [dict(plan.options) for plan in nmconv.search(net, x, budget=budgets, **options)]
        losses = [float(one["loss"]) for one in told]
        assert losses == sorted(losses, reverse=True) and losses[-1] == 0
        assert all(float(one["reached"]) <= budget * 1.01 for one, budget in zip(told, budgets, strict=True))
        alone = [float(dict(nmconv.search(net, x, budget=one, **options).options)["loss"]) for one in budgets]
        assert all(one <= other for one, other in zip(losses, alone, strict=True))
        turned += alone != sorted(alone, reverse=True)
    assert turned  # or this would show nothing


def test_a_budget_out_of_reach_costs_no_fit(monkeypatch):
    net, x = small(), images(16)
    table = nmconv.sensitivity(net, x, quiet=True)
    monkeypatch.setattr(api, "Fitter", None)
    with pytest.raises(nmconv.OptionError, match=r"budget=0\.001: .*can be brought to"):
        nmconv.search(net, x, budget=[0.9, 0.001], cost="multiply_adds", sensitivity=table)


# Norms that multiply by next to nothing


class Residual(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.stem, self.act0 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.head = nn.Linear(6, 5)
        self.bn2.weight.data[0], self.bn2.bias.data[0] = scale, -0.2

    def forward(self, x):
        x = self.act0(self.stem(x))
        x = self.act2(x + self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


def dropped(net, x):
    plan = nmconv.make_plan(net, "1:1", example_inputs=x)
    return nmconv.apply_plan(net, plan.edit({site.id: "drop" for site in plan.sites if site.name in ("act1", "act2")}))


@pytest.mark.parametrize(
    ("dtype", "scale", "refused"),
    [
        (torch.float32, 1e-22, False), (torch.float32, 1e-40, True), (torch.float16, 1e-4, False),
        (torch.float16, 6e-8, True), (torch.float32, 1e-3, False),
    ],
)  # fmt: skip
def test_a_norm_that_multiplies_by_next_to_nothing(dtype, scale, refused):
    """The fit is right, or refused by name; the norm's statistics follow only where its dtype holds them."""
    torch.manual_seed(0)
    net = Residual(scale).eval().to(dtype)
    x = torch.randn(24, 3, 14, 14)
    model = dropped(net, x[:1].to(dtype))
    fitted = nmconv.fit(model, x, reference=net, recalibrate=False)
    report = nmconv.get_fit(fitted)
    (unit,) = report.units
    if refused:
        assert "bn2 multiplies 1 of 6 channels by almost zero" in unit.why and str(dtype) in unit.why
        assert equal(state_of(fitted), state_of(model))
    else:
        assert unit.form == "factors" and report.returned.loss < report.converted.loss
        for value in fitted.state_dict().values():
            assert bool(torch.isfinite(value).all())


def test_a_norm_without_a_fixed_scale_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(),
                        nn.Flatten(), nn.Linear(384, 3)).eval()  # fmt: skip
    plan = nmconv.make_plan(net, "1:1", example_inputs=images(1))
    model = nmconv.apply_plan(net, plan.edit({site.id: "drop" for site in plan.sites}), example_inputs=images(1))
    whys = [unit.why for unit in nmconv.get_fit(nmconv.fit(model, images(), reference=net)).units]
    assert any("3" in why and "GroupNorm" in why for why in whys), whys


# Kernels


@pytest.mark.parametrize(
    ("full", "sizes"),
    [(3, [1, 3]), (4, [1, 2, 4]), (5, [1, 3, 5]), (6, [1, 2, 4, 6]), (1, [1]), (2, [1, 2])],
)
def test_auto_tries_every_second_size_and_one(full, sizes):
    net = nn.Sequential(nn.Conv2d(3, 4, full), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(4, 3)).eval()  # fmt: skip
    fitted = nmconv.fit(converted(net), images(), reference=net, kernel="auto")
    (unit,) = nmconv.get_fit(fitted).units
    assert [size for size, _ in unit.sizes] == [(size, size) for size in sizes] or (full == 1 and unit.kernel == (1, 1))


def test_every_kernel_of_a_patchifying_net_is_a_candidate():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 4, 2, 2), nn.ReLU(), nn.Flatten(),
                        nn.Linear(36, 3)).eval()  # fmt: skip
    assert {one.size for one in nmconv.sensitivity(net, images(24), quiet=True).candidates} >= {"1x1", "2x2"}


# Interruptions


def test_interrupted_while_hooks_are_taken_off(monkeypatch):
    """At whichever hook: none stays on either model, and both run."""
    real, reached = RemovableHandle.remove, 0
    for at in range(1, 200, 7):
        net = small(True)
        model, before, count = converted(net), state_of(net), 0

        def remove(self, at=at):
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt
            real(self)

        with monkeypatch.context() as patch:
            patch.setattr(RemovableHandle, "remove", remove)
            try:
                nmconv.fit(model, images(16), reference=net)
            except KeyboardInterrupt:
                reached += 1
        assert equal(before, state_of(net)) and hooks_on(net) <= 1 and hooks_on(model) == 0
        assert net(images(2)).shape == (2, 5)  # the hook that could not be taken off does nothing
    assert reached > 5


def test_interrupted_while_statistics_are_given_back(monkeypatch):
    net = small(True)
    model = converted(net)
    before = state_of(model)

    def interrupted(statistics):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitter, "restore_statistics", interrupted)
    monkeypatch.setattr(fitter.Fitter, "_divergence", lambda self: nmconv.fitting.Divergence(1.0, 1.0))
    with pytest.raises(KeyboardInterrupt):
        nmconv.fit(model, images(16), reference=net, inplace=True)
    assert equal(before, state_of(model)) and nmconv.get_fit(model) is None


def test_interrupted_while_recalibration_begins(monkeypatch):
    net, count, real = small(True).train(), 0, nn.Module.register_forward_pre_hook
    before = state_of(net)

    def register(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_pre_hook", register)
        with pytest.raises(KeyboardInterrupt):
            nmconv.recalibrate_norms(net, images(16))
    assert not hooks_on(net) and equal(before, state_of(net)) and net.training
    net(images(4))
    assert [module.momentum for module in net if isinstance(module, nn.BatchNorm2d)] == [0.1] * 3


# What lies outside of the units


@pytest.mark.parametrize("kernel", [None, "exact", "auto"])
def test_every_number_outside_of_the_units_stays(kernel):
    """Norms and buffers too, and of a unit in factors form all but its last convolution and norm."""
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for width in (3, 6, 6, 6, 6) for layer in
                          (nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())],
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()  # fmt: skip
    plan = nmconv.make_plan(net, "1:1", example_inputs=images(1)).edit({"8#1": "drop"})
    model = nmconv.apply_plan(net, plan)
    fitted = nmconv.fit(model, images(), reference=net, kernel=kernel, recalibrate=False)
    before, after = state_of(model), state_of(fitted)
    changed = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
    changed |= after.keys() - before.keys()
    inside = {"9", "10"} if kernel is None else {"6", "7", "9", "10"}
    assert changed and {name.partition(".")[0] for name in changed} <= inside, changed
    assert all(math.isfinite(float(value.double().sum())) for value in after.values())
    assert copy.deepcopy(fitted)(images(2)).shape == (2, 5)
