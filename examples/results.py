"""The measurements behind docs/results.md: fitted and searched networks on CIFAR-10 against simpler methods.

    python examples/results.py --data-dir ~/data/cifar10 --net resnet20 --weights runs/resnet20-0/model.safetensors
    python examples/results.py --data-dir ~/data/cifar10 --net lite0 --weights runs/lite0-0/model.safetensors
    python examples/results.py --data-dir ~/data/imagenet-sample --net imagenet --weights efficientnet_lite0.pth
    python examples/results.py --table            # docs/results.jsonl as Markdown
    python examples/results.py --plot docs/results.svg

`--weights` is a file written by examples/train.py (its commands are in docs/results.md). Each row is appended to
`--rows` as soon as it is measured, and is not measured again; `--only` limits the run to some cases. Accuracies are on
the whole test set, run in onnxruntime; no choice depends on them. Fits use unlabeled train pictures.
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
from nmconv.timing import make_runner, thread_count, time_interleaved


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its original training, and its training after the conversion."""

    model: str
    size: int
    images: int  # number of train pictures for the original training, 0 for all
    training: Recipe  # for the original training
    fitting: slice  # the train pictures for fitting
    units: str  # pattern of the modules that are the units of the uniform choice
    tune: Recipe  # for the training after the conversion
    tuned_images: int  # number of train pictures for it
    default_cases: tuple[str, ...]  # names of methods of Run


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
COMPARED = (0.9, 0.8, 0.7)  # budgets at which uniform and random choices are measured, too
TUNED = {"lite0": (), "resnet20": (0.78, 0.66, 0.5), "resnet20-30": (0.78, 0.66, 0.5)}
RANDOM_DRAWS = 5


# Measurements


def network_outputs(model: nn.Module, pictures: Tensor, batch: int = 250) -> Tensor:
    """Return the network's outputs, computed in onnxruntime: on a CPU several times as fast as eager."""
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
    outputs = []
    for part in pictures.split(batch):
        x = inputs(model, part).contiguous().numpy()
        missing = batch - len(part)
        x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x
        outputs.append(torch.from_numpy(session.run(None, {name: x})[0][: len(part)]))
    return torch.cat(outputs)


def accuracy(model: nn.Module, split: Decoded) -> float:
    """Return the top-1 accuracy in percent."""
    return 100 * float((network_outputs(model, split.images).argmax(1) == split.labels).double().mean())


def plan_columns(plan: nmconv.Plan) -> dict[str, Any]:
    """Return the columns of a row that describe a plan."""
    parts = [f"{kernel.convs[0]}…{kernel.convs[-1]}: {kernel.size}" for kernel in plan.kernels]
    parts += [f"{branch.convs[0]}…{branch.convs[-1]}: gone" for branch in plan.branches]
    return {"activations": [plan.counts.activations_before, plan.counts.activations_after], "plan": parts}


# Choices without measurements


def units_of(table: nmconv.Sensitivity, pattern: str) -> list[list[nmconv.Candidate]]:
    """Return, for each module that matches the pattern, the kernels that could replace all its convolutions."""
    depth = pattern.count(".") + 1
    by_module: dict[str, dict[tuple[str, ...], list[nmconv.Candidate]]] = {}
    for candidate in table.candidates:
        modules = {".".join(conv.split(".")[:depth]) for conv in candidate.convs}
        if len(modules) == 1 and candidate.size not in ("", "none"):
            by_module.setdefault(modules.pop(), {}).setdefault(candidate.convs, []).append(candidate)
    longest = [max(by_convs.values(), key=lambda kernels: len(kernels[0].convs)) for by_convs in by_module.values()]
    return sorted(longest, key=lambda kernels: kernels[0].first)


def uniform_choice(table: nmconv.Sensitivity, pattern: str, needed: float) -> list[nmconv.Candidate]:
    """Choose evenly spaced units until they save enough, each as the largest kernel that halves its multiply-adds."""
    units = []
    for kernels in units_of(table, pattern):
        halved = [each for each in kernels if each.multiply_adds[1] <= each.multiply_adds[0] / 2] or kernels[:1]
        units.append(halved[-1])
    for count in range(1, len(units) + 1):
        indices = sorted({int((i + 0.5) * len(units) / count) for i in range(count)})
        candidates = [units[i] for i in indices]
        if sum(each.saves("multiply_adds") for each in candidates) >= needed:
            return candidates
    raise SystemExit(f"all {len(units)} units together save less than {needed:.0f} multiply-adds")


