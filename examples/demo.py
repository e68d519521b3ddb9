"""Train a timm network on real pictures at 1:1 and at N:M, side by side, and merge what training leaves linear.

    python examples/demo.py                               # scikit-learn's handwritten digits: nothing is downloaded
    python examples/demo.py --ratio 2:1 3:1 --seed 1
    python examples/demo.py --ratio 3:1 --model mobilenetv2_050 --relocate --hoist     # most of its convolutions merge
    python examples/demo.py --data-dir ~/data/cifar10     # any ImageFolder: train/<class>/*, test/<class>/* (or val/)

Every network starts from the same weights and sees the same batches; only the activations differ. One seed and a short
schedule show that training works and what it looks like. They do not show which ratio is better.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder

import nmconv

SMALL = {"channels": (16, 32, 64, 128)}  # a quarter of resnet18's width: seconds an epoch on two cores


@dataclass(frozen=True)
class Split:
    """Pictures, uint8 of shape (n, channels, size, size), and their class numbers."""

    images: Tensor
    labels: Tensor


@dataclass
class Run:
    """What one network's training left behind."""

    ratio: str
    model: nn.Module
    plan: nmconv.Plan
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    difference: float | None = None  # of a merged network: from the converted one, of the largest output

    @property
    def name(self) -> str:
        return self.ratio if self.difference is None else f"{self.ratio} merged"


def digits(size: int, limit: int) -> tuple[Split, Split, int]:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8x8; a fifth of them, always the same, is the test set."""
    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(images).float().view(-1, 1, 8, 8) * (255 / 16)
    grey = F.interpolate(grey, size=(size, size), mode="bilinear").round().to(torch.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    classes = torch.from_numpy(labels).long()
    parts = [Split(grey[rows], classes[rows]) for rows in (train[: limit or None], test[: limit or None])]
    return parts[0], parts[1], 10


def image_folder(root: Path, size: int, limit: int, progress: Progress) -> tuple[Split, Split, int]:
    """An ImageFolder with train/ and test/ (or val/), decoded once: short side to `size`, then the middle."""
    held_out = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        raise SystemExit(f"{root}: an ImageFolder with train/ and test/ (or val/) is wanted")
    folders = [ImageFolder(str(root / name)) for name in ("train", held_out)]
    if folders[0].classes != folders[1].classes:
        raise SystemExit(f"{root}: train/ and {held_out}/ do not have the same classes")
    parts = []
    for name, folder in zip(("train", held_out), folders, strict=True):
        rows = np.random.default_rng(0).permutation(len(folder))[: limit or None]
        images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
        for i, row in enumerate(progress.track(rows, description=f"decode {name}")):
            with Image.open(folder.samples[row][0]) as file:
                picture = file.convert("RGB")
            scale = size / min(picture.size)
            width, height = (max(size, round(side * scale)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - size) // 2, (height - size) // 2
            pixels = np.array(picture.crop((left, top, left + size, top + size)))
            images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        parts.append(Split(images, torch.tensor([folder.targets[row] for row in rows])))
    return parts[0], parts[1], len(folders[0].classes)


class Normalise:
    """uint8 pictures to floats with mean 0 and deviation 1 per channel, as measured on the training pictures."""

    def __init__(self, split: Split, device: str) -> None:
        pixels = split.images.float().div(255)
        self.device = device
        self.mean = pixels.mean((0, 2, 3), keepdim=True).to(device)
        self.std = pixels.std((0, 2, 3), keepdim=True).clamp_min(1e-3).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.device).float().div(255) - self.mean) / self.std


def build(args: argparse.Namespace, ratio: str, channels: int, classes: int) -> Run:
    """The network at `ratio`, from the seed's initial weights, with the plan for its activations."""
    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, in_chans=channels, num_classes=classes, **args.model_kwargs)
    with warnings.catch_warnings():
        if ratio == "1:1":  # the network as it is, for comparison: that nothing changes is no news
            warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        plan = nmconv.make_plan(model, ratio)
    if ratio != "1:1":
        model = nmconv.convert(model, ratio, relocate=args.relocate, hoist_padding=args.hoist, inplace=True)
        plan = nmconv.get_plan(model)
    return Run(ratio, model.to(args.device), plan)


def evaluate(model: nn.Module, split: Split, normalise: Normalise) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    with torch.inference_mode():
        batches = zip(split.images.split(256), split.labels.split(256), strict=True)
        right = sum(int((model(normalise(x)).argmax(1).cpu() == y).sum()) for x, y in batches)
    return 100 * right / len(split.labels)


def train(run: Run, train_split: Split, test_split: Split, args: argparse.Namespace, progress: Progress) -> None:
    """Train with AdamW under a cosine, batches drawn from the seed; losses and accuracies go into `run`."""
    model = run.model
    normalise = Normalise(train_split, args.device)
    batch = min(args.batch_size, len(train_split.labels))
    steps = len(train_split.labels) // batch
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=args.epochs,
        warmup_epochs=min(2, args.epochs - 1),
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    loss_of = LabelSmoothingCrossEntropy(0.1)
    shuffle = torch.Generator().manual_seed(args.seed)
    task = progress.add_task(f"train at {run.ratio}", total=args.epochs * steps)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(train_split.labels), generator=shuffle)
        for step, rows in enumerate(order[: steps * batch].split(batch)):
            loss = loss_of(model(normalise(train_split.images[rows])), train_split.labels[rows].to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * steps + step + 1)
            total += loss.item()
            progress.advance(task)
        run.losses.append(total / steps)
        run.accuracies.append(evaluate(model, test_split, normalise))
        progress.update(task, description=f"train at {run.ratio}: {run.accuracies[-1]:.1f} %")
    run.seconds = time.perf_counter() - start


