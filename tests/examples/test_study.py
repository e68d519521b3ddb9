"""The study's own trials, routes and insights, on a few of scikit-learn's digits."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("accelerate")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from recipes import insight, study, study_tables, trial
from recipes.networks import build
from recipes.recipe import Recipe
from recipes.report import read_rows
from recipes.routes import ROUTES
from recipes.trial import Trial
from safetensors.torch import save_file

import nmconv

RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05)
SMALL = {"model": "cifar_resnet8", "dataset": "digits", "size": 16, "held_back": 20}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An ImageFolder of 100 digits to train on and 20 to test on."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("data")
    digits = load_digits()
    for label in range(10):
        own = digits.images[digits.target == label][:12]
        for i, pixels in enumerate(own):
            folder = root / "digits" / ("train" if i < 10 else "test") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((16, 16)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """Weights of a network, where the study keeps them."""
    monkeypatch.setattr(trial, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    torch.manual_seed(0)
    save_file(Trial(**SMALL).network(10).state_dict(), tmp_path / "weights" / "start.safetensors")
    return "start.safetensors"


@pytest.mark.parametrize("one", study.long(), ids=lambda one: f"seed {one.recipe.seed}")
def test_the_committed_weights_are_those_of_the_study(one):
    updates = one.recipe.epochs * (45_000 // one.recipe.batch_size)
    path = trial.WEIGHTS / f"{one.model}-{one.recipe.seed}.safetensors"
    model, fresh = build(one.model, 10, path), one.network(10)
    for (name, trained), (_, drawn) in zip(model.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert trained.isfinite().all() and not torch.equal(trained, drawn), name
        assert not name.endswith("num_batches_tracked") or trained == updates


@pytest.mark.parametrize("route", ROUTES)
def test_each_route_ends_where_it_should(root, weights, tmp_path, route):
    recipe = replace(RECIPE, distill=0.5)
    half = {} if route == "longer" else {"ratio": "2:1", "keep": "first"}
    one = Trial(**SMALL, route=route, weights=weights, recipe=recipe, **half)
    row = trial.run(one, root, tmp_path / "rows", tmp_path / "work")
    assert row["activations"] == (7 if route == "longer" else 4) and row["convolutions"] == 9
    assert ("untrained" in row) == (not route.startswith("iterative"))
    assert len(row["losses"]) == len(row["curve"]) == 3
    assert json.loads((tmp_path / "rows" / f"{one.name}.json").read_text()) == json.loads(json.dumps(row))
    (tmp_path / "rows" / f"{one.name}.json").unlink()
    again = trial.run(one, root, tmp_path / "rows", tmp_path / "work")  # from its checkpoints: nothing is trained
    assert [again[key] for key in ("test", "held_back", "losses")] == [
        row[key] for key in ("test", "held_back", "losses")
    ]


def test_the_ends_and_ratios_are_what_they_are_called():
    """Counted by hand: 9 blocks of two convolutions, a stem's activation in front, two projections."""
    dropped = {}
    for name, one in study.RATIOS.items():
        plan = one.plan(one.network(10))
        dropped[name] = [site.id for site in plan.changes]
        assert plan.counts.convs == 21
    assert dropped["1:1"] == dropped["Leaky ReLU 0.1"] == []
    assert all(".act1#" in each for each in dropped["2:1 boundary"]) and len(dropped["2:1 boundary"]) == 9
    assert dropped["2:1 boundary, hoisted"] == dropped["2:1 boundary"]
    assert all(".act2#" in each for each in dropped["2:1 first"]) and len(dropped["2:1 first"]) == 9
    assert [each.partition("#")[0] for each in dropped["3:2 first"]] == [f"{b}.act2" for b in study.BLOCKS[::2]]
    assert len(dropped["4:1 first"]) == 14
    leaky = study.RATIOS["Leaky ReLU 0.1"].network(10)
    assert sum(isinstance(module, torch.nn.LeakyReLU) for module in leaky.modules()) == 19
    assert not any(isinstance(module, torch.nn.ReLU) for module in leaky.modules())