def random_choice(table: nmconv.Sensitivity, needed: float, seed: int) -> list[nmconv.Candidate]:
    """Draw compatible candidates at random until they save enough; start again if no candidate is left before that."""
    candidates = [each for each in table.candidates if each.size != "none" and each.saves("multiply_adds") > 0]
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        drawn: list[nmconv.Candidate] = []
        for i in rng.permutation(len(candidates)):
            candidate = candidates[i]
            if all(candidate.last < other.first or other.last < candidate.first for other in drawn):
                drawn.append(candidate)
            if sum(each.saves("multiply_adds") for each in drawn) >= needed:
                return drawn
    raise SystemExit(f"no random choice saves {needed:.0f} multiply-adds")


def plan_of(net: nn.Module, image: Tensor, some: Sequence[nmconv.Candidate]) -> nmconv.Plan:
    """Return the plan that carries out the given candidates."""
    plan = nmconv.make_plan(net, "1:1", example_inputs=image)
    plan = plan.edit({site: "drop" for candidate in some for site in candidate.sites})
    return plan.with_kernels({candidate.convs: candidate.size for candidate in some if candidate.size})


# The cases


class Run:
    """Measures all rows of one network and seed."""

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
        """Return the row of this name; measure and append it if it does not exist."""
        key = {"net": self.args.net, "seed": self.args.seed, "case": case, "name": name}
        for known in self.rows:
            if {column: known[column] for column in key} == key:
                return known
        clock = time.perf_counter()
        row = {**key, **measure()}
        row["seconds"] = round(time.perf_counter() - clock, 1)
        self.rows.append(row)
        with self.args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({column: value for column, value in row.items() if column != "plan"}, flush=True)
        return row

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
        values = {"multiply_adds": self.cost(model), "accuracy": self.accuracy(model), "kl": report.returned.loss}
        return {**values, **plan_columns(plan)}

    def tuned(self, model: nn.Module) -> float:
        """Train the model, distilling from the original, and return its accuracy."""
        case = self.case
        recipe = dataclasses.replace(case.tune, seed=self.args.seed, distill=0.5)
        train(model, self.first(case.tuned_images), recipe, teacher=copy.deepcopy(self.net), probe=250)
        return self.accuracy(model)

    def first(self, count: int) -> Data:
        """Return the data with `count` train pictures; 0 for all."""
        return limited(self.data, count or None)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def table(self, form: str, backend: str | None) -> nmconv.Sensitivity:
        folder = self.args.rows.parent if self.args.tables is None else self.args.tables
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.args.net}-{self.args.seed}-{form}-{backend}.json"
        clock = time.perf_counter()
        table = nmconv.sensitivity(self.net, self.images[::2], form=form, backend=backend, path=path, quiet=True)
        took = round(time.perf_counter() - clock, 1)
        self.row("sensitivity", f"{form}, {backend}", lambda: {"candidates": len(table.candidates), "took": took})
        return table

    def original(self) -> None:
        self.row("original", "as trained", lambda: {"accuracy": self.accuracy(self.net)})
        recalibrated = nmconv.recalibrate_norms(copy.deepcopy(self.net), self.images)  # the baseline without a fit
        self.row("original", "recalibrated", lambda: {"accuracy": self.accuracy(recalibrated)})
        self.row("original", "trained as long", lambda: {"accuracy": self.tuned(copy.deepcopy(self.net))})

    def alone(self) -> None:
        """Convert each unit alone: dropped, recalibrated, fitted, and fitted with all that follows."""
        for kernels in units_of(self.table("merged", "eager"), self.case.units):
            candidate = kernels[-1]
            unit = ".".join(candidate.convs[0].split(".")[: self.case.units.count(".") + 1])
            plan = plan_of(self.net, self.image, [candidate])

            def measure(plan: nmconv.Plan = plan, candidate: nmconv.Candidate = candidate) -> dict[str, Any]:
                model = nmconv.apply_plan(self.net, plan.with_kernels({}))
                values = {"dropped": self.accuracy(model)}
                values["recalibrated"] = self.accuracy(nmconv.recalibrate_norms(model, self.images))
                factors, merged = (plan.with_kernels(kernels) for kernels in ({}, {candidate.convs: "auto"}))
                values["factors"] = self.accuracy(self.fitted(factors))
                values["factors, downstream"] = self.accuracy(self.fitted(factors, downstream=True))
                values["fitted, downstream"] = self.accuracy(self.fitted(merged, downstream=True))
                model = self.fitted(merged)
                report = nmconv.get_fit(model)
                assert report is not None
                values["fitted"] = self.accuracy(model)
                values["kernel"] = "x".join(map(str, next(part.kernel for part in report.units if part.form)))
                return values

            self.row("alone", unit, measure)

    def multiply_adds(self) -> None:
        """Compare the search with uniform and random choices of the same multiply-adds."""
        table = self.table("merged", "eager")
        total = table.totals["multiply_adds"]
        for budget in BUDGETS[self.args.net]:
            row = self.searched(table, budget, "multiply_adds")
            if budget not in COMPARED:
                continue
            needed = (1 - row["multiply_adds"]) * total
            plan = plan_of(self.net, self.image, uniform_choice(table, self.case.units, needed))
            self.row("uniform", f"{budget}", lambda plan=plan: self.measured(plan))
            for draw in range(RANDOM_DRAWS):
                plan = plan_of(self.net, self.image, random_choice(table, needed, draw))
                self.row("random", f"{budget}, draw {draw}", lambda plan=plan: self.measured(plan))

    def search(self, path: Path, images: Tensor, **options: Any) -> tuple[nmconv.Plan, float]:
        """Search for a plan, store it in a file, and return it with the seconds that the search took."""
        clock = time.perf_counter()
        plan = nmconv.search(self.net, images, **options, quiet=True)
        took = round(time.perf_counter() - clock, 1)
        path.parent.mkdir(exist_ok=True)
        path.write_text(plan.to_json())
        return plan, took

    def search_row(
        self, case: str, name: str, table: nmconv.Sensitivity, budget: float, cost: str
    ) -> tuple[dict[str, Any], nmconv.Plan]:
        """Return the row of a searched plan, fitted, and the plan, which is stored in a file."""
        path = self.args.rows.parent / f"plans/{self.args.net}-{self.args.seed}-{cost}-{budget:.2g}.json"

        def measure() -> dict[str, Any]:
            plan, took = self.search(path, self.images[::2], budget=budget, cost=cost, sensitivity=table)
            reached = float(dict(plan.options)["reached"])
            return {"took": took, "reached": reached, **self.measured(plan)}

        row = self.row(case, name, measure)
        return row, nmconv.Plan.from_json(path.read_text())

    def searched(self, table: nmconv.Sensitivity, budget: float, cost: str) -> dict[str, Any]:
        row, plan = self.search_row(f"search, {cost}", f"{budget}", table, budget, cost)
        if cost == "latency" or budget in TUNED[self.args.net]:
            self.row(f"search, {cost}, tuned", f"{budget}", lambda: {"accuracy": self.tuned(self.fitted(plan))})
            if self.args.net == "resnet20" and budget == 0.78:
                self.row("latency", f"{budget}", lambda: self.times(self.fitted(plan)))
        return row

    def times(self, model: nn.Module) -> dict[str, Any]:
        """Time original over fitted: medians with quartiles, norms folded in both, one thread."""
        quotients = {}
        with thread_count(1):
            for backend in ("onnxruntime", "compile", "frozen", "eager"):
                for batch in (1, 8):
                    x = self.images[:batch]
                    runners = [make_runner(nmconv.fold_norms(each), (x,), backend) for each in (self.net, model)]
                    quotient = quotients(*time_interleaved(runners, rounds=25, seconds=0.1))
                    numbers = (quotient.median, quotient.lower, quotient.upper)
                    quotients[f"{backend} {batch}"] = [round(number, 3) for number in numbers]
        return quotients

    def latency(self) -> None:
        """Search with budgets of latency: eager, batch 1."""
        table = self.table("merged", "eager")
        for budget in (0.9, 0.8):
            self.searched(table, budget, "latency")

    def activations(self) -> None:
        """Drop half of the activations and keep all convolutions: compare the search with 2:1 everywhere."""
        uniform_plan = nmconv.make_plan(self.net, "2:1", keep="boundary", example_inputs=self.image)
        self.row("activations", "2:1", lambda: self.measured(uniform_plan))
        self.row("activations", "2:1, tuned", lambda: {"accuracy": self.tuned(self.fitted(uniform_plan))})
        counts = uniform_plan.counts
        kept = counts.activations_after / counts.activations_before
        for name, budget in (("search 0.5", 0.5), ("search, as many as 2:1", kept)):
            _, plan = self.search_row("activations", name, self.table("factors", None), budget, "activations")
            self.row("activations", f"{name}, tuned", lambda plan=plan: {"accuracy": self.tuned(self.fitted(plan))})

    def from_scratch(self) -> None:
        """Train 2:1 from random weights, as the original was trained."""
        recipe = dataclasses.replace(self.case.training, seed=self.args.seed)

        def measure() -> dict[str, Any]:
            net = build(self.case.model, len(self.data.classes), seed=self.args.seed)
            model = nmconv.convert(net, ratio="2:1", keep="boundary", example_inputs=self.image)
            train(model, self.first(self.case.images), recipe, out=self.args.scratch, probe=250)
            return {"accuracy": self.accuracy(model)}

        self.row("activations", "2:1, from scratch", measure)

    def downstream(self) -> None:
        """Fit the searched plans, including all convolutions after the first unit."""
        table = self.table("merged", "eager")
        for budget in BUDGETS[self.args.net]:
            _, plan = self.search_row("search, multiply_adds", f"{budget}", table, budget, "multiply_adds")

            def measure(plan: nmconv.Plan = plan) -> dict[str, Any]:
                return {"accuracy": self.accuracy(self.fitted(plan, downstream=True))}

            self.row("search, multiply_adds, downstream", f"{budget}", measure)

    def cost_of_time(self) -> None:
        """Measure the seconds that the fit of all units together takes."""
        table = self.table("merged", "eager")
        units = [rows[0] for rows in units_of(table, self.case.units)]
        plan = plan_of(self.net, self.image, units)

        def measure() -> dict[str, Any]:
            clock = time.perf_counter()
            self.fitted(plan)
            return {"units": len(units), "images": len(self.images), "took": round(time.perf_counter() - clock, 1)}

        self.row("time", "fit of all units", measure)


