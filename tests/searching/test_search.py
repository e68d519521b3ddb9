"""Choosing by measurement: the dynamic programme against enumeration, each candidate against real surgery."""

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock

import nmconv
from nmconv.observing import read_images
from nmconv.searching import cost, joint_search
from nmconv.searching.ablation import Ablation
from nmconv.searching.budget import budgets_of
from nmconv.searching.pareto import Option, choose, frontier
from nmconv.searching.search_space import SearchSpace
from nmconv.timing import Timing


class Small(nn.Module):
    """Residual blocks with an activation behind the sum, and linear bottlenecks; a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(
            BasicBlock(8, 8),
            InvertedResidual(8, 8, 1, 4),
            InvertedResidual(8, 12, 2, 4),
            InvertedResidual(12, 12, 1, 4),
        )
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def trained_looking(net, seed=0):
    """Norms with statistics and scales of their own, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.running_mean.shape
            module.running_mean.copy_(torch.randn(size, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(size, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(size, generator=generator) * 0.2)
    return net.eval()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return trained_looking(Small())


@pytest.fixture(scope="module")
def images():
    return torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def table(net, images):
    return nmconv.sensitivity(net, images, quiet=True)


# -- the dynamic programme -------------------------------------------------------------------------------------------

spans = st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 9), st.integers(1, 9))


@settings(max_examples=200, deadline=None)
@given(st.lists(spans, max_size=8), st.integers(0, 30))
def test_the_choice_is_the_best_of_all(parts, needed):
    options = [Option(first, first + more, float(loss), float(saves)) for first, more, loss, saves in parts]

    def apart(chosen):
        places = [set(range(options[at].first, options[at].last + 1)) for at in chosen]
        return sum(map(len, places)) == len(set().union(*places))

    sets = [
        chosen
        for count in range(len(options) + 1)
        for chosen in itertools.combinations(range(len(options)), count)
        if apart(chosen)
    ]
    enough = [chosen for chosen in sets if sum(options[at].saves for at in chosen) >= needed]
    found = choose(frontier(options), needed)
    if not enough:
        assert found is None
        return
    assert found is not None and apart(found)
    assert sum(options[at].saves for at in found) >= needed
    least = min(sum(options[at].loss for at in chosen) for chosen in enough)
    assert sum(options[at].loss for at in found) == least


@settings(max_examples=50, deadline=None)
@given(st.lists(spans, max_size=8))
def test_the_frontier_is_all_that_nothing_beats(parts):
    options = [Option(first, first + more, float(loss), float(saves)) for first, more, loss, saves in parts]
    found = frontier(options)
    assert found[0][1] >= 0
    for (loss, saves, chosen), (loss2, saves2, _) in itertools.pairwise(found):
        assert loss < loss2 or saves < saves2
        assert saves < saves2
        assert loss == sum(options[at].loss for at in chosen)


# -- candidates ------------------------------------------------------------------------------------------------------


def test_every_segment_is_a_linear_run_when_its_plan_is_applied(net, images):
    network = SearchSpace(net, images[:1], 6)
    assert len(network.segments) > 8
    for segment in network.segments:
        model = nmconv.apply_plan(net, network.plan_of([(segment, "")]))
        if segment.residual is not None:
            continue
        runs = [",".join(run.convs) for run in nmconv.find_runs(model)]
        assert any(",".join(segment.convs) in run for run in runs), segment.convs


def test_segments_cross_units_and_modules(net, images):
    names = [segment.convs for segment in SearchSpace(net, images[:1], 6).segments]
    assert ("blocks.0.conv1", "blocks.0.conv2") in names
    crossing = [convs for convs in names if len({conv.split(".")[1] for conv in convs if "." in conv}) > 1]
    assert crossing
    assert all(len(convs) <= 6 for convs in names)


def test_a_candidate_measured_alone_is_what_surgery_makes_of_it(net, images):
    """The oracle: convert, fit and run; the measurement only replaces one value of the original."""
    network = SearchSpace(net, images[:1], 6)
    pictures = read_images(images, net, holdout=0.25)
    alone = Ablation(network, pictures, None)
    merged = [part for part in network.segments if part.residual is None and part.sizes()]
    assert len(merged) > 5
    for segment in merged[::2]:
        size = segment.sizes()[0]
        (found,) = alone.measure_merged(segment, [size])
        plan = network.plan_of([(segment, "x".join(map(str, size)))])
        model = nmconv.fit(nmconv.apply_plan(net, plan), images, reference=net, recalibrate=False)
        report = nmconv.get_fit(model)
        assert len(report.units) == 1
        assert report.units[0].held_after == pytest.approx(found.error, rel=1e-6)
        assert report.fitted.loss == pytest.approx(found.divergence.loss, rel=1e-3, abs=1e-7)


