"""The measurements behind docs/results.md: fitted and searched networks on CIFAR-10, against simpler ways.

    python examples/results.py --data-dir ~/data/cifar10 --net resnet20 --weights runs/resnet20-0/model.safetensors
    python examples/results.py --data-dir ~/data/cifar10 --net lite0 --weights runs/lite0-0/model.safetensors
    python examples/results.py --data-dir ~/data/imagenet-sample --net imagenet --weights efficientnet_lite0.pth
    python examples/results.py --table            what is in docs/results.jsonl, as Markdown
    python examples/results.py --plot docs/results.svg

`--weights` is what examples/train.py wrote (its commands are in docs/results.md). Every row is appended to `--rows`
as soon as it is measured, and not measured again; `--only` limits the run to some cases. Accuracies are of the whole
test set, run in onnxruntime; nothing here is chosen by them. Fits see train pictures without labels.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes.batches import inputs
from recipes.cost import multiply_adds
from recipes.networks import build
from recipes.pictures import Data, Decoded, decoded, limited, load_data
from recipes.recipe import Recipe
from recipes.tables import spread
from recipes.training import train
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

import nmconv
from nmconv.timing import interleaved, ratios, runner, threads


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, what it was trained with, and what it is trained on with afterwards."""

    model: str
    size: int
    images: int  # of the train split, for training; 0 for all
    training: Recipe  # what it was trained by
    fitting: slice  # of the train split, for fitting
    units: str  # what a prefix of a module's name must be for the module to be one unit of the uniform choice
    tune: Recipe
    tuned_images: int
    wanted: tuple[str, ...]


CASES = {
    "lite0": Case(
        "tf_efficientnet_lite0", 64, 10_000, Recipe(epochs=5, batch_size=32, lr=0.02),
        slice(10_000, 10_512), "blocks.*.*",
        Recipe(epochs=2, batch_size=32, lr=0.01, weight_decay=5e-4), 10_000,
        ("original", "multiply_adds", "latency", "alone", "cost_of_time", "downstream"),
    ),
    "resnet20": Case(
        "cifar_resnet20", 32, 0, Recipe(epochs=10), slice(0, 1024), "layer*.*",
        Recipe(epochs=1, warmup=0.1), 50_000,
        ("original", "multiply_adds", "activations", "downstream"),
    ),
    "resnet20-30": Case(
        "cifar_resnet20", 32, 0, Recipe(epochs=30, precision="bf16"), slice(0, 1024), "layer*.*",
        Recipe(epochs=3, warmup=0.1, precision="bf16"), 50_000,
        ("original", "multiply_adds"),
    ),
}  # fmt: skip
BUDGETS = {
    "lite0": (0.9, 0.8, 0.7, 0.65),
    "resnet20": (0.9, 0.8, 0.78, 0.7, 0.66, 0.5),
    "resnet20-30": (0.78, 0.66, 0.5),
}
COMPARED = (0.9, 0.8, 0.7)  # of the multiply-adds, against uniform and random choices
TUNED = {"lite0": (), "resnet20": (0.78, 0.66, 0.5), "resnet20-30": (0.78, 0.66, 0.5)}
RANDOM = 5


# What is measured


