"""examples/sweep.py: rows, their report, and Ray."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("accelerate")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from recipes import report
from recipes.recipe import Recipe
from recipes.trial import Trial, asdict, trial_from

from examples import sweep

ROOT = Path(__file__).resolve().parents[2]


def row(accuracy, trial=None, seed=0, **more):
    trial = report.with_seed(trial or Trial(), seed)
    counts = {"convolutions": 21, "activations": 19, "activation_values": 1000, "multiply_adds": 4, "parameters": 3}
    told = json.loads(json.dumps(asdict(trial)))
    return {"name": trial.name, "trial": told, "test": accuracy, "held_back": accuracy + 1, **counts, **more}


HALF = Trial(ratio="2:1", keep="first")


def test_a_trials_name_is_its_configuration():
    assert Trial().name == Trial().name == trial_from(json.loads(json.dumps(asdict(Trial())))).name
    others = [HALF, Trial(keep="first"), Trial(drop=("a",)), Trial(recipe=Recipe(seed=1)), Trial(options={"width": 2})]
    assert len({trial.name for trial in [Trial(), *others]}) == 6
    assert trial_from(json.loads(json.dumps(asdict(others[2])))) == others[2]


def test_differences_are_paired_by_seed():
    """By hand: differences 1, 2, 3 have the mean 2, the deviation 1, and t(0.975, 2) = 4.302653."""
    rows = [row(each, seed=seed) for seed, each in enumerate((80, 70, 60, 10))]
    rows += [row(each, HALF, seed) for seed, each in enumerate((81, 72, 63))]
    one, half = report.table(rows)
    assert (one["label"], half["label"]) == ("cifar_resnet20 1:1", "cifar_resnet20 2:1 first")
    assert one["mean"] == 55 and "difference_mean" not in one
    assert half["difference_mean"] == 2 and half["difference_seeds"] == 3
    assert half["difference_half"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert half["difference_p"] == pytest.approx(0.0741799, rel=1e-5)  # of t = 2·√3 with 2 degrees of freedom
    assert half["difference_holm"] == half["difference_p"]
    assert report.table(rows, "held_back")[0]["mean"] == 56


def test_one_seed_has_a_difference_and_no_interval():
    rows = [row(80), row(81, HALF)]
    line = report.table(rows)[1]
    assert line["difference_mean"] == 1 and math.isnan(line["difference_half"]) and "difference_holm" not in line
    assert "+1.00 |" in report.as_markdown([line])


def test_other_recipes_are_other_originals():
    longer = replace(HALF, recipe=Recipe(epochs=30))
    assert "difference_mean" not in report.table([row(80), row(81, longer)])[1]


def test_holms_correction():
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert report.holm([0.5, 0.9]) == [1, 1]
    assert report.holm([]) == []


def test_the_pareto_front():
    points = [(3, 90), (1, 80), (2, 79), (2, 85), (4, 90), (1, 70)]
    assert report.pareto(points) == [1, 3, 0]


def test_the_plot(tmp_path):
    small = Trial(model="cifar_resnet8")
    half = replace(small, ratio="2:1", keep="boundary", relocate=True)
    rows = [row(80 + seed, small, seed) for seed in range(3)] + [row(79, half, activations=4)]
    report.plot(report.table(rows), tmp_path / "plots" / "sweep.svg")
    text = (tmp_path / "plots" / "sweep.svg").read_text()
    assert "cifar_resnet8 2:1 boundary relocate" in text and "latency" not in text
    timed = report.table(rows, latency=True)
    assert timed[0]["latency"] == pytest.approx(1, abs=0.5) and timed[1]["latency"] > 0
    report.plot(timed, tmp_path / "timed.svg")
    assert "latency" in (tmp_path / "timed.svg").read_text()


# Ray


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from PIL import Image

    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, each in (("train", 12), ("test", 4)):
        for label in ("ant", "bee"):
            (root / "pictures" / split / label).mkdir(parents=True)
            for i in range(each):
                pixels = draw.integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "pictures" / split / label / f"{i}.png")
    return root


def test_a_sweep_keeps_its_rows_and_names_what_failed(pictures, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    flags = ["--data-dir", str(pictures), "--dataset", "pictures", "--size", "16", "--held-back", "4", "--seeds", "1"]
    flags += ["--epochs", "1", "--batch-size", "4", "--rows", "rows", "--ratios", "2:1", "--keep", "first"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/sweep.py"), "run", *flags, "--models", "cifar_resnet8", "nonsense"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stderr
    (row,) = report.read_rows(tmp_path / "rows")
    assert (row["trial"]["model"], row["activations"], len(row["losses"])) == ("cifar_resnet8", 4, 1)
    (failed,) = (tmp_path / "rows").glob("*.failed.txt")
    assert "'nonsense' is not a network" in failed.read_text() and failed.name in done.stderr

    monkeypatch.chdir(tmp_path)
    before = {each.name: each.read_bytes() for each in (tmp_path / "rows").iterdir()}
    with pytest.raises(SystemExit) as ended:
        sweep.main(["run", *flags, "--models", "cifar_resnet8"])
    assert ended.value.code == 0 and "1 trials, 1 of which have their row" in capsys.readouterr().out
    assert {each.name: each.read_bytes() for each in (tmp_path / "rows").iterdir()} == before

    sweep.main(["report", "--rows", "rows", "--plot", "plot.png"])
    assert "| cifar_resnet8 2:1 first | 1 | 4 |" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="give one of learning-rates"):
        sweep.main(["run", "--data-dir", str(tmp_path), "--study", "none", "--rows", str(tmp_path)])


def test_what_a_sweep_trains():
    flags = ["run", "--data-dir", "data", "--rows", "rows", "--ratios", "1:1", "2:1", "--keep", "first", "boundary"]
    found = sweep.trials(sweep.parse([*flags, "--seeds", "2", "--widths", "1", "0.5", "--lr", "0.3"]))
    assert len(found) == 2 * 2 * 3  # seeds, widths; 1:1 once
    assert {trial.recipe.lr for trial in found} == {0.3} and len({trial.name for trial in found}) == 12
    assert sorted(trial.options.get("width", 1) for trial in found) == [0.5] * 6 + [1] * 6


# docs/study.md


def test_the_studys_rows_are_named_by_their_configurations():
    from recipes.study import STUDIES

    known = {trial.name for study in STUDIES.values() for trial in study()}
    rows = report.read_rows(ROOT / "docs" / "study")
    assert rows
    for each in rows:
        assert trial_from(each["trial"]).name == each["name"]
        assert each["name"] in known
    for each in report.read_rows(ROOT / "docs" / "study" / "insights"):
        assert trial_from(each["trial"]).name == each["name"]


def test_the_studys_tables_are_those_of_the_rows():
    from recipes.study_tables import with_tables

    doc = (ROOT / "docs" / "study.md").read_text()
    assert with_tables(doc, ROOT / "docs" / "study") == doc