def test_a_branch_that_goes_is_what_surgery_makes_of_it(net, images):
    network = SearchSpace(net, images[:1], 6)
    pictures = read_images(images, net, holdout=0.25)
    alone = Ablation(network, pictures, None)
    gone = [part for part in network.segments if part.residual is not None]
    assert [part.convs[0].split(".")[1] for part in gone] == ["0", "1", "3"]
    held = torch.cat([batch for batch, _ in pictures.batches(held=True)])
    for segment in gone:
        plan = network.plan_of([(segment, "")])
        model = nmconv.apply_plan(net, plan)
        assert set(model.state_dict()) == set(net.state_dict())
        called: list[int] = []
        for conv in segment.convs:
            model.get_submodule(conv).register_forward_hook(lambda *_, called=called: called.append(1))
        with torch.no_grad():
            one, two = model(held).double().log_softmax(1), net(held).double().log_softmax(1)
        assert not called
        loss = float((two.exp() * (two - one)).sum() / len(held))
        assert alone.measure_removed(segment).divergence.loss == pytest.approx(loss, rel=1e-4, abs=1e-7)
        counts = plan.counts
        assert counts.activations_before - counts.activations_after == segment.activations > 0
        again = nmconv.Plan.from_json(plan.to_json())
        assert again == plan
        with torch.no_grad():
            assert torch.equal(nmconv.apply_plan(net, again)(held), nmconv.apply_plan(net, plan)(held))


# -- the table -------------------------------------------------------------------------------------------------------


def test_measuring_leaves_the_network_as_it_was(images):
    torch.manual_seed(0)
    net = trained_looking(Small())
    net.blocks[1].train()
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    nmconv.sensitivity(net, images[:16], quiet=True, max_convs=3, backend="eager")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert nmconv.get_plan(net) is None


def test_the_table_is_tidy_and_counts_right(net, images, table):
    assert table.complete
    assert table.totals["activations"] == nmconv.make_plan(net, "1:1").counts.activations_before
    assert math.isnan(table.totals["latency"])
    for one in table.candidates:
        assert one.loss >= 0 and 0 <= one.agreement <= 1
        if one.size != "none":
            assert one.multiply_adds[0] >= 1.05 * one.multiply_adds[1] > 0
        assert one.activations >= 1 and one.activation_elements > 0
    rows = table.rows()
    assert len(rows) == len(table.candidates)
    assert len({tuple(row) for row in rows}) == 1
    block = next(
        one for one in table.candidates if one.convs == ("blocks.0.conv1", "blocks.0.conv2") and one.size == "3x3"
    )
    assert block.multiply_adds == (2 * 8 * 8 * 9 * 144, 8 * 8 * 9 * 144)
    assert block.activation_elements == 8 * 144


