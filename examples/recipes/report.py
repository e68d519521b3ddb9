"""Reports of a sweep's rows: means, paired differences against 1:1, and plots."""

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
    """The rows of one configuration by seed."""

    trial: Trial  # with seed 0
    rows: dict[int, Row]

    @property
    def label(self) -> str:
        """A name for tables, such as `cifar_resnet20 2:1 first`."""
        trial = self.trial
        parts = [trial.model, *(f"{key}={value}" for key, value in trial.options.items()), trial.ratio]
        if trial.drop:
            parts[-1] = f"{self.first_row['convolutions'] / self.first_row['activations']:.2g}:1 by hand"
        elif trial.ratio != "1:1":
            parts.append(trial.keep)
        words = {"relocate": "relocate", "hoist_padding": "hoisted", "gradual": "gradual"}
        parts += [word for field, word in words.items() if getattr(trial, field)]
        return " ".join([*parts, *([f"Leaky ReLU {trial.slope:g}"] if trial.slope else [])])

    @property
    def first_row(self) -> Row:
        return next(iter(self.rows.values()))

    def values(self, column: str) -> list[float]:
        return [row[column] for _, row in sorted(self.rows.items())]


@dataclass(frozen=True)
class Difference:
    """Mean difference of accuracies with the same seeds, in percentage points."""

    mean: float
    half: float  # half the width of the 95 % interval (Student's t); NaN for fewer than two seeds
    p: float  # two-sided paired t-test; NaN for fewer than two seeds
    seeds: int


def read_rows(folder: Path) -> list[Row]:
    """Return all rows of a sweep."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def groups(rows: Iterable[Row]) -> list[Group]:
    """Group the rows by configuration, ignoring the seed."""
    by_name: dict[str, Group] = {}
    for row in rows:
        trial = trial_from(row["trial"])
        base = with_seed(trial, 0)
        by_name.setdefault(base.name, Group(base, {})).rows[trial.recipe.seed] = row
    return list(by_name.values())


def with_seed(trial: Trial, seed: int) -> Trial:
    return replace(trial, recipe=replace(trial.recipe, seed=seed))


def original_of(group: Group, others: Iterable[Group]) -> Group | None:
    """Return the group of the same network and training with all activations, if there is one."""
    plain = replace(group.trial, ratio="1:1", keep=Trial.keep, relocate=False, gradual=False, drop=(), slope=0.0)
    return next((other for other in others if other.trial == plain), None)


def difference(group: Group, original: Group, column: str) -> Difference:
    """Return group minus original, over the seeds that both have."""
    seeds = sorted(group.rows.keys() & original.rows.keys())
    return summary([group.rows[seed][column] - original.rows[seed][column] for seed in seeds])


def summary(each: Sequence[float]) -> Difference:
    """Return mean, 95 % interval and p-value of paired differences."""
    if len(each) < 2:
        return Difference(each[0] if each else float("nan"), float("nan"), float("nan"), len(each))
    mean, error, freedom = statistics.fmean(each), statistics.stdev(each) / len(each) ** 0.5, len(each) - 1
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Difference(mean, float(stats.t.ppf(0.975, freedom)) * error, p, len(each))


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(values)
    scaled = np.maximum.accumulate([(len(values) - rank) * values[i] for rank, i in enumerate(order)])
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(scaled, 1)
    return corrected.tolist()


def table(rows: Iterable[Row], column: str = "test", latency: bool = False) -> list[dict[str, Any]]:
    """Return a line per configuration: `mean` and `sd` of the accuracy in percent, and the difference against 1:1.

    With `latency`, also measure the latency of the merged network relative to the original.
    """
    configurations = groups(rows)
    lines = []
    for group in configurations:
        values, first = group.values(column), group.first_row
        line = {
            "label": group.label,
            "seeds": len(values),
            "values": values,
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else float("nan"),
            **{key: first[key] for key in ("convolutions", "activations", "activation_values", "multiply_adds")},
            "parameters": first["parameters"],
        }
        original = original_of(group, configurations)
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
    """Return the latency for one picture over the original's, for ten classes.

    Norms are folded in both, and linear runs are merged if that saves multiply-adds.
    """
    picture = torch.zeros(1, original.size, original.size, 3, dtype=torch.uint8)
    models = [each.converted(10).eval() for each in (original, trial)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        models = [nmconv.merge(model, example_inputs=inputs(model, picture)) for model in models]
    return latencies(models, inputs(models[0], picture))[1]


def as_markdown(lines: Iterable[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    cells = []
    for line in lines:
        difference_cell = p = ""
        if "difference_mean" in line:
            difference_cell = f"{line['difference_mean']:+.2f}"
            if line["difference_seeds"] > 1:
                difference_cell += f" ± {line['difference_half']:.2f}"
                p = f"{line['difference_holm']:.3f}"
        latency = f"{line['latency']:.2f}" if "latency" in line else ""
        cost = [line["activations"], f"{line['activation_values'] / 1e3:.1f}", latency]
        cells.append([line["label"], line["seeds"], *cost, spread(line["values"]), difference_cell, p])
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
    """Return the indices of the Pareto front of (cost, accuracy), in the order of cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot accuracy against ratio, multiply-adds, activations and, if measured, latency, with the Pareto fronts."""
    costs = {
        "convolutions per activation": lambda line: line["convolutions"] / line["activations"],
        "multiply-adds, millions": lambda line: line["multiply_adds"] / 1e6,
        "activation values a picture, thousands": lambda line: line["activation_values"] / 1e3,
        "latency when merged, against 1:1": lambda line: line.get("latency"),
    }
    costs = {name: cost for name, cost in costs.items() if all(cost(line) is not None for line in lines)}
    figure = Figure(figsize=(5 * len(costs), 4), layout="constrained")
    for index, (name, cost) in enumerate(costs.items()):
        axes: Axes = figure.add_subplot(1, len(costs), index + 1)
        points = [(cost(line), line["mean"]) for line in lines]
        for line, (x, y) in zip(lines, points, strict=True):
            axes.errorbar(x, y, line["sd"] if line["seeds"] > 1 else None, marker="o", capsize=3, label=line["label"])
        if index:  # the ratio is not a cost
            front = [points[i] for i in pareto(points)]
            axes.plot(*zip(*front, strict=True), color="grey", linewidth=1, zorder=0)
        axes.set(xlabel=name, ylabel="accuracy, %" if index == 0 else None)
    figure.axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