def answers(model: nn.Module, pictures: Tensor, batch: int = 250) -> Tensor:
    """The network's outputs in onnxruntime, several times as fast on a CPU as eager."""
    import onnxruntime

    model = nmconv.fold_norms(copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "model.onnx")
        program = torch.onnx.export(model, (inputs(model, pictures[:batch]),), dynamo=True, verbose=False)
        program.save(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    found = []
    for part in pictures.split(batch):
        x = inputs(model, part).contiguous().numpy()
        rest = batch - len(part)
        x = np.concatenate([x, np.zeros((rest, *x.shape[1:]), x.dtype)]) if rest else x
        found.append(torch.from_numpy(session.run(None, {name: x})[0][: len(part)]))
    return torch.cat(found)


def accuracy(model: nn.Module, split: Decoded) -> float:
    """Top-1, in percent."""
    return 100 * float((answers(model, split.images).argmax(1) == split.labels).double().mean())


def chosen(plan: nmconv.Plan) -> dict[str, Any]:
    """What a plan does, for a row."""
    parts = [f"{kernel.convs[0]}…{kernel.convs[-1]}: {kernel.size}" for kernel in plan.kernels]
    parts += [f"{branch.convs[0]}…{branch.convs[-1]}: gone" for branch in plan.branches]
    return {"activations": [plan.counts.activations_before, plan.counts.activations_after], "plan": parts}


# Choices that measure nothing


def units_of(table: nmconv.Sensitivity, pattern: str) -> list[list[nmconv.Candidate]]:
    """For each module of that pattern, in order: the kernels that all its convolutions could become together."""
    depth = pattern.count(".") + 1
    found: dict[str, dict[tuple[str, ...], list[nmconv.Candidate]]] = {}
    for one in table.candidates:
        owners = {".".join(conv.split(".")[:depth]) for conv in one.convs}
        if len(owners) == 1 and one.size not in ("", "none"):
            found.setdefault(owners.pop(), {}).setdefault(one.convs, []).append(one)
    longest = [max(rows.values(), key=lambda some: len(some[0].convs)) for rows in found.values()]
    return sorted(longest, key=lambda some: some[0].first)


def uniform(table: nmconv.Sensitivity, pattern: str, needed: float) -> list[nmconv.Candidate]:
    """As many units as the budget needs, evenly spaced, each as the largest kernel that halves its multiply-adds."""
    kernels = []
    for rows in units_of(table, pattern):
        half = [one for one in rows if one.multiply_adds[1] <= one.multiply_adds[0] / 2] or rows[:1]
        kernels.append(half[-1])
    for count in range(1, len(kernels) + 1):
        places = sorted({int((at + 0.5) * len(kernels) / count) for at in range(count)})
        some = [kernels[at] for at in places]
        if sum(one.saves("multiply_adds") for one in some) >= needed:
            return some
    raise SystemExit(f"all {len(kernels)} units together save less than {needed:.0f} multiply-adds")


def randomly(table: nmconv.Sensitivity, needed: float, seed: int) -> list[nmconv.Candidate]:
    """Candidates drawn until the budget is met; drawn anew where nothing is left before."""
    rows = [one for one in table.candidates if one.size != "none" and one.saves("multiply_adds") > 0]
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        taken: list[nmconv.Candidate] = []
        for at in rng.permutation(len(rows)):
            one = rows[at]
            if all(one.last < other.first or other.last < one.first for other in taken):
                taken.append(one)
            if sum(each.saves("multiply_adds") for each in taken) >= needed:
                return taken
    raise SystemExit(f"no random choice saves {needed:.0f} multiply-adds")


def plan_of(net: nn.Module, image: Tensor, some: Sequence[nmconv.Candidate]) -> nmconv.Plan:
    """A plan written by hand: some candidates, each as its table says."""
    plan = nmconv.make_plan(net, "1:1", example_inputs=image)
    plan = plan.edit({site: "drop" for one in some for site in one.sites})
    return plan.with_kernels({one.convs: one.size for one in some if one.size})


# The cases


class Run:
    """All rows of one network and seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.case = CASES[args.net]
        self.args = args
        data = load_data(args.data_dir.expanduser(), self.case.size, cache=args.cache)
        self.data = data
        self.net = build(self.case.model, len(data.classes), args.weights, args.seed).eval()
        self.net.to(memory_format=torch.channels_last)
        self.images = inputs(self.net, data.train.images[self.case.fitting])
        self.image = self.images[:1]
        self.rows = read(args.rows)

    def row(self, case: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row, measured if it is not there."""
        key = {"net": self.args.net, "seed": self.args.seed, "case": case, "name": name}
        for known in self.rows:
            if {part: known[part] for part in key} == key:
                return known
        clock = time.perf_counter()
        found = {**key, **measure()}
        found["seconds"] = round(time.perf_counter() - clock, 1)
        self.rows.append(found)
        with self.args.rows.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print({part: value for part, value in found.items() if part != "plan"}, flush=True)
        return found

    def accuracy(self, model: nn.Module) -> float:
        return round(accuracy(model, self.data.test), 3)

    def fitted(self, plan: nmconv.Plan, **options: Any) -> nn.Module:
        model = nmconv.apply_plan(self.net, plan)
        return nmconv.fit(model, self.images, reference=self.net, **options)

    def cost(self, model: nn.Module) -> float:
        return round(multiply_adds(model, self.image) / multiply_adds(self.net, self.image), 4)

    def measured(self, plan: nmconv.Plan) -> dict[str, Any]:
        model = self.fitted(plan)
        report = nmconv.get_fit(model)
        assert report is not None
        found = {"multiply_adds": self.cost(model), "accuracy": self.accuracy(model), "kl": report.returned.loss}
        return {**found, **chosen(plan)}

    def tuned(self, model: nn.Module) -> float:
        """Accuracy after more training, distilled from the network it was made of."""
        case = self.case
        recipe = dataclasses.replace(case.tune, seed=self.args.seed, distill=0.5)
        train(model, self.first(case.tuned_images), recipe, teacher=copy.deepcopy(self.net), probe=250)
        return self.accuracy(model)

    def first(self, count: int) -> Data:
        """So many of the train pictures; 0 for all."""
        return limited(self.data, count or None)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def table(self, form: str, backend: str | None) -> nmconv.Sensitivity:
        folder = self.args.rows.parent if self.args.tables is None else self.args.tables
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.args.net}-{self.args.seed}-{form}-{backend}.json"
        clock = time.perf_counter()
        found = nmconv.sensitivity(self.net, self.images[::2], form=form, backend=backend, path=path, quiet=True)
        took = round(time.perf_counter() - clock, 1)
        self.row("sensitivity", f"{form}, {backend}", lambda: {"candidates": len(found.candidates), "took": took})
        return found

    def original(self) -> None:
        self.row("original", "as trained", lambda: {"accuracy": self.accuracy(self.net)})
        again = nmconv.recalibrate_norms(copy.deepcopy(self.net), self.images)  # what the pictures give without any fit
        self.row("original", "recalibrated", lambda: {"accuracy": self.accuracy(again)})
        self.row("original", "trained as long", lambda: {"accuracy": self.tuned(copy.deepcopy(self.net))})

    def alone(self) -> None:
        """Each unit by itself: dropped, recalibrated, fitted, and what follows fitted too."""
        for rows in units_of(self.table("merged", "eager"), self.case.units):
            one = rows[-1]
            unit = ".".join(one.convs[0].split(".")[: self.case.units.count(".") + 1])
            plan = plan_of(self.net, self.image, [one])

            def measure(plan: nmconv.Plan = plan, one: nmconv.Candidate = one) -> dict[str, Any]:
                model = nmconv.apply_plan(self.net, plan.with_kernels({}))
                found = {"dropped": self.accuracy(model)}
                found["recalibrated"] = self.accuracy(nmconv.recalibrate_norms(model, self.images))
                factors, merged = (plan.with_kernels(kernels) for kernels in ({}, {one.convs: "auto"}))
                found["factors"] = self.accuracy(self.fitted(factors))
                found["factors, downstream"] = self.accuracy(self.fitted(factors, downstream=True))
                found["fitted, downstream"] = self.accuracy(self.fitted(merged, downstream=True))
                model = self.fitted(merged)
                report = nmconv.get_fit(model)
                assert report is not None
                found["fitted"] = self.accuracy(model)
                found["kernel"] = "x".join(map(str, next(part.kernel for part in report.units if part.form)))
                return found

            self.row("alone", unit, measure)

    def multiply_adds(self) -> None:
        """Search against choices that measure nothing, at the same multiply-adds."""
        table = self.table("merged", "eager")
        total = table.totals["multiply_adds"]
        for budget in BUDGETS[self.args.net]:
            found = self.searched(table, budget, "multiply_adds")
            if budget not in COMPARED:
                continue
            needed = (1 - found["multiply_adds"]) * total
            plan = plan_of(self.net, self.image, uniform(table, self.case.units, needed))
            self.row("uniform", f"{budget}", lambda plan=plan: self.measured(plan))
            for draw in range(RANDOM):
                plan = plan_of(self.net, self.image, randomly(table, needed, draw))
                self.row("random", f"{budget}, draw {draw}", lambda plan=plan: self.measured(plan))

    def search_row(
        self, case: str, name: str, table: nmconv.Sensitivity, budget: float, cost: str
    ) -> tuple[dict[str, Any], nmconv.Plan]:
        """What a search finds, fitted; and its plan, which is kept in a file."""
        path = self.args.rows.parent / f"plans/{self.args.net}-{self.args.seed}-{cost}-{budget:.2g}.json"

        def measure() -> dict[str, Any]:
            clock = time.perf_counter()
            plan = nmconv.search(self.net, self.images[::2], budget=budget, cost=cost, sensitivity=table, quiet=True)
            took = round(time.perf_counter() - clock, 1)
            path.parent.mkdir(exist_ok=True)
            path.write_text(plan.to_json())
            reached = float(dict(plan.options)["reached"])
            return {"took": took, "reached": reached, **self.measured(plan)}

        found = self.row(case, name, measure)
        return found, nmconv.Plan.from_json(path.read_text())

    def searched(self, table: nmconv.Sensitivity, budget: float, cost: str) -> dict[str, Any]:
        found, plan = self.search_row(f"search, {cost}", f"{budget}", table, budget, cost)
        if cost == "latency" or budget in TUNED[self.args.net]:
            self.row(f"search, {cost}, tuned", f"{budget}", lambda: {"accuracy": self.tuned(self.fitted(plan))})
            if self.args.net == "resnet20" and budget == 0.78:
                self.row("latency", f"{budget}", lambda: self.times(self.fitted(plan)))
        return found

    def times(self, model: nn.Module) -> dict[str, Any]:
        """Original over fitted, medians with quartiles, norms folded in both, one thread."""
        found = {}
        with threads(1):
            for backend in ("onnxruntime", "compile", "frozen", "eager"):
                for batch in (1, 8):
                    x = self.images[:batch]
                    sides = [runner(nmconv.fold_norms(one), (x,), backend) for one in (self.net, model)]
                    spread = ratios(*interleaved(sides, rounds=25, seconds=0.1))
                    numbers = (spread.median, spread.lower, spread.upper)
                    found[f"{backend} {batch}"] = [round(number, 3) for number in numbers]
        return found

    def latency(self) -> None:
        """A budget of time, eager, batch 1."""
        table = self.table("merged", "eager")
        for budget in (0.9, 0.8):
            self.searched(table, budget, "latency")

    def activations(self) -> None:
        """Half of the activations gone, every convolution stays: search against 2:1 everywhere."""
        even = nmconv.make_plan(self.net, "2:1", example_inputs=self.image)
        self.row("activations", "2:1", lambda: self.measured(even))
        self.row("activations", "2:1, tuned", lambda: {"accuracy": self.tuned(self.fitted(even))})
        left = even.counts.activations_after / even.counts.activations_before
        for name, budget in (("search 0.5", 0.5), ("search, as many as 2:1", left)):
            _, plan = self.search_row("activations", name, self.table("factors", None), budget, "activations")
            self.row("activations", f"{name}, tuned", lambda plan=plan: {"accuracy": self.tuned(self.fitted(plan))})

    def from_scratch(self) -> None:
        """2:1 with random weights, trained as the original was."""
        recipe = dataclasses.replace(self.case.training, seed=self.args.seed)

        def measure() -> dict[str, Any]:
            net = build(self.case.model, len(self.data.classes), seed=self.args.seed)
            model = nmconv.convert(net, ratio="2:1", example_inputs=self.image)
            train(model, self.first(self.case.images), recipe, out=self.args.scratch, probe=250)
            return {"accuracy": self.accuracy(model)}

        self.row("activations", "2:1, from scratch", measure)

    def downstream(self) -> None:
        """The searched plans, and all that comes behind the first unit refitted too."""
        table = self.table("merged", "eager")
        for budget in BUDGETS[self.args.net]:
            _, plan = self.search_row("search, multiply_adds", f"{budget}", table, budget, "multiply_adds")

            def measure(plan: nmconv.Plan = plan) -> dict[str, Any]:
                return {"accuracy": self.accuracy(self.fitted(plan, downstream=True))}

            self.row("search, multiply_adds, downstream", f"{budget}", measure)

    def cost_of_time(self) -> None:
        """Seconds that all units together take to fit."""
        table = self.table("merged", "eager")
        units = [rows[0] for rows in units_of(table, self.case.units)]
        plan = plan_of(self.net, self.image, units)

        def measure() -> dict[str, Any]:
            clock = time.perf_counter()
            self.fitted(plan)
            return {"units": len(units), "images": len(self.images), "took": round(time.perf_counter() - clock, 1)}

        self.row("time", "fit of all units", measure)