def test_a_table_goes_to_a_file_and_back_and_is_resumed(net, images, table, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    from nmconv.searching import measure_candidates

    real, count = measure_candidates._candidates_of, 0

    def failing(*args):
        nonlocal count
        count += 1
        if count > 4:
            raise KeyboardInterrupt
        yield from real(*args)

    monkeypatch.setattr(measure_candidates, "_candidates_of", failing)
    with pytest.raises(KeyboardInterrupt):
        nmconv.sensitivity(net, images, quiet=True, path=path)
    part = nmconv.Sensitivity.load(path)
    assert part.candidates and not part.complete
    monkeypatch.setattr(measure_candidates, "_candidates_of", real)
    whole = nmconv.sensitivity(net, images, quiet=True, path=path)
    assert whole.complete
    assert [(one.convs, one.size) for one in whole.candidates] == [(one.convs, one.size) for one in table.candidates]
    assert nmconv.Sensitivity.load(path).rows() == whole.rows() or any(
        math.isnan(one.latency[0]) for one in whole.candidates
    )
    with pytest.raises(nmconv.FileError, match="another path"):
        nmconv.sensitivity(net, images[:20], quiet=True, path=path)


def test_a_file_that_is_no_table_is_refused(net, images, tmp_path):
    path = tmp_path / "table.json"
    for text in ("", "{}", "[1]", '{"nmconv_sensitivity": 99}', '{"nmconv_sensitivity": 1, "candidates": [{"a": 1}]}'):
        path.write_text(text)
        with pytest.raises(nmconv.FileError, match="measure again"):
            nmconv.sensitivity(net, images, path=path)


def test_the_table_can_be_plotted(table):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    axes = table.plot()
    assert len(axes.collections) == len({one.size for one in table.candidates})


# -- the search ------------------------------------------------------------------------------------------------------


def test_a_plan_within_the_budget_is_found_and_reaches_it(net, images, table):
    from torch.utils.flop_counter import FlopCounterMode

    plans = nmconv.search(net, images, budget=[0.9, 0.7, 0.5], cost="multiply_adds", sensitivity=table)
    losses = []
    for plan, budget in zip(plans, (0.9, 0.7, 0.5), strict=True):
        assert plan == nmconv.Plan.from_json(plan.to_json())
        model = nmconv.fit(nmconv.apply_plan(net, plan), images, reference=net)
        counts = []
        for one in (net, model):
            with FlopCounterMode(display=False) as flops, torch.no_grad():
                one(images[:1])
            counts.append(flops.get_total_flops())
        assert counts[1] <= budget * counts[0]
        told = dict(plan.options)
        assert float(told["reached"]) == pytest.approx(counts[1] / counts[0], abs=1e-3)
        assert float(told["loss"]) == pytest.approx(nmconv.get_fit(model).returned.loss, rel=1e-2)
        losses.append(float(told["loss"]))
    assert losses[0] <= losses[2]


def test_the_search_finds_the_best_of_all_choices(net, images, table):
    """One round, so that the choice is by the table alone: no other set of candidates loses less."""
    budget = 0.75
    plan = nmconv.search(net, images, budget=budget, cost="multiply_adds", sensitivity=table, rounds=1)
    chosen = {kernel.convs: kernel.size for kernel in plan.kernels} | {branch.convs: "none" for branch in plan.branches}
    taken = [one for one in table.candidates if chosen.get(one.convs) == one.size]
    assert len(taken) == len(chosen)
    needed = (1 - budget) * table.totals["multiply_adds"]
    least = math.inf
    pool = [one for one in table.candidates if one.saves("multiply_adds") > 0]
    for count in (1, 2, 3):
        for some in itertools.combinations(pool, count):
            spans = sorted((one.first, one.last) for one in some)
            if any(one[1] >= two[0] for one, two in itertools.pairwise(spans)):
                continue
            if sum(one.saves("multiply_adds") for one in some) >= needed:
                least = min(least, sum(one.loss for one in some))
    assert sum(one.loss for one in taken) <= least * (1 + 1e-9)


def test_activations_are_chosen_in_factors_form(net, images):
    plan = nmconv.search(net, images, budget=0.5, cost="activations", quiet=True)
    assert not plan.kernels
    counts = plan.counts
    assert counts.activations_after <= 0.5 * counts.activations_before
    model = nmconv.fit(nmconv.apply_plan(net, plan), images, reference=net)
    assert set(model.state_dict()) == set(net.state_dict())


def test_latency_is_measured(net, images):
    plan = nmconv.search(net, images, budget=0.97, cost="latency", quiet=True, rounds=1, max_convs=3)
    assert dict(plan.options)["search"] == "latency 0.97"
    timed = nmconv.sensitivity(net, images, backend="eager", quiet=True, max_convs=3)
    assert all(0 < one.latency[0] < timed.totals["latency"] for one in timed.candidates)
    assert {"none", "3x3"} <= {one.size for one in timed.candidates}
    assert all((one.latency[1] == 0) is (one.size == "none") for one in timed.candidates)
    assert plan.kernels or plan.branches


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("8 ms", 0.008),
        ("8ms", 0.008),
        (" .5 MS ", 0.0005),
        ("2.5e2 us", 0.00025),
        ("7 µs", 7e-6),
        ("1 s", 1.0),
    ],
)
def test_a_budget_with_its_unit(given, seconds):
    (budget,) = budgets_of(given, "latency")
    assert budget.of(0.5) == pytest.approx(seconds, rel=1e-12) and not budget.is_fraction
    assert budgets_of(budget.text(), "latency")[0].amount == budget.amount  # as it is written in a plan


