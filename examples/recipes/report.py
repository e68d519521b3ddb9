"""What a sweep's rows say: means, paired differences against 1:1, and plots."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

import nmconv

from .batches import inputs
from .cost import latencies
from .tables import markdown, spread
from .trial import Trial, trial_from

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The rows of one configuration, by seed."""

    trial: Trial  # with seed 0
    rows: dict[int, Row]

    @property
    def label(self) -> str:
        """What tells it from others: `cifar_resnet20 2:1 first`."""
        trial = self.trial
        parts = [trial.model, *(f"{key}={value}" for key, value in trial.options.items()), trial.ratio]
        if trial.drop:
            parts[-1] = f"{self.rows_first['convolutions'] / self.rows_first['activations']:.2g}:1 by hand"
        elif trial.ratio != "1:1":
            parts.append(trial.keep)
        parts += [word for word in ("relocate", "gradual") if getattr(trial, word)]
        return " ".join([*parts, *([f"Leaky ReLU {trial.slope:g}"] if trial.slope else [])])

    @property
    def rows_first(self) -> Row:
        return next(iter(self.rows.values()))

    def values(self, column: str) -> list[float]:
        return [row[column] for _, row in sorted(self.rows.items())]


@dataclass(frozen=True)
class Difference:
    """Of accuracies with the same seeds, in percentage points."""

    mean: float
    half: float  # of the 95 % interval of Student's t; NaN for fewer than two seeds
    p: float  # of the two-sided paired t-test; NaN for fewer than two
    seeds: int


def read_rows(folder: Path) -> list[Row]:
    """All rows of a sweep."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def groups(rows: Iterable[Row]) -> list[Group]:
    """The rows by configuration, seeds aside."""
    found: dict[str, Group] = {}
    for row in rows:
        trial = trial_from(row["trial"])
        base = with_seed(trial, 0)
        found.setdefault(base.name, Group(base, {})).rows[trial.recipe.seed] = row
    return list(found.values())


def with_seed(trial: Trial, seed: int) -> Trial:
    return replace(trial, recipe=replace(trial.recipe, seed=seed))


def original_of(group: Group, others: Iterable[Group]) -> Group | None:
    """The same network, trained the same way, with all of its activations."""
    plain = replace(group.trial, ratio="1:1", keep=Trial.keep, relocate=False, gradual=False, drop=(), slope=0.0)
    return next((other for other in others if other.trial == plain), None)


def difference(group: Group, original: Group, column: str) -> Difference:
    """Group minus original, over the seeds that both have."""
    seeds = sorted(group.rows.keys() & original.rows.keys())
    each = [group.rows[seed][column] - original.rows[seed][column] for seed in seeds]
    return summary(each)


def summary(each: Sequence[float]) -> Difference:
    """Mean, 95 % interval and p of paired differences."""
    if len(each) < 2:
        return Difference(each[0] if each else float("nan"), float("nan"), float("nan"), len(each))
    half = stats.t.ppf(0.975, len(each) - 1) * statistics.stdev(each) / len(each) ** 0.5
    return Difference(statistics.fmean(each), float(half), float(stats.ttest_1samp(each, 0).pvalue), len(each))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(values)
    steps = np.maximum.accumulate([(len(values) - at) * values[i] for at, i in enumerate(order)])
    out = np.empty(len(values))
    out[order] = np.minimum(steps, 1)
    return out.tolist()


def table(rows: Iterable[Row], column: str = "test", latency: bool = False) -> list[dict[str, Any]]:
    """A line a configuration: `mean` and `sd` of the accuracy in percent, and the difference against 1:1.

    With `latency`, how long the merged network takes against the original, measured now.
    """
    found = groups(rows)
    lines = []
    for group in found:
        values, first = group.values(column), group.rows_first
        line = {
            "label": group.label,
            "seeds": len(values),
            "values": values,
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else float("nan"),
            **{key: first[key] for key in ("convolutions", "activations", "activation_values", "multiply_adds")},
            "parameters": first["parameters"],
        }
        original = original_of(group, found)
        if original is not None and original is not group:
            line.update(
                {f"difference_{key}": value for key, value in asdict(difference(group, original, column)).items()}
            )
        if latency and original is not None:
            line["latency"] = latency_of(group.trial, original.trial)
        lines.append(line)
    tested = [line for line in lines if line.get("difference_seeds", 0) > 1]
    for line, p in zip(tested, holm([line["difference_p"] for line in tested]), strict=True):
        line["difference_holm"] = p
    return lines


def latency_of(trial: Trial, original: Trial) -> float:
    """How many times longer a forward of one picture takes than the original's, of ten classes.

    Norms are folded in both, and linear runs are merged where that saves multiply-adds.
    """
    picture = torch.zeros(1, original.size, original.size, 3, dtype=torch.uint8)
    models = [each.converted(10).eval() for each in (original, trial)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        models = [nmconv.merge(model, example_inputs=inputs(model, picture)) for model in models]
    return latencies(models, inputs(models[0], picture))[1]


def printed(lines: Iterable[dict[str, Any]]) -> str:
    """The table as Markdown."""
    cells = []
    for line in lines:
        apart = p = ""
        if "difference_mean" in line:
            apart = f"{line['difference_mean']:+.2f}"
            if line["difference_seeds"] > 1:
                apart += f" ± {line['difference_half']:.2f}"
                p = f"{line['difference_holm']:.3f}"
        latency = f"{line['latency']:.2f}" if "latency" in line else ""
        cost = [line["activations"], f"{line['activation_values'] / 1e3:.1f}", latency]
        cells.append([line["label"], line["seeds"], *cost, spread(line["values"]), apart, p])
    columns = [
        "network",
        "seeds",
        "activations",
        "values, k",
        "latency",
        "accuracy, %",
        "against 1:1, points",
        "p, Holm",
    ]
    return markdown(columns, cells)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, accuracy) no other point beats in both, by cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against ratio, multiply-adds, activations and, where it was measured, latency; with the Pareto front."""
    costs = {
        "convolutions per activation": lambda line: line["convolutions"] / line["activations"],
        "multiply-adds, millions": lambda line: line["multiply_adds"] / 1e6,
        "activation values a picture, thousands": lambda line: line["activation_values"] / 1e3,
        "latency when merged, against 1:1": lambda line: line.get("latency"),
    }
    costs = {name: cost for name, cost in costs.items() if all(cost(line) is not None for line in lines)}
    figure = Figure(figsize=(5 * len(costs), 4), layout="constrained")
    for at, (name, cost) in enumerate(costs.items()):
        axes: Axes = figure.add_subplot(1, len(costs), at + 1)
        points = [(cost(line), line["mean"]) for line in lines]
        for line, (x, y) in zip(lines, points, strict=True):
            axes.errorbar(x, y, line["sd"] if line["seeds"] > 1 else None, marker="o", capsize=3, label=line["label"])
        front = points if at == 0 else [points[i] for i in pareto(points)]
        if at:
            axes.plot(*zip(*front, strict=True), color="grey", linewidth=1, zorder=0)
        axes.set(xlabel=name, ylabel="accuracy, %" if at == 0 else None)
    figure.axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
