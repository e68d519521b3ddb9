"""examples/results.py: the choices that search is held against, and the tables."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import nmconv
from nmconv.finding import linear_runs, steps_of

results = pytest.importorskip("examples.results", reason="it needs timm, torchvision, accelerate and rich")
networks = pytest.importorskip("recipes.networks")
DOCS = Path(__file__).parents[2] / "docs"


def candidate(unit, size, saves, at):
    return nmconv.Candidate(
        convs=(f"layer{unit}.0.conv1", f"layer{unit}.0.conv2"), sites=(f"layer{unit}.0.act1#1",), size=size, loss=0.1,
        agreement=0.9, error=0.1, activations=1, activation_elements=9, multiply_adds=(100, 100 - saves),
        parameters=(9, 9), latency=(1.0, 0.5), first=at, last=at + 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def table():
    rows = []
    for unit in range(6):
        rows += [candidate(unit, "1x1", 90, 2 * unit), candidate(unit, "3x3", 50, 2 * unit)]
        rows += [candidate(unit, "5x5", 5, 2 * unit), candidate(unit, "none", 100, 2 * unit)]
    return nmconv.Sensitivity("Net", "f", {}, {"multiply_adds": 600.0}, rows, True)


def test_uniform_takes_evenly_spaced_units(table):
    for needed, wanted in ((50, [3]), (51, [1, 4]), (150, [1, 3, 5]), (300, [0, 1, 2, 3, 4, 5])):
        some = results.uniform_choice(table, "layer*.*", needed)
        assert [one.first // 2 for one in some] == wanted and {one.size for one in some} == {"3x3"}
    with pytest.raises(SystemExit, match="all 6 units"):
        results.uniform_choice(table, "layer*.*", 301)


def test_random_choices_meet_the_budget_and_share_no_convolution(table):
    drawn = [results.random_choice(table, 200, seed) for seed in range(20)]
    assert len({tuple((one.first, one.size) for one in some) for some in drawn}) > 10
    for some in drawn:
        assert sum(one.saves("multiply_adds") for one in some) >= 200
        assert sum(one.saves("multiply_adds") for one in some[:-1]) < 200
        assert len({one.first for one in some}) == len(some) and all(one.size != "none" for one in some)
    with pytest.raises(SystemExit, match="no random choice"):
        results.random_choice(table, 600, 0)


def test_plans_by_hand_are_what_was_measured_alone():
    torch.manual_seed(0)
    net = networks.build("cifar_resnet20", 3).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.randn(24, 3, 16, 16)
    table = nmconv.sensitivity(net, images, max_convs=2, quiet=True)
    assert [rows[0].convs for rows in results.units_of(table, "layer*.*")] == [
        (f"layer{stage}.{at}.conv1", f"layer{stage}.{at}.conv2") for stage in (1, 2, 3) for at in (0, 1, 2)
    ]
    one = next(one for one in table.candidates if one.size == "3x3")
    before = copy.deepcopy(net.state_dict())
    fitted = nmconv.fit(
        nmconv.apply_plan(net, results.plan_of(net, images[:1], [one])), images, reference=net, recalibrate=False
    )
    assert nmconv.get_fit(fitted).returned.loss == pytest.approx(one.loss, rel=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_tables_give_means_over_seeds_of_differences_within_seeds():
    rows = []
    for seed, (original, found) in enumerate(((80.0, 79.0), (82.0, 79.0))):
        key = {"net": "resnet20", "seed": seed}
        rows.append({**key, "case": "original", "name": "as trained", "accuracy": original})
        rows.append({**key, "case": "search, multiply_adds", "name": "0.9", "accuracy": found, "multiply_adds": 0.89,
                     "activations": [19, 17]})  # fmt: skip
        rows.append({**key, "case": "search, multiply_adds, downstream", "name": "0.9", "accuracy": found + 0.5})
        for draw in range(results.RANDOM_DRAWS):
            rows.append({**key, "case": "random", "name": f"0.9, draw {draw}", "accuracy": found - draw})
        rows.append({**key, "case": "alone", "name": "layer1.0", "dropped": 10.0, "recalibrated": 70.0,
                     "factors": 78.0, "factors, downstream": 78.5, "fitted": original,
                     "fitted, downstream": original + 0.5, "kernel": "3x3"})  # fmt: skip
    text = "\n".join(results.markdown(rows))
    assert "2 seeds" in text
    assert "| 0.9 | 0.890 ± 0.000 | +2.00 ± 1.41 |  | +4.00 ± 1.41 | +1.50 ± 1.41 |  | 17 of 19 / 17 of 19 |" in text
    assert (
        "| layer1.0 | +71.00 ± 1.41 | +11.00 ± 1.41 | +3.00 ± 1.41 | +2.50 ± 1.41 | +0.00 ± 0.00 | -0.50 ± 0.00 | 3x3 |"
        in text
    )
    assert "one seed" not in text and "lite0" not in text


def test_the_tables_of_the_docs_are_what_the_rows_say():
    docs = Path(results.__file__).resolve().parent.parent / "docs"
    text = "\n".join(results.markdown(results.read(docs / "results.jsonl")))
    assert (docs / "results.md").read_text().endswith(text + "\n")


def test_the_picture_is_the_same_each_time(tmp_path):
    rows = [{"net": "resnet20", "seed": 0, "case": "original", "name": "as trained", "accuracy": 80.0}]
    rows += [
        {"net": "resnet20", "seed": 0, "case": case, "name": "0.9", "accuracy": 79.0, "multiply_adds": 0.9}
        for case in ("search, multiply_adds", "uniform", "random")
    ]
    for name in ("one.svg", "two.svg"):
        results.plot(rows, tmp_path / name)
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text()
    assert "random" in (tmp_path / "one.svg").read_text()


@pytest.mark.parametrize(
    "name", ["imagenet-0-latency-0.75", "lite0-1-multiply_adds-0.65", "resnet20-0-activations-0.5"]
)
def test_a_shipped_plan_can_be_carried_out(name):
    """It fits its network, drops what it says, and each of its kernels is for convolutions that follow one another."""
    plan = nmconv.Plan.from_json((DOCS / f"plans/{name}.json").read_text())
    network = "cifar_resnet20" if name.startswith("resnet20") else "tf_efficientnet_lite0"
    model = nmconv.apply_plan(networks.build(network, 10), plan)
    assert len(nmconv.get_plan(model).changes) == len(plan.changes) > 0
    runs = [[step.name for step in steps_of(run.elements) if step.kind == "conv"] for run in linear_runs(model)]
    for kernel in plan.kernels:
        convs = list(kernel.convs)
        assert any(run[at : at + len(convs)] == convs for run in runs for at in range(len(run))), convs