def test_a_latency_in_milliseconds(net, images):
    """The same as the part of the original's latency that it is, and an error that tells both."""
    table = nmconv.sensitivity(net, images, backend="eager", quiet=True, max_convs=3)
    total = table.totals["latency"]
    saves = frontier([Option(one.first, one.last, 0.0, one.saves("latency")) for one in table.candidates
                      if one.saves("latency") > 0])[-1][1]  # fmt: skip
    budget = f"{1e3 * (total - 0.1 * saves):.6f} ms"
    options = {"cost": "latency", "sensitivity": table, "quiet": True}
    try:
        plan, other = nmconv.search(net, images, budget=(budget, "9 s"), **options)
    except nmconv.OptionError as error:  # what was promised is not always there: then it says so
        assert repr(budget) in str(error) and "choices that were measured" in str(error)
    else:
        assert dict(plan.options)["search"] == f"latency {budget}" and plan.ratio == f"{budget} of latency"
        assert float(dict(plan.options)["reached"]) <= (1 - 0.1 * saves / total) * 1.01
        assert not other.changes and not other.kernels
    told = r"budget='1 us': (.*seconds of latency, that is 0\.\d+ of it|the best of \d+ choices that were measured)"
    with pytest.raises(nmconv.OptionError, match=told):
        nmconv.search(net, images, budget="1 us", **options)


@pytest.mark.parametrize(
    "bad", ["8", "ms", "-8 ms", "8 ms 2", "8 min", "1e999 s", "nan ms", "inf s", "", b"8 ms", ["8 ms", "x"]]
)
def test_times_that_are_none(net, images, bad):
    with pytest.raises(nmconv.OptionError, match=r'budget=.*such as "8 ms"'):
        nmconv.search(net, images, budget=bad, cost="latency")


def test_a_time_is_no_number_of_multiply_adds(net, images, table):
    with pytest.raises(nmconv.OptionError, match="budget='8 ms' is a time, and cost='multiply_adds' is not"):
        nmconv.search(net, images, budget="8 ms", cost="multiply_adds", sensitivity=table)


def test_a_budget_of_all_changes_nothing(net, images, table):
    total = int(table.totals["multiply_adds"])
    plan = nmconv.search(net, images, budget=total, cost="multiply_adds", sensitivity=table)
    assert not plan.changes and not plan.kernels and not plan.branches


def test_what_cannot_be_met_says_what_can(net, images, table):
    with pytest.raises(nmconv.OptionError, match="can be brought to"):
        nmconv.search(net, images, budget=0.01, cost="multiply_adds", sensitivity=table)


@pytest.mark.parametrize("part", [0.2, 0.4, 0.9, 0.02])
def test_savings_that_do_not_add_up(net, images, table, part, monkeypatch):
    """A choice that saves less than its candidates is corrected for, or the budget is refused: never passed over."""
    tried = []

    def measure(self, chosen):
        saved = part * sum(self._candidates[at].saves("multiply_adds") for at in chosen)
        tried.append(1 - saved / self._total)
        return joint_search.MeasuredChoice(chosen, self.plan_of(chosen), 1.0 * len(chosen), self._total - saved)

    monkeypatch.setattr(joint_search.JointSearch, "_measure", measure)
    options = {"cost": "multiply_adds", "sensitivity": table, "rounds": 2}
    if part == 0.02:
        with pytest.raises(nmconv.OptionError, match=r"reached 0\.9\d+ of the multiply_adds"):
            nmconv.search(net, images, budget=0.85, **options)
        assert len(tried) > 1 and min(tried) > 0.9
    else:
        most = frontier([Option(one.first, one.last, 0.0, one.saves("multiply_adds")) for one in table.candidates])
        budget = max(0.85, 1 - 0.99 * part * most[-1][1] / table.totals["multiply_adds"])  # at times all that there is
        plan = nmconv.search(net, images, budget=budget, **options)
        assert tried[0] > budget + 0.01 or part == 0.9
        assert len(tried) <= 4
        assert float(dict(plan.options)["reached"]) <= budget * 1.01