def merged(run: Run, test_split: Split, args: argparse.Namespace) -> Run:
    """The trained network with its linear runs merged where that saves multiply-adds, and its norms folded."""
    normalise = Normalise(test_split, args.device)
    model = run.model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        after = nmconv.merge(model, gate=args.gate)
    with torch.inference_mode():
        x = normalise(test_split.images[:64])
        one, other = model(x), after(x)
    result = Run(run.ratio, after, run.plan, run.losses, [evaluate(after, test_split, normalise)])
    result.difference = float((one - other).abs().max() / one.abs().max())
    return result


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Of one picture."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def latencies(runs: list[Run], x: Tensor, rounds: int = 9) -> list[float]:
    """Median milliseconds of one forward, one thread, the networks taking turns; norms folded in all of them."""
    models = [run.model if run.difference is not None else nmconv.fold_norms(run.model.eval()) for run in runs]
    with torch.inference_mode():
        timers = [Timer("model(x)", globals={"model": model, "x": x}, num_threads=1) for model in models]
        samples = np.array([[timer.timeit(5).median for timer in timers] for _ in range(rounds)])
    return [float(value) * 1e3 for value in np.median(samples, axis=0)]


def table(runs: list[Run], x: Tensor, args: argparse.Namespace) -> Table:
    out = Table(title=f"{args.title}: {args.epochs} epoch(s), one seed ({args.seed})")
    for heading in ("ratio", "reached", "convs", "activations", "multiply-adds", "latency", "train loss"):
        out.add_column(heading, justify="right")
    for heading in ("test accuracy", "seconds", "difference"):
        out.add_column(heading, justify="right")
    times = latencies(runs, x)
    for run, milliseconds in zip(runs, times, strict=True):
        convs = sum(isinstance(module, nn.modules.conv._ConvNd) for module in run.model.modules())
        out.add_row(
            run.name,
            run.plan.counts.ratio_reached,
            str(convs),
            str(run.plan.counts.activations_after),
            f"{multiply_adds(run.model, x) / 1e6:.1f} M",
            f"{milliseconds / times[0]:.2f}x",
            f"{run.losses[-1]:.3f}",
            f"{run.accuracies[-1]:.2f} %",
            f"{run.seconds:.0f}" if run.seconds else "",
            "" if run.difference is None else f"{run.difference:.0e}",
        )
    return out


def plot(runs: list[Run], args: argparse.Namespace) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        label = f"{run.ratio}, {run.plan.counts.activations_after} activations"
        epochs = range(1, len(run.losses) + 1)
        left.plot(epochs, run.losses, marker=".", label=label)
        right.plot(epochs, run.accuracies, marker=".", label=label)
    left.set(xlabel="epoch", ylabel="train loss (label smoothing 0.1)")
    right.set(xlabel="epoch", ylabel="test accuracy, %")
    right.legend()
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{args.title}: one seed ({args.seed}), a short schedule")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)


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
        "--gate", choices=("flops", "always"), default="flops", help="what is merged afterwards [flops]"
    )
    parser.add_argument("--model", default="resnet18", help="a timm model [resnet18, a quarter as wide]")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--data-dir", type=Path, help="an ImageFolder with train/ and test/ or val/ [digits]")
    parser.add_argument("--size", type=at_least(1), default=32, help="side of the pictures [32]")
    parser.add_argument("--limit", type=at_least(0), default=4000, help="most pictures a split, 0 for all [4000]")
    parser.add_argument("--epochs", type=at_least(1), default=15)
    parser.add_argument("--batch-size", type=at_least(2), default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="where the plot goes [out/demo.png]")
    args = parser.parse_args()
    args.title = args.model
    if args.model == "resnet18" and not args.model_kwargs:
        args.title, args.model_kwargs = "resnet18, a quarter as wide", SMALL
    return args


def main() -> None:
    args = parse()
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        if args.data_dir is None:
            train_split, test_split, classes = digits(args.size, args.limit)
        else:
            train_split, test_split, classes = image_folder(args.data_dir.expanduser(), args.size, args.limit, progress)
        channels = train_split.images.shape[1]
        sizes = f"{len(train_split.labels)} pictures to train on, {len(test_split.labels)} to test on"
        console.print(f"{sizes}, {classes} classes")
        try:
            runs = [build(args, ratio, channels, classes) for ratio in dict.fromkeys(["1:1", *args.ratio])]
        except nmconv.NmconvError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
        for run in runs[1:]:
            console.print(f"\nThe plan at {run.ratio}:")
            console.print(str(run.plan), markup=False, highlight=False, soft_wrap=True)
        for run in runs:
            train(run, train_split, test_split, args, progress)
    plot(runs, args)
    x = Normalise(train_split, args.device)(test_split.images[:1])
    rows = [row for run in runs for row in ([run] if run.ratio == "1:1" else [run, merged(run, test_split, args)])]
    console.print(table(rows, x, args))
    console.print("Latency: of one picture, one thread, norms folded in every network, relative to 1:1.")
    console.print("One seed and a short schedule: no claim about which ratio is better.")
    console.print(f"The plot is in {args.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
