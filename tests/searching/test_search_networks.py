"""Search and fit on networks whose blocks are put together in other ways than ResNet's: what is chosen can be done."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nmconv
from nmconv.searching.search_space import SearchSpace

timm_resnet = pytest.importorskip("timm.models.resnet")


def conv(inputs=4, outputs=4, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def settled(net):
    """Norms with statistics of their own, as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return net.eval()


class InPlaceSum(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.conv1, self.act1, self.conv2, self.act2 = conv(), nn.ReLU(), conv(), last

    def forward(self, x):
        y = self.conv2(self.act1(self.conv1(x)))
        y += x
        return self.act2(y)


class Forked(nn.Module):
    """The block's input is read once more behind it."""

    def __init__(self, last):
        super().__init__()
        self.stem, self.block, self.head = conv(3), InPlaceSum(last), conv(8, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([x, self.block(x)], 1)).mean((2, 3))


class Leading(nn.Module):
    """RefineNet's unit: the activation comes first, and the shortcut passes by it."""

    def __init__(self):
        super().__init__()
        self.act1, self.conv1, self.act2, self.conv2 = nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8, 1)

    def forward(self, x):
        return x + self.conv2(self.act2(self.conv1(self.act1(x))))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        for at in range(5):
            self.add_module(f"conv{at}", conv())
        self.conv4.weight.data *= 1e-3
        self.conv4.bias.data *= 1e-3

    def forward(self, x):
        x = self.conv2(F.relu(self.conv1(F.relu(self.conv0(x)))))
        return F.relu(x + self.conv4(F.relu(self.conv3(x)))).mean((2, 3))


class Weighted(nn.Module):
    def __init__(self, sum):
        super().__init__()
        self.stem, self.conv1, self.act1, self.conv2, self.act2 = conv(), conv(), nn.ReLU(), conv(), nn.ReLU()
        self.sum = sum

    def forward(self, x):
        x = self.stem(x)
        return self.act2(self.sum(x, self.conv2(self.act1(self.conv1(x))))).mean((2, 3))


def layer(inputs, outputs, size=3):
    """In ConvMixer's order."""
    return [conv(inputs, outputs, size), nn.ReLU(), nn.BatchNorm2d(outputs)]


