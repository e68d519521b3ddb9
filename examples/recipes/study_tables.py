"""The tables of docs/study.md, made from the rows beside it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import study
from .report import Difference, Row, difference, groups, holm, read_rows, summary
from .tables import markdown, spread
from .trial import Trial, trial_from

Tables = dict[str, Callable[[Sequence[Row], Sequence[Row]], str]]


def with_tables(doc: str, rows: Path) -> str:
    """Return the document with the text between each `<!-- NAME -->` and `<!-- / -->` replaced by a new table."""
    trials, insights = read_rows(rows), read_rows(rows / "insights")

    def new_table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]](trials, insights)}\n<!-- / -->"

    return re.sub(r"<!-- ([a-z-]+) -->\n.*?<!-- / -->", new_table, doc, flags=re.S)


def rows_of(trials: Iterable[Trial], rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the trials that have one."""
    names = {trial.name for trial in trials}
    return [row for row in rows if row["name"] in names]


def interval(diff: Difference) -> str:
    """Format a difference in points, with its 95 % interval for three seeds or more."""
    return f"{diff.mean:+.2f}" + (f" ± {diff.half:.2f}" if diff.seeds > 2 else "")


def learning_rates(trials: Sequence[Row], insights: Sequence[Row]) -> str:
    by_lr: dict[float, list[Row]] = {}
    for row in rows_of(study.learning_rates(), trials):
        by_lr.setdefault(row["trial"]["recipe"]["lr"], []).append(row)
    columns = ["1:1", "2:1 first", "2:1 boundary"]
    lines = []
    for lr, rows in sorted(by_lr.items()):
        by_name = {name_of(trial_from(row["trial"])): row["held_back"] for row in rows}
        values = [by_name[name] for name in columns]
        lines.append([f"{lr:g}", *(f"{value:.2f}" for value in values), f"{statistics.fmean(values):.2f}"])
    return markdown(["learning rate", *columns, "mean"], lines)


def name_of(trial: Trial) -> str:
    """Return the study's name for a network: a key of `study.RATIOS`."""
    fields = ("ratio", "keep", "hoist_padding", "drop", "slope")
    return next(
        name for name, each in study.RATIOS.items() if all(getattr(each, key) == getattr(trial, key) for key in fields)
    )