class FromNothing(Run):
    """A whole search of an ImageNet network: how long it takes, and what pictures that it has not seen say."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, read(args.rows)
        folder = ImageFolder(str(args.data_dir.expanduser() / "val"))
        pixels = torch.from_numpy(decoded(folder, 160, args.cache or args.data_dir.expanduser(), "val"))
        self.net = build("tf_efficientnet_lite0", 1000, args.weights).eval()
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(args.seed))
        self.images = inputs(self.net, pixels[order[:60]])
        self.others = inputs(self.net, pixels[order[60:]])
        self.image = self.images[:1]

    def measure(self) -> None:
        """The issue's own example: three quarters of the latency."""
        path = self.args.rows.parent / f"plans/imagenet-{self.args.seed}-latency-0.75.json"

        def searched() -> dict[str, Any]:
            clock = time.perf_counter()
            plan = nmconv.search(self.net, self.images, budget=0.75, cost="latency", quiet=True)
            took = round(time.perf_counter() - clock, 1)
            path.parent.mkdir(exist_ok=True)
            path.write_text(plan.to_json())
            return {"took": took, "threads": torch.get_num_threads(), **self.agreement(plan), **chosen(plan)}

        self.row("from nothing", "search at 0.75 of the latency", searched)

    def agreement(self, plan: nmconv.Plan) -> dict[str, Any]:
        dropped = nmconv.apply_plan(self.net, plan.with_kernels({}))
        models = {"dropped": dropped, "recalibrated": nmconv.recalibrate_norms(copy.deepcopy(dropped), self.images)}
        models["fitted"] = self.fitted(plan)
        with torch.inference_mode():
            wanted = self.net(self.others).argmax(1)
            found = {name: 100 * float((one(self.others).argmax(1) == wanted).double().mean())
                     for name, one in models.items()}  # fmt: skip
        return {"multiply_adds": self.cost(models["fitted"]), "agreement": found}