@pytest.mark.parametrize("lie", [-0.5, 0.0, 0.001])
def test_one_disturbed_measurement_does_not_ask_for_everything(net, images, table, lie, monkeypatch):
    saved = []

    def measure(self, chosen):
        promised = sum(self._candidates[at].saves("multiply_adds") for at in chosen)
        saved.append(promised)
        found = promised if len(saved) > 1 else lie * promised
        return joint_search.MeasuredChoice(chosen, self.plan_of(chosen), 1.0 * len(chosen), self._total - found)

    monkeypatch.setattr(joint_search.JointSearch, "_measure", measure)
    plan = nmconv.search(net, images, budget=0.9, cost="multiply_adds", sensitivity=table)
    options = [Option(one.first, one.last, 0.0, one.saves("multiply_adds")) for one in table.candidates]
    assert saved[0] < saved[1] < 2 * saved[0] < frontier(options)[-1][1]
    assert float(dict(plan.options)["reached"]) <= 0.9 * 1.01


def test_the_whole_is_compared_round_by_round(net, images, monkeypatch):
    """A machine that slows down while it times slows both sides."""
    times = [Timing((1.0, 1.0, 9.0, 9.0, 9.0)), Timing((0.5, 0.5, 4.5, 4.5, 4.5))]
    monkeypatch.setattr(cost, "time_interleaved", lambda runners, **_: times[: len(runners)])
    watch = cost.Stopwatch(None, images[:1], "eager")
    assert watch.speedup(net, net) == pytest.approx(2.0)
    times[1] = Timing((0.5, 0.5, 0.5, 4.5, 4.5))  # 9 over 0.5 by the medians
    assert watch.speedup(net, net) == pytest.approx(2.0)


def test_a_loss_of_ones_own(net, images):
    seen = []

    def loss(output, wanted):
        seen.append(output.shape)
        return (output - wanted).abs().mean(1)

    table = nmconv.sensitivity(net, images, loss=loss, quiet=True, max_convs=2)
    assert seen and all(one.loss >= 0 for one in table.candidates)


@pytest.mark.parametrize(
    "bad",
    [
        {"cost": "time"},
        {"backend": "tpu"},
        {"budget": -1},
        {"budget": "half"},
        {"budget": []},
        {"budget": True},
        {"rounds": 0},
        {"form": "both"},
        {"form": "factors", "cost": "multiply_adds"},
        {"max_convs": 0},
        {"holdout": 0},
    ],
)
def test_options_that_are_none(net, images, bad):
    with pytest.raises(nmconv.OptionError, match=str(next(iter(bad)))):
        nmconv.search(net, images, **{"budget": 0.5, "cost": "multiply_adds", **bad})


def test_another_networks_table_is_refused(net, images, table):
    with pytest.raises(nmconv.FileError, match="measure this one"):
        nmconv.search(nn.Sequential(*net.stem, *copy.deepcopy(net.stem)[:0], nn.Conv2d(8, 8, 1), nn.ReLU()), images,
                      budget=0.5, cost="multiply_adds", sensitivity=table)  # fmt: skip


def test_a_table_without_latency_is_no_basis_for_latency(net, images, table):
    with pytest.raises(nmconv.OptionError, match="has no latency"):
        nmconv.search(net, images, budget=0.5, cost="latency", sensitivity=table)


def test_other_costs_and_tables_are_refused(net, images, table):
    for call in (table.plot, table.candidates[0].saves):
        with pytest.raises(nmconv.OptionError, match="cost='flops': give one of"):
            call("flops")
    with pytest.raises(nmconv.OptionError, match=r"sensitivity is a dict: give what nmconv\.sensitivity"):
        nmconv.search(net, images, budget=0.5, sensitivity={})


def test_advice_is_what_search_can_do(images):
    with pytest.raises(nmconv.NoSitesError, match="belongs to a convolution") as caught:
        nmconv.search(nn.Sequential(nn.Conv2d(3, 3, 1)), images, budget=0.5, cost="multiply_adds")
    assert "linear=True" not in str(caught.value)


def test_a_plan_can_be_kept_as_text(net, images, table):
    plan = nmconv.search(net, images, budget=0.8, cost="multiply_adds", sensitivity=table)
    text = plan.to_json()
    assert json.loads(text)["kernels"] or json.loads(text)["branches"]
    assert "multiply_adds" in str(plan)


def test_a_table_prints_its_candidates_by_loss():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
    table = nmconv.sensitivity(model, torch.randn(16, 3, 12, 12), quiet=True)
    title, header, *rows = str(table).splitlines()
    assert title == f"Sequential: {len(table.candidates)} candidates and what each one saves, by loss"
    assert header.split()[:2] == ["convolutions", "kernel"]
    sizes = [one.size for one in sorted(table.candidates, key=lambda one: one.loss)]
    assert [row.split()[3] for row in rows] == sizes
    assert "nan" not in str(table)