def ratios(trials: Sequence[Row], insights: Sequence[Row]) -> str:
    configurations = groups(rows_of(study.ratios(seeds=6), trials))
    original = next((group for group in configurations if name_of(group.trial) == "1:1"), None)
    if original is None:
        return "Not measured yet."
    lines, tested = [], []
    for name in study.RATIOS:
        for group in (group for group in configurations if name_of(group.trial) == name):
            first = group.first_row
            line = [name, len(group.rows), first["activations"], f"{first['activation_values'] / 1e3:.0f} k"]
            line += [spread(group.values("held_back")), spread(group.values("test"))]
            if group is original:
                lines.append([*line, "", ""])
                continue
            against = difference(group, original, "test")
            lines.append([*line, interval(against), ""])
            if against.seeds > 2:
                tested.append((lines[-1], against.p))
    for (line, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        line[-1] = f"{p:.3f}"
    columns = ["network", "seeds", "activations", "values", "held back, %", "test, %", "test against 1:1", "p, Holm"]
    return markdown(columns, lines)


def ends(trials: Sequence[Row], insights: Sequence[Row]) -> str:
    by_name = {name_of(group.trial): group for group in groups(rows_of(study.ratios(), trials))}
    if not {"2:1 first", "2:1 boundary"} <= by_name.keys():
        return "Not measured yet."
    apart = difference(by_name["2:1 first"], by_name["2:1 boundary"], "test")
    what = '2:1 with `keep="first"` against `keep="boundary"`'
    return f"{what}: {interval(apart)} points, {apart.seeds} seeds, p = {apart.p:.3f}."


def routes(trials: Sequence[Row], insights: Sequence[Row]) -> str:
    lines = []
    rows = rows_of([*study.routes("first"), *study.routes("boundary")], trials)
    longer = {row["trial"]["recipe"]["seed"]: row for row in rows if row["trial"]["route"] == "longer"}
    for keep in ("first", "boundary"):
        for route in study.ROUTES:
            same = [row for row in rows if row["trial"]["route"] == route and row["trial"]["keep"] == keep]
            if not same:
                continue
            differences = [row["test"] - longer[row["trial"]["recipe"]["seed"]]["test"] for row in same]
            line = [route, "" if route == "longer" else keep, len(same), same[0]["activations"]]
            untrained = [row["untrained"] for row in same if "untrained" in row]
            line.append(spread(untrained) if untrained else "")
            line += [spread([row[column] for row in same]) for column in ("held_back", "test")]
            lines.append([*line, "" if route == "longer" else interval(summary(differences))])
    columns = ["route", "keep", "seeds", "activations", "untrained, held back, %", "held back, %", "test, %"]
    return markdown([*columns, "test against the original"], lines) if lines else "Not measured yet."


def long(trials: Sequence[Row], insights: Sequence[Row]) -> str:
    tests = [row["test"] for row in rows_of(study.long(), trials)]
    return (
        f"After the 30 epochs: {spread(tests)} % on the test set, {len(tests)} seeds." if tests else "Not measured yet."
    )


def sizes(trials: Sequence[Row], insights: Sequence[Row]) -> str:
    lines = []
    for name, size in study.SIZES.items():
        found = groups(
            row
            for row in rows_of(study.sizes(), trials)
            if all(row["trial"][key] == value for key, value in {"options": {}, **size}.items())
        )
        original = next((group for group in found if group.trial.ratio == "1:1"), None)
        for group in found:
            values = [spread(group.values(column)) for column in ("held_back", "test")]
            against = "" if original in (None, group) else interval(difference(group, original, "test"))
            first = group.first_row
            lines.append([name, name_of(group.trial), len(group.rows), first["activations"], *values, against])
    columns = ["network", "ratio", "seeds", "activations", "held back, %", "test, %", "test against 1:1"]
    return markdown(columns, lines) if lines else "Not measured yet."


def families(trials: Sequence[Row], insights: Sequence[Row]) -> str:
    lines = []
    names = {family["model"]: name for name, family in study.FAMILIES.items()}
    for row in sorted(rows_of(study.families(), trials), key=lambda row: (row["trial"]["model"], -row["activations"])):
        trial = row["trial"]
        images = trial["images"] or 45_000
        ratio = "by hand" if trial["drop"] else name_of(trial_from(trial))
        line = [
            names[trial["model"]],
            ratio,
            row["convolutions"],
            row["activations"],
            f"{row['multiply_adds'] / 1e6:.0f}",
        ]
        lines.append([*line, f"{images:,}", f"{row['held_back']:.2f}", f"{row['test']:.2f}"])
    columns = [
        "network",
        "ratio",
        "convolutions",
        "activations",
        "multiply-adds, M",
        "pictures",
        "held back, %",
        "test, %",
    ]
    return markdown(columns, lines) if lines else "Not measured yet."


def activations(trials: Sequence[Row], insights: Sequence[Row]) -> str:
    by_epoch: dict[tuple[str, int], list[Row]] = {}
    for row in insights:
        if row["kind"] == "activations":
            by_epoch.setdefault((name_of(trial_from(row["trial"])), row["epoch"]), []).append(row)
    lines = []
    for name in study.RATIOS:
        for (other, epoch), rows in sorted(by_epoch.items()):
            if other == name:
                means = [
                    [statistics.fmean(site[key] for site in row["sites"].values()) for row in rows]
                    for key in ("positive", "sparsity", "gradient")
                ]
                dead = [100 * row["dead"] / row["channels"] for row in rows]
                share = [100 * row["rank_share"] for row in rows]
                lines.append([name, epoch, len(rows), *map(spread, means), spread(dead), spread(share)])
    columns = ["network", "epoch", "seeds", "positive", "sparsity", "gradient", "dead, %", "rank, % of channels"]
    return markdown(columns, lines) if lines else "Not measured yet."


def members(trials: Sequence[Row], insights: Sequence[Row]) -> str:
    by_slope: dict[tuple[str, float], list[Row]] = {}
    for row in insights:
        if row["kind"].startswith("members"):
            by_slope.setdefault((name_of(trial_from(row["trial"])), row["slope"]), []).append(row)
    lines = []
    for (name, slope), rows in sorted(by_slope.items()):
        member_means = [statistics.fmean(row["member_accuracy"]) for row in rows]
        kept = [statistics.fmean(row["kept"]) for row in rows]
        columns = ("probabilities_accuracy", "soft_accuracy", "disagreement", "gap")
        values: list[list[Any]] = [kept, member_means, *([row[column] for row in rows] for column in columns)]
        lines.append([name, f"{slope:g}", len(rows), *map(spread, values)])
    columns = ["trained with", "slope", "seeds", "kept", "a member, %", "members' mean, %", "soft network, %"]
    return markdown([*columns, "disagreement, %", "gap, logits"], lines) if lines else "Not measured yet."


TABLES: Tables = {
    "learning-rates": learning_rates,
    "ratios": ratios,
    "ends": ends,
    "long": long,
    "routes": routes,
    "sizes": sizes,
    "families": families,
    "activations": activations,
    "members": members,
}