# Rows and tables


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Rows:
    """All rows of one network."""

    def __init__(self, rows: Sequence[dict[str, Any]], net: str) -> None:
        self.rows = [row for row in rows if row["net"] == net]
        self.seeds = sorted({row["seed"] for row in self.rows})

    def of(self, case: str, name: str) -> dict[int, dict[str, Any]]:
        """By seed."""
        return {row["seed"]: row for row in self.rows if (row["case"], row["name"]) == (case, name)}

    def names(self, case: str) -> list[str]:
        return list(dict.fromkeys(row["name"] for row in self.rows if row["case"] == case))

    def values(self, case: str, name: str, key: str) -> list[float]:
        return [row[key] for row in self.of(case, name).values()]

    def lost(self, case: str, name: str, key: str = "accuracy", against: str = "as trained") -> list[float]:
        """Points lost against the original of the same seed."""
        originals = self.of("original", against)
        return [
            originals[seed]["accuracy"] - row[key] for seed, row in self.of(case, name).items() if seed in originals
        ]


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tables of all that was measured: points of accuracy lost, mean ± sd over seeds."""
    for net in (*CASES, "imagenet"):
        found = Rows(rows, net)
        if found.seeds:
            yield f"## {net}, {len(found.seeds)} seed{'s' * (len(found.seeds) > 1)}"
            yield ""
            for against in found.names("original"):
                yield f"- Original, {against}: {spread(found.values('original', against, 'accuracy'))} %."
            for name in found.names("time") + found.names("sensitivity"):
                case = "time" if name in found.names("time") else "sensitivity"
                what = f"sensitivity table ({name})" if case == "sensitivity" else name
                yield f"- Time of one core for the {what}: {spread(found.values(case, name, 'took'), 0)} s."
            yield ""
            for row in (row for row in found.rows if row["case"] == "from nothing"):
                shares = ", ".join(f"{name} {value:.1f} %" for name, value in row["agreement"].items())
                yield (
                    f"A {row['name']} from nothing, on 60 pictures of 160 px (threads: {row['threads']}), took "
                    f"{row['took']:.0f} s. Same top-1 class as the original on the 40 other pictures: {shares}, at "
                    f"{row['multiply_adds']:.3f} of the multiply-adds."
                )
                yield ""
            for part in (_alone, _budgets, _latency, _activations):
                yield from part(found)


def _alone(found: Rows) -> Iterator[str]:
    names = found.names("alone")
    if not names:
        return
    columns = ("dropped", "recalibrated", "factors", "factors, downstream", "fitted", "fitted, downstream")
    yield "Each unit alone, no training; points lost:"
    yield ""
    forms = "fitted, factors | the same, downstream too | fitted, merged | the same, downstream too"
    yield f"| unit | dropped | dropped, recalibrated | {forms} | kernel |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in names:
        kernels = ", ".join(dict.fromkeys(row["kernel"] for row in found.of("alone", name).values()))
        cells = " | ".join(spread(found.lost("alone", name, key), sign=True) for key in columns)
        yield f"| {name} | {cells} | {kernels} |"
    medians = []
    for key in columns:
        by_seed: dict[int, list[float]] = {}
        for name in names:
            for seed, lost in zip(found.of("alone", name), found.lost("alone", name, key), strict=True):
                by_seed.setdefault(seed, []).append(lost)
        medians.append(spread([statistics.median(lost) for lost in by_seed.values()], sign=True))
    yield f"| **median** | {' | '.join(medians)} | |"
    yield ""


def _budgets(found: Rows) -> Iterator[str]:
    names = found.names("search, multiply_adds")
    if not names:
        return
    yield "Multiply-adds, fitted and not trained; points lost (random: mean of each seed's draws):"
    yield ""
    columns = "search | uniform | random | search, downstream too | search, then trained"
    yield f"| budget | search reached | {columns} | activations |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in sorted(names, reverse=True):
        draws: dict[int, list[float]] = {}
        for draw in range(RANDOM):
            rows = found.of("random", f"{name}, draw {draw}")
            for seed, lost in zip(rows, found.lost("random", f"{name}, draw {draw}"), strict=True):
                draws.setdefault(seed, []).append(lost)
        ahead = found.lost("search, multiply_adds, downstream", name)
        trained = found.lost("search, multiply_adds, tuned", name, against="trained as long")
        cells = [
            spread(found.values("search, multiply_adds", name, "multiply_adds"), 3),
            spread(found.lost("search, multiply_adds", name), sign=True),
            spread(found.lost("uniform", name), sign=True) if found.of("uniform", name) else "",
            spread([statistics.mean(lost) for lost in draws.values()], sign=True) if draws else "",
            spread(ahead, sign=True) if ahead else "",
            spread(trained, sign=True) if trained else "",
            " / ".join(f"{row['activations'][1]} of {row['activations'][0]}"
                       for row in found.of("search, multiply_adds", name).values()),
        ]  # fmt: skip
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def _latency(found: Rows) -> Iterator[str]:
    names = found.names("search, latency")
    if names:
        yield "Latency (eager, one thread, batch 1); points lost:"
        yield ""
        yield "| budget | reached | multiply-adds | fitted | then trained |"
        yield "| --- | --- | --- | --- | --- |"
        for name in names:
            cells = [
                spread(found.values("search, latency", name, "reached"), 3),
                spread(found.values("search, latency", name, "multiply_adds"), 3),
                spread(found.lost("search, latency", name), sign=True),
                spread(found.lost("search, latency, tuned", name, against="trained as long"), sign=True),
            ]
            yield f"| {name} | {' | '.join(cells)} |"
        yield ""
    for name in found.names("latency"):
        for seed, row in found.of("latency", name).items():
            yield f"Original over fitted at {name} of the multiply-adds, seed {seed}, median (quartiles), one thread:"
            yield ""
            backends = [key for key in row if isinstance(row[key], list)]
            yield f"| {' | '.join(f'{key}' for key in backends)} |"
            yield f"|{' --- |' * len(backends)}"
            yield f"| {' | '.join(f'{row[key][0]} ({row[key][1]}–{row[key][2]})' for key in backends)} |"
            yield ""


def _activations(found: Rows) -> Iterator[str]:
    names = found.names("activations")
    if not names:
        return
    yield "Half of the activations, every convolution stays (factors form); points lost:"
    yield ""
    yield "| plan | activations | points lost |"
    yield "| --- | --- | --- |"
    for name in names:
        rows = found.of("activations", name)
        counts = " / ".join(f"{row['activations'][1]} of {row['activations'][0]}" for row in rows.values()
                            if "activations" in row)  # fmt: skip
        against = "trained as long" if name.endswith("tuned") else "as trained"
        yield f"| {name} | {counts} | {spread(found.lost('activations', name, against=against), sign=True)} |"
    yield ""


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy over multiply-adds, not trained after the fit: search, uniform and random choices."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nmconv"  # the same picture is the same file
    import matplotlib.pyplot as plt

    nets = [net for net in CASES if any((row["net"], row["case"]) == (net, "uniform") for row in rows)]
    figure, axes = plt.subplots(1, len(nets), figsize=(4.5 * len(nets), 3.2), layout="constrained", squeeze=False)
    styles = {"random": ("x", "tab:gray"), "uniform": ("s", "tab:orange"), "search, multiply_adds": ("o", "tab:blue")}
    for ax, net in zip(axes[0], nets, strict=True):
        found = Rows(rows, net)
        ax.axhline(statistics.mean(found.values("original", "as trained", "accuracy")), color="black", lw=0.8, ls=":")
        for case, (marker, color) in styles.items():
            points = [(row["multiply_adds"], row["accuracy"]) for row in found.rows if row["case"] == case]
            if points:
                ax.scatter(*zip(*points, strict=True), marker=marker, color=color, s=26, label=case.split(",")[0])
        ax.set(title=f"{net}, fitted, not trained", xlabel="part of the multiply-adds", ylabel="CIFAR-10 test, %")
    axes[0][0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


EVERY = ("original", "multiply_adds", "latency", "alone", "activations", "cost_of_time", "downstream",
         "from_scratch")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("docs/results.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what is there")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10 as an ImageFolder")
    parser.add_argument("--net", choices=[*CASES, "imagenet"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="what examples/train.py wrote")
    parser.add_argument("--cache", type=Path, help="folder for the decoded pictures [beside the pictures]")
    parser.add_argument("--tables", type=Path, help="folder for the sensitivity tables [beside --rows]")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints of from_scratch [none]")
    parser.add_argument("--only", nargs="+", choices=EVERY, help="some of the cases [those that docs/results.md shows]")
    args = parser.parse_args()
    if args.table:
        print("\n".join(markdown(read(args.rows))))
    if args.plot:
        plot(read(args.rows), args.plot)
    if args.table or args.plot:
        return
    if not (args.data_dir and args.net and args.weights):
        parser.error("--data-dir, --net and --weights are needed, or --table or --plot")
    warnings.simplefilter("ignore")
    if args.net == "imagenet":
        FromNothing(args).measure()
        return
    torch.set_num_threads(1)
    run = Run(args)
    for case in args.only or run.case.wanted:
        getattr(run, case)()


if __name__ == "__main__":
    main()