def test_other_sizes_and_families_are_what_they_are_called():
    """From 1:1 to 2:1; a 2:1 of ResNets keeps the stem's activation and one of each block."""
    counts = {}
    for one in [*study.sizes(seeds=1), *study.families()]:
        plan = one.plan(one.network(10))
        counts.setdefault((one.model, *one.options), []).append(plan.counts.activations_after)
    assert counts == {
        ("cifar_resnet8",): [7, 4],
        ("cifar_resnet32",): [31, 16],
        ("cifar_resnet20", "width"): [19, 10],
        ("cifar_alexnet",): [5, 4, 4],
        ("cifar_vgg11_bn",): [8, 5, 5],
        ("cifar_mobilenetv2",): [35, 18, 18],
        ("cifar_densenet",): [98, 50],
        ("cifar_inception",): [19, 11],
    }
    names = [one.name for study_of in study.STUDIES.values() for one in study_of()]
    assert len(set(names)) == len(names) - 3  # "longer" is the same whichever end stays


@pytest.mark.parametrize(
    "model, convolutions, units",  # of the ResNet: a stem and nine blocks
    [("cifar_resnet20", 21, 10), ("cifar_vgg11_bn", 8, 5), ("cifar_alexnet", 5, 4)],
)
def test_what_merges(model, convolutions, units):
    """What the study says of merging: nothing without hoisted padding, one convolution for each unit with it."""

    def merged(name):
        network = replace(study.RATIOS[name], model=model).converted(10).eval()
        network = nmconv.merge(network, gate="always", example_inputs=torch.zeros(1, 3, 32, 32))
        return sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())

    for name in ("2:1 first", "2:1 boundary"):
        with pytest.warns(nmconv.NoEffectWarning):
            assert merged(name) == convolutions
    assert merged("2:1 boundary, hoisted") == units


def row_of(one, test):
    return {
        "name": one.name,
        "trial": json.loads(json.dumps(asdict(one))),
        "test": test,
        "held_back": test + 1,
    } | dict.fromkeys(("convolutions", "activations", "activation_values", "multiply_adds"), 10)


def test_tables_of_sizes_and_families():
    rows = [row_of(one, 50 + number + number**2 / 100) for number, one in enumerate(study.sizes())]
    text = study_tables.sizes(rows, [])
    assert text.count("| +1.") == 3 and text.count("| 2 | 10 |") == 6 and "| ResNet-32 | 2:1 first | 2 |" in text
    text = study_tables.families([row_of(one, 60.0) for one in study.families()[:4]], [])
    assert text.count("AlexNet") == 3 and "| VGG-11-BN | 1:1 | 10 | 10 | 0 | 45,000 | 61.00 | 60.00 |" in text


def test_insights_of_a_trained_trial(root, tmp_path, monkeypatch):
    monkeypatch.setattr(insight, "MEMBERS", 3)
    recipe = replace(RECIPE, epochs=4)
    for one in (Trial(**SMALL, recipe=recipe), Trial(**SMALL, ratio="2:1", keep="first", recipe=recipe)):
        trial.run(one, root, tmp_path / "rows", tmp_path / "work")
        found = insight.insights(one, root, tmp_path / "insights", tmp_path / "work")
        assert [row["epoch"] for row in found][:4] == [1, 2, 4, 4]
        assert len(found[0]["sites"]) == (7 if one.ratio == "1:1" else 4)
        again = insight.insights(one, root, tmp_path / "insights", tmp_path / "work")
        assert again == json.loads(json.dumps(found))
    rows = read_rows(tmp_path / "insights")
    members = [row for row in rows if row["kind"].startswith("members")]
    assert sorted(row["slope"] for row in members) == [0.1, 0.3] and all(len(row["kept"]) == 3 for row in members)
    assert "| 1:1 | 4 | 1 |" in study_tables.activations([], rows) and "| 1:1 | 0.3 | 1 |" in study_tables.members(
        [], rows
    )

    monkeypatch.setattr(trial, "WEIGHTS", tmp_path / "kept")
    insight.keep_weights([Trial(**SMALL, recipe=recipe)], tmp_path / "work", tmp_path / "kept")
    kept = Trial(**SMALL, weights="cifar_resnet8-0.safetensors").network(10).state_dict()
    last = torch.load(tmp_path / "work" / Trial(**SMALL, recipe=recipe).name / "epoch-4.pt", weights_only=True)
    assert all(torch.equal(value, last[key]) for key, value in kept.items())


def test_tables_of_no_rows_say_so():
    for name, table in study_tables.TABLES.items():
        if name != "learning-rates":
            assert table([], []) == "Not measured yet."
