"""Train a network on real pictures at 1:1 and at N:M, side by side, and merge its linear runs.

    python examples/demo.py                               # scikit-learn's handwritten digits: nothing is downloaded
    python examples/demo.py --ratio 2:1 3:1 --seeds 5
    python examples/demo.py --ratio 3:1 --model mobilenetv2_050 --relocate --hoist     # most of its convolutions merge
    python examples/demo.py --data-dir ~/data/cifar10     # any ImageFolder: train/<class>/*, test/<class>/* (or val/)

160 of the digits are the train set, and the other 1,637 the test set. At each seed, all networks start from the same
weights and see the same batches; only the activations differ. A few seeds and a short schedule show that training
works, but not which ratio is better.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from recipes.batches import inputs
from recipes.cost import latencies, multiply_adds
from recipes.networks import build
from recipes.pictures import Data, Decoded, balanced, decoded, load_data
from recipes.recipe import Recipe
from recipes.tables import spread
from recipes.training import evaluate, train
from recipes.trial import Trial
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from timm.utils import ParseKwargs
from torch import Tensor, nn

import nmconv

SMALL = {"channels": (16, 32, 64, 128)}  # a quarter of resnet18's width
LABELLED = 160  # digits to train on; with all of them, every ratio reaches 99 %

LEGEND = """\
accuracy: on the test pictures, mean ± standard deviation over the seeds
loss: in training, last epoch      MACs: multiply-adds of one picture
latency: of one picture, one thread, norms folded in all, relative to 1:1
diff: between converted and merged outputs, relative to the largest
A few seeds and a short schedule: no claim about which ratio is better."""


@dataclass
class Run:
    """A network of one ratio and seed, and the results of its training."""

    ratio: str
    seed: int
    model: nn.Module
    plan: nmconv.Plan
    losses: Sequence[float] = ()  # by epoch
    curve: Sequence[float] = ()  # accuracies on the first test pictures, by epoch
    accuracy: float = 0.0  # on all test pictures, in percent
    difference: float | None = None  # of a merged network: from the converted outputs, over the largest of them


def digits(size: int, limit: int) -> Data:
    """Load scikit-learn's 1,797 handwritten 8x8 digits, enlarged and with three equal channels; 160 are to train on."""
    pixels, labels = load_digits(return_X_y=True)
    rows = balanced(labels)
    grey = torch.from_numpy(pixels[rows]).float().view(-1, 1, 8, 8) * (255 / 16)
    grey = F.interpolate(grey, size=(size, size), mode="bilinear").round().to(torch.uint8)
    pictures = Decoded(grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3), torch.from_numpy(labels[rows]).long())
    count = limit or None
    return Data(pictures.first(LABELLED).first(count), pictures.after(LABELLED).first(count), tuple("0123456789"))


def image_folder(root: Path, size: int, limit: int) -> Data:
    """Load and decode the first `limit` pictures of each split of an ImageFolder with train/ and test/ (or val/)."""
    data = load_data(root, decode=False)
    splits = [split.first(limit or None) for split in (data.train, data.test)]
    train_split, test_split = (
        Decoded(torch.from_numpy(decoded(split.dataset, size, None, "")), split.labels) for split in splits
    )
    return Data(train_split, test_split, data.classes)


def network(args: argparse.Namespace, ratio: str, seed: int, classes: int) -> Run:
    """Build the network at `ratio` with the seed's initial weights, and its plan."""
    model = build(args.model, classes, seed=seed, **args.model_kwargs)
    if ratio == "1:1":  # the baseline
        return Run(ratio, seed, model, Trial().plan(model))
    model = nmconv.convert(
        model, ratio, keep="boundary", relocate=args.relocate, hoist_padding=args.hoist, inplace=True
    )
    return Run(ratio, seed, model, nmconv.get_plan(model))


def merged(run: Run, data: Data, args: argparse.Namespace) -> Run:
    """Merge the linear runs of a trained network where the gate allows it, and fold its norms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        model = nmconv.merge(run.model, gate=args.gate)
    with torch.inference_mode():
        x = inputs(run.model, data.test.first(64).images)
        before, after = run.model(x), model(x)
    difference = float((before - after).abs().max() / before.abs().max())
    return Run(run.ratio, run.seed, model, run.plan, accuracy=evaluate(model, data.test), difference=difference)


def deployed(runs: list[Run]) -> nn.Module:
    """Return the first seed's network with its norms folded, as merging has already done."""
    return runs[0].model if runs[0].difference is not None else nmconv.fold_norms(runs[0].model)


def table(rows: list[list[Run]], x: Tensor, args: argparse.Namespace) -> Table:
    """Make a table with a row for each ratio, and one for its merged network; at most 80 columns wide."""
    out = Table(title=args.title)
    out.add_column("ratio", no_wrap=True)
    for heading in ("accuracy, %", "loss", "convs", "acts", "MACs, M", "latency", "diff"):
        out.add_column(heading, justify="right", no_wrap=True)
    for runs, latency in zip(rows, latencies([deployed(runs) for runs in rows], x), strict=True):
        first = runs[0]
        is_merged = first.difference is not None
        convs = sum(isinstance(module, nn.modules.conv._ConvNd) for module in first.model.modules())
        out.add_row(
            "  merged" if is_merged else first.ratio,
            spread([run.accuracy for run in runs], 1),
            "" if is_merged else f"{statistics.mean(run.losses[-1] for run in runs):.3f}",
            str(convs),
            str(first.plan.counts.activations_after),
            f"{multiply_adds(first.model, x) / 1e6:.1f}",
            f"{latency:.2f}x",
            f"{max(run.difference for run in runs):.0e}" if is_merged else "",
        )
    return out