def act_before_norm():
    return nn.Sequential(
        *layer(3, 8), *layer(8, 8), *layer(8, 8), conv(8, 8), nn.ReLU(), conv(8, 8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def leading_activations():
    return nn.Sequential(
        conv(3, 8), Leading(), Leading(), nn.ReLU(), conv(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


def built(make):
    torch.manual_seed(0)
    return settled(make())


@pytest.fixture
def images():
    return torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", [act_before_norm, leading_activations])
def test_every_choice_can_be_done(make, images):
    net = built(make)
    table = nmconv.sensitivity(net, images, quiet=True)
    network = SearchSpace(net, images[:1], 6)
    segments = {(part.convs, part.residual is not None): part for part in network.segments}
    assert len(table.candidates) > 5
    for one in table.candidates:
        part = (segments[one.convs, one.size == "none"], "" if one.size == "none" else one.size)
        fitted = nmconv.fit(
            nmconv.apply_plan(net, network.plan_of([part])), images, reference=net, recalibrate=False
        )  # fmt: skip
        assert nmconv.get_fit(fitted).returned.loss == pytest.approx(one.loss, rel=1e-3, abs=1e-12), one.convs
    for budget in (0.9, 0.7, 0.5, 0.3):
        plan = nmconv.search(net, images, budget=budget, cost="multiply_adds", sensitivity=table, quiet=True)
        assert float(dict(plan.options)["reached"]) <= budget * 1.01


def test_a_norm_behind_a_dropped_activation_is_merged_too(images):
    torch.manual_seed(0)
    parts = [*layer(3, 8), *layer(8, 8), *layer(8, 8), *layer(8, 8)]
    net = settled(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    converted = nmconv.convert(net, "2:1", example_inputs=images[:1], keep="boundary")
    fitted = nmconv.fit(converted, images, reference=net, kernel="exact")
    assert [unit.convs for unit in nmconv.get_fit(fitted).units] == [("0", "3"), ("6", "9")]
    assert sum(isinstance(module, nn.Conv2d) for module in fitted.modules()) == 2
    last = nmconv.make_plan(net, "1:1", example_inputs=images[:1])
    dropped = nmconv.apply_plan(net, last.edit({last.sites[-1]: "drop"}))
    (unit,) = nmconv.get_fit(nmconv.fit(dropped, images, reference=net)).units
    assert unit.form == "factors" and unit.convs == ("9",) and unit.held_after < unit.held_before


@pytest.mark.parametrize("last", [nn.SiLU(inplace=True), nn.ReLU(inplace=True), nn.ReLU()])
def test_a_branch_that_goes_leaves_no_shared_memory_to_overwrite(last, images):
    net = built(lambda: Forked(last))
    table = nmconv.sensitivity(net, images, quiet=True, max_convs=2)
    (one,) = [one for one in table.candidates if one.size == "none"]
    network = SearchSpace(net, images[:1], 2)
    (part,) = [part for part in network.segments if part.residual]
    model = nmconv.apply_plan(net, network.plan_of([(part, "")]))
    x = net.stem(images)
    wanted = net.head(torch.cat([x, type(last)()(x)], 1)).mean((2, 3))
    assert torch.equal(model(images), wanted)
    assert nmconv.get_fit(nmconv.fit(model, images, reference=net)).converted.loss == pytest.approx(one.loss)
    model.train()
    model(images).sum().backward()
    assert nmconv.Plan.from_json(network.plan_of([(part, "")]).to_json()) == network.plan_of([(part, "")])


@pytest.mark.parametrize("block", [timm_resnet.BasicBlock, timm_resnet.Bottleneck])
@pytest.mark.parametrize("inplace", [True, False])
def test_timms_branches_can_go_and_the_rest_trains(block, inplace, images):
    torch.manual_seed(0)
    act = nn.ReLU if not inplace else (lambda inplace=True: nn.ReLU(inplace=True))
    net = timm_resnet.ResNet(block, (2, 1, 1), 5, channels=(8, 8, 8), stem_type="deep", stem_width=4, act_layer=act)
    net.layer4 = nn.Identity()
    net = settled(net)
    table = nmconv.sensitivity(net, images, quiet=True, max_convs=2)
    assert any(one.size == "none" and one.convs[0] == "layer1.1.conv1" for one in table.candidates)
    network = SearchSpace(net, images[:1], 2)
    (part,) = [part for part in network.segments if part.residual and part.convs[0] == "layer1.1.conv1"]
    model = nmconv.apply_plan(net, network.plan_of([(part, "")]))
    assert set(model.state_dict()) == set(net.state_dict())
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model.train()
    model(images).sum().backward()
    assert "layer1.0.conv1" in called and not [name for name in called if name.startswith("layer1.1.conv")]


@pytest.mark.parametrize("budget", [0.6, 0.5, 0.4])
def test_a_branch_goes_where_the_same_forward_loses_functional_activations(budget):
    net = built(Functional)
    x = torch.randn(24, 4, 8, 8)
    plan = nmconv.search(net, x, budget=budget, cost="multiply_adds", max_convs=2, quiet=True)
    assert float(dict(plan.options)["reached"]) <= budget * 1.01
    fitted = nmconv.fit(nmconv.apply_plan(net, plan), x, reference=net)
    assert nmconv.get_fit(fitted).returned.loss == pytest.approx(float(dict(plan.options)["loss"]), rel=1e-3)


def test_a_weighted_sum_is_no_plain_one():
    """Against the same network with the weight written as a product."""
    x = torch.randn(32, 4, 8, 8)
    found = []
    for sum in (lambda a, b: torch.add(a, b, alpha=0.1), lambda a, b: a + 0.1 * b):
        net = built(lambda sum=sum: Weighted(sum))
        plan = nmconv.make_plan(net, "1:1", example_inputs=x[:1])
        dropped = nmconv.apply_plan(net, plan.edit({site: "drop" for site in plan.sites if site.name == "act1"}))
        (unit,) = nmconv.get_fit(nmconv.fit(dropped, x, reference=net)).units
        table = nmconv.sensitivity(net, x, quiet=True)
        found.append((unit.held_after, [(one.convs, one.size) for one in table.candidates if one.size == "none"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and found[0][1] == []


def test_tables_of_something_else_are_refused(tmp_path, images):
    net, other = built(act_before_norm), built(act_before_norm)
    other[0].weight.data *= 2
    path = tmp_path / "table.json"
    table = nmconv.sensitivity(net, images, path=path, quiet=True, max_convs=3)

    def loss(output, wanted):
        return (output - wanted).square().mean()

    for changed, options in ((other, {}), (net, {"loss": loss}), (net, {"max_convs": 2}), (net, {"form": "factors"})):
        with pytest.raises(nmconv.FileError, match="was measured with"):
            nmconv.sensitivity(changed, images, path=path, quiet=True, **{"max_convs": 3, **options})
    small = images[:, :, :8, :8]
    kept = {"budget": 0.7, "cost": "multiply_adds", "quiet": True, "sensitivity": table}
    for changed, x, options in (
        (other, images, {}), (net, small, {}), (net, images, {"loss": loss}),
        (net, images, {"form": "factors", "cost": "activations"}),
    ):  # fmt: skip
        with pytest.raises(nmconv.FileError, match="was measured with"):
            nmconv.search(changed, x, **{**kept, **options})
    assert nmconv.search(net, images[:16], **kept) and nmconv.search(net, images, **kept, max_convs=5)
    plan = nmconv.search(net, images, budget=0.5, cost="activations", sensitivity=table, quiet=True)
    assert plan.kernels, "in the table's form"


def test_a_loss_with_an_offset_chooses_as_without(images):
    net = built(act_before_norm)
    net[-1].weight.data *= 100  # so that losses are no matter of float32's last digits

    def entropy(output, wanted):
        return -(wanted.softmax(1) * output.log_softmax(1)).sum(1)

    def cosine(output, wanted):
        return -F.cosine_similarity(output, wanted)

    plans = {}
    for loss in (None, entropy, cosine):
        table = nmconv.sensitivity(net, images, loss=loss, quiet=True)
        assert (table.totals["loss"] == 0) is (loss is None)
        plans[loss] = [
            nmconv.search(net, images, budget=part, cost="multiply_adds", loss=loss, sensitivity=table, quiet=True)
            for part in (0.9, 0.6, 0.3)
        ]
    assert [plan.kernels for plan in plans[entropy]] == [plan.kernels for plan in plans[None]]
    reached = [float(dict(plan.options)["reached"]) for plan in plans[cosine]]
    assert reached[0] > 0.3, "the harshest is not the best of all"


def test_outputs_that_cannot_be_compared_are_an_error(images):
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = act_before_norm()

        def forward(self, x):
            return self.net(x).argmax(1)

    net = built(Classes)
    with pytest.raises(nmconv.FitError, match="give loss="):
        nmconv.sensitivity(net, images, quiet=True)
    dropped = nmconv.convert(net, "2:1", example_inputs=images[:1], keep="boundary")
    with pytest.raises(nmconv.FitError, match="give loss="):
        nmconv.fit(dropped, images, reference=net)

    def share(output, wanted):
        return (output != wanted).float()

    assert nmconv.get_fit(nmconv.fit(dropped, images, reference=net, loss=share)).units
    with pytest.raises(nmconv.FitError, match="not finite"):
        nmconv.fit(dropped, images, reference=net, loss=lambda output, wanted: float("nan"))


def test_images_without_statistics_are_fitted_all_the_same():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.act1, self.conv2, self.act2 = conv(), nn.ReLU(), conv(), nn.ReLU()
            self.point, self.norm, self.act3, self.head = conv(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), conv(8, 4)

        def forward(self, x):
            x = self.act2(self.conv2(self.act1(self.conv1(x))))
            pooled = self.act3(self.norm(self.point(F.adaptive_avg_pool2d(x, 1))))
            return self.head(torch.cat([x, F.interpolate(pooled, x.shape[2:], mode="bilinear")], 1))

    net = built(Pooled)
    images = [torch.randn(1, 4, 8 + at % 5, 8 + at % 7) for at in range(24)]
    plan = nmconv.make_plan(net, "1:1", example_inputs=images[0])
    dropped = nmconv.apply_plan(net, plan.edit({site: "drop" for site in plan.sites if site.name == "act1"}))
    before = dropped.norm.running_mean.clone()
    for recalibrate in (True, False):
        fitted = nmconv.fit(dropped, images, reference=net, recalibrate=recalibrate)
        report = nmconv.get_fit(fitted)
        assert report.recalibrated.loss != report.recalibrated.loss and not report.norms_recalibrated
        assert report.returned.loss < report.converted.loss
        assert torch.equal(fitted.norm.running_mean, before)
    with pytest.raises(nmconv.FitError, match="no statistics"):
        nmconv.recalibrate_norms(dropped, images)


def test_kernels_that_are_too_large_to_fit_at_once_are_left_out(images, monkeypatch):
    net = built(act_before_norm)
    every = nmconv.sensitivity(net, images, quiet=True, backend="eager", max_convs=2)
    monkeypatch.setattr("nmconv.fitting.samples._MAX_COLUMNS", 100)
    some = nmconv.sensitivity(net, images, quiet=True, backend="eager", max_convs=2)
    sizes = [{one.size for one in table.candidates if one.convs == ("3", "6")} for table in (every, some)]
    assert sizes == [{"1x1", "3x3", "5x5"} & sizes[0], {"1x1", "3x3"}] and "5x5" in sizes[0]