class WholeSearch(Run):
    """Measures a whole search of an ImageNet network: its time, and the agreement on other pictures."""

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
        """Search at three quarters of the latency."""
        path = self.args.rows.parent / f"plans/imagenet-{self.args.seed}-latency-0.75.json"

        def searched() -> dict[str, Any]:
            plan, took = self.search(path, self.images, budget=0.75, cost="latency")
            return {"took": took, "threads": torch.get_num_threads(), **self.agreement(plan), **plan_columns(plan)}

        self.row("from nothing", "search at 0.75 of the latency", searched)

    def agreement(self, plan: nmconv.Plan) -> dict[str, Any]:
        dropped = nmconv.apply_plan(self.net, plan.with_kernels({}))
        models = {"dropped": dropped, "recalibrated": nmconv.recalibrate_norms(copy.deepcopy(dropped), self.images)}
        models["fitted"] = self.fitted(plan)
        with torch.inference_mode():
            expected = self.net(self.others).argmax(1)
            agreement = {name: 100 * float((model(self.others).argmax(1) == expected).double().mean())
                         for name, model in models.items()}  # fmt: skip
        return {"multiply_adds": self.cost(models["fitted"]), "agreement": agreement}


# Rows and tables


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Rows:
    """The rows of one network."""

    def __init__(self, rows: Sequence[dict[str, Any]], net: str) -> None:
        self.rows = [row for row in rows if row["net"] == net]
        self.seeds = sorted({row["seed"] for row in self.rows})

    def of(self, case: str, name: str) -> dict[int, dict[str, Any]]:
        """Return the rows of a case and name by seed."""
        return {row["seed"]: row for row in self.rows if (row["case"], row["name"]) == (case, name)}

    def names(self, case: str) -> list[str]:
        return list(dict.fromkeys(row["name"] for row in self.rows if row["case"] == case))

    def values(self, case: str, name: str, key: str) -> list[float]:
        return [row[key] for row in self.of(case, name).values()]

    def lost(self, case: str, name: str, key: str = "accuracy", against: str = "as trained") -> list[float]:
        """Return the points of accuracy lost against the original of the same seed."""
        originals = self.of("original", against)
        return [
            originals[seed]["accuracy"] - row[key] for seed, row in self.of(case, name).items() if seed in originals
        ]


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of all tables: points of accuracy lost, mean ± sd over seeds."""
    for net in (*CASES, "imagenet"):
        net_rows = Rows(rows, net)
        if net_rows.seeds:
            yield f"## {net}, {len(net_rows.seeds)} seed{'s' * (len(net_rows.seeds) > 1)}"
            yield ""
            for against in net_rows.names("original"):
                yield f"- Original, {against}: {spread(net_rows.values('original', against, 'accuracy'))} %."
            for name in net_rows.names("time") + net_rows.names("sensitivity"):
                case = "time" if name in net_rows.names("time") else "sensitivity"
                what = f"sensitivity table ({name})" if case == "sensitivity" else name
                yield f"- Time of one core for the {what}: {spread(net_rows.values(case, name, 'took'), 0)} s."
            yield ""
            for row in (row for row in net_rows.rows if row["case"] == "from nothing"):
                shares = ", ".join(f"{name} {value:.1f} %" for name, value in row["agreement"].items())
                yield (
                    f"A {row['name']} from nothing, on 60 pictures of 160 px (threads: {row['threads']}), took "
                    f"{row['took']:.0f} s. Same top-1 class as the original on the 40 other pictures: {shares}, at "
                    f"{row['multiply_adds']:.3f} of the multiply-adds."
                )
                yield ""
            for part in (_alone, _budgets, _latency, _activations):
                yield from part(net_rows)


def _alone(net_rows: Rows) -> Iterator[str]:
    names = net_rows.names("alone")
    if not names:
        return
    columns = ("dropped", "recalibrated", "factors", "factors, downstream", "fitted", "fitted, downstream")
    yield "Each unit alone, no training; points lost:"
    yield ""
    forms = "fitted, factors | the same, downstream too | fitted, merged | the same, downstream too"
    yield f"| unit | dropped | dropped, recalibrated | {forms} | kernel |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in names:
        kernels = ", ".join(dict.fromkeys(row["kernel"] for row in net_rows.of("alone", name).values()))
        cells = " | ".join(spread(net_rows.lost("alone", name, key), sign=True) for key in columns)
        yield f"| {name} | {cells} | {kernels} |"
    medians = []
    for key in columns:
        by_seed: dict[int, list[float]] = {}
        for name in names:
            for seed, lost in zip(net_rows.of("alone", name), net_rows.lost("alone", name, key), strict=True):
                by_seed.setdefault(seed, []).append(lost)
        medians.append(spread([statistics.median(lost) for lost in by_seed.values()], sign=True))
    yield f"| **median** | {' | '.join(medians)} | |"
    yield ""


def _budgets(net_rows: Rows) -> Iterator[str]:
    names = net_rows.names("search, multiply_adds")
    if not names:
        return
    yield "Multiply-adds, fitted and not trained; points lost (random: mean of each seed's draws):"
    yield ""
    columns = "search | uniform | random | search, downstream too | search, then trained"
    yield f"| budget | search reached | {columns} | activations |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in sorted(names, reverse=True):
        draws: dict[int, list[float]] = {}
        for draw in range(RANDOM_DRAWS):
            rows = net_rows.of("random", f"{name}, draw {draw}")
            for seed, lost in zip(rows, net_rows.lost("random", f"{name}, draw {draw}"), strict=True):
                draws.setdefault(seed, []).append(lost)
        downstream = net_rows.lost("search, multiply_adds, downstream", name)
        trained = net_rows.lost("search, multiply_adds, tuned", name, against="trained as long")
        cells = [
            spread(net_rows.values("search, multiply_adds", name, "multiply_adds"), 3),
            spread(net_rows.lost("search, multiply_adds", name), sign=True),
            spread(net_rows.lost("uniform", name), sign=True) if net_rows.of("uniform", name) else "",
            spread([statistics.mean(lost) for lost in draws.values()], sign=True) if draws else "",
            spread(downstream, sign=True) if downstream else "",
            spread(trained, sign=True) if trained else "",
            " / ".join(f"{row['activations'][1]} of {row['activations'][0]}"
                       for row in net_rows.of("search, multiply_adds", name).values()),
        ]  # fmt: skip
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def _latency(net_rows: Rows) -> Iterator[str]:
    names = net_rows.names("search, latency")
    if names:
        yield "Latency (eager, one thread, batch 1); points lost:"
        yield ""
        yield "| budget | reached | multiply-adds | fitted | then trained |"
        yield "| --- | --- | --- | --- | --- |"
        for name in names:
            cells = [
                spread(net_rows.values("search, latency", name, "reached"), 3),
                spread(net_rows.values("search, latency", name, "multiply_adds"), 3),
                spread(net_rows.lost("search, latency", name), sign=True),
                spread(net_rows.lost("search, latency, tuned", name, against="trained as long"), sign=True),
            ]
            yield f"| {name} | {' | '.join(cells)} |"
        yield ""
    for name in net_rows.names("latency"):
        for seed, row in net_rows.of("latency", name).items():
            yield f"Original over fitted at {name} of the multiply-adds, seed {seed}, median (quartiles), one thread:"
            yield ""
            backends = [key for key in row if isinstance(row[key], list)]
            yield f"| {' | '.join(f'{key}' for key in backends)} |"
            yield f"|{' --- |' * len(backends)}"
            yield f"| {' | '.join(f'{row[key][0]} ({row[key][1]}–{row[key][2]})' for key in backends)} |"
            yield ""


def _activations(net_rows: Rows) -> Iterator[str]:
    names = net_rows.names("activations")
    if not names:
        return
    yield "Half of the activations, every convolution stays (factors form); points lost:"
    yield ""
    yield "| plan | activations | points lost |"
    yield "| --- | --- | --- |"
    for name in names:
        rows = net_rows.of("activations", name)
        counts = " / ".join(f"{row['activations'][1]} of {row['activations'][0]}" for row in rows.values()
                            if "activations" in row)  # fmt: skip
        against = "trained as long" if name.endswith("tuned") else "as trained"
        yield f"| {name} | {counts} | {spread(net_rows.lost('activations', name, against=against), sign=True)} |"
    yield ""


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot accuracy over multiply-adds after the fit, without training: search, uniform and random choices."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nmconv"  # makes the file deterministic
    import matplotlib.pyplot as plt

    nets = [net for net in CASES if any((row["net"], row["case"]) == (net, "uniform") for row in rows)]
    figure, axes = plt.subplots(1, len(nets), figsize=(4.5 * len(nets), 3.2), layout="constrained", squeeze=False)
    styles = {"random": ("x", "tab:gray"), "uniform": ("s", "tab:orange"), "search, multiply_adds": ("o", "tab:blue")}
    for ax, net in zip(axes[0], nets, strict=True):
        net_rows = Rows(rows, net)
        ax.axhline(
            statistics.mean(net_rows.values("original", "as trained", "accuracy")), color="black", lw=0.8, ls=":"
        )
        for case, (marker, color) in styles.items():
            points = [(row["multiply_adds"], row["accuracy"]) for row in net_rows.rows if row["case"] == case]
            if points:
                ax.scatter(*zip(*points, strict=True), marker=marker, color=color, s=26, label=case.split(",")[0])
        ax.set(title=f"{net}, fitted, not trained", xlabel="part of the multiply-adds", ylabel="CIFAR-10 test, %")
    axes[0][0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


ALL_CASES = ("original", "multiply_adds", "latency", "alone", "activations", "cost_of_time", "downstream",
         "from_scratch")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("docs/results.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the rows of --rows as tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the rows of --rows")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10 as an ImageFolder")
    parser.add_argument("--net", choices=[*CASES, "imagenet"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="what examples/train.py wrote")
    parser.add_argument("--cache", type=Path, help="folder for the decoded pictures [beside the pictures]")
    parser.add_argument("--tables", type=Path, help="folder for the sensitivity tables [beside --rows]")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints of from_scratch [none]")
    parser.add_argument(
        "--only", nargs="+", choices=ALL_CASES, help="some of the cases [those that docs/results.md shows]"
    )
    args = parser.parse_args()
    if args.table:
        print("\n".join(markdown(read(args.rows))))
    if args.plot:
        plot(read(args.rows), args.plot)
    if args.table or args.plot:
        return
    if not (args.data_dir and args.net and args.weights):
        parser.error("give --data-dir, --net and --weights, or --table or --plot")
    warnings.simplefilter("ignore")
    if args.net == "imagenet":
        WholeSearch(args).measure()
        return
    torch.set_num_threads(1)
    run = Run(args)
    for case in args.only or run.case.default_cases:
        getattr(run, case)()


if __name__ == "__main__":
    main()