def plot(rows: list[list[Run]], args: argparse.Namespace) -> None:
    """Plot the means over the seeds, with a band of one standard deviation to either side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = np.arange(1, args.epochs + 1)
    for runs in rows:
        label = f"{runs[0].ratio}, {runs[0].plan.counts.activations_after} activations"
        for axes, curves in ((left, [run.losses for run in runs]), (right, [run.curve for run in runs])):
            mean = np.mean(curves, axis=0)
            axes.plot(epochs, mean, marker=".", label=label)
            if len(runs) > 1:
                deviation = np.std(curves, axis=0, ddof=1)
                axes.fill_between(epochs, mean - deviation, mean + deviation, alpha=0.2)
    left.set(xlabel="epoch", ylabel="train loss (label smoothing 0.1)")
    right.set(xlabel="epoch", ylabel=f"accuracy on {args.probe} test pictures, %")
    right.legend()
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{args.title}: mean ± sd, a short schedule")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)


def pluralized(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", nargs="+", default=["2:1"], metavar="N:M", help="ratios to train besides 1:1 [2:1]")
    parser.add_argument("--relocate", action="store_true", help="move kept activations to the ends of their units")
    parser.add_argument("--hoist", action="store_true", help="move padding to the front of linear runs before training")
    parser.add_argument(
        "--gate",
        choices=("multiply_adds", "always"),
        default="multiply_adds",
        help="what is merged afterwards [multiply_adds]",
    )
    parser.add_argument("--model", default="resnet18", help="as for train.py [resnet18, a quarter as wide]")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--data-dir", type=Path, help="an ImageFolder with train/ and test/ or val/ [digits]")
    parser.add_argument("--size", type=at_least(1), default=32, help="side of the pictures [32]")
    parser.add_argument("--limit", type=at_least(0), default=4000, help="most pictures a split, 0 for all [4000]")
    parser.add_argument("--epochs", type=at_least(1), default=30, help="[30]")
    parser.add_argument("--batch-size", type=at_least(2), default=32, help="[32]")
    parser.add_argument("--lr", type=float, default=2e-3, help="[0.002]")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="how many [3]")
    parser.add_argument("--device", default="", help="cpu, or the best there is")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="where the plot goes [out/demo.png]")
    args = parser.parse_args()
    name = args.model
    if name == "resnet18" and not args.model_kwargs:
        name, args.model_kwargs = "resnet18, a quarter as wide", SMALL
    args.title = f"{name}: {pluralized(args.epochs, 'epoch')}, {pluralized(args.seeds, 'seed')}"
    return args


def recipe(args: argparse.Namespace, seed: int) -> Recipe:
    """Return AdamW with a cosine schedule. Digits are not augmented: a shift or reflection can change their class."""
    options: dict[str, Any] = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": seed}
    augment = "none" if args.data_dir is None else "shift"
    warmup = min(2, args.epochs - 1)
    return Recipe(**options, opt="adamw", weight_decay=0.05, warmup=warmup, smoothing=0.1, augment=augment)


def main() -> None:
    args = parse()
    console = Console()
    try:
        if args.data_dir is None:
            data = digits(args.size, args.limit)
        else:
            data = image_folder(args.data_dir.expanduser(), args.size, args.limit)
        sizes = f"{len(data.train)} pictures to train on, {len(data.test)} to test on"
        console.print(f"{sizes}, {len(data.classes)} classes")
        args.probe = min(500, len(data.test))
        classes = len(data.classes)
        ratios = dict.fromkeys(["1:1", *args.ratio])
        trained = [[network(args, ratio, seed, classes) for seed in range(args.seeds)] for ratio in ratios]
        for run, *_ in trained[1:]:
            console.print(f"\nThe plan at {run.ratio}:")
            console.print(str(run.plan), markup=False, highlight=False, soft_wrap=True)
        for run in (run for runs in trained for run in runs):
            options = {"device": args.device, "probe": args.probe, "quiet": True}
            log = train(run.model, data, recipe(args, run.seed), **options)
            run.losses, run.curve = log["losses"], log["curve"]
            run.accuracy = evaluate(run.model, data.test)
            console.print(f"{run.ratio}, seed {run.seed}: {run.accuracy:.1f} % after {log['seconds']:.0f} s")
    except (nmconv.NmconvError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    plot(trained, args)
    x = inputs(trained[0][0].model, data.test.first(1).images)
    rows = []
    for runs in trained:
        rows.append(runs)
        if runs[0].ratio != "1:1":
            rows.append([merged(run, data, args) for run in runs])
    console.print(table(rows, x, args))
    console.print(LEGEND)
    console.print(f"The plot is in {args.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
