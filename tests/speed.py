"""What a conversion costs, and what a converted model costs: measured, one thread, interleaved, as ratios.

    python tests/speed.py            one model of every timm file, and torchvision's classifiers
    python tests/speed.py --all      every model of both zoos

1. ``nmconv.convert(model, inplace=True)`` against one ``torch.fx.symbolic_trace`` of the same model (meta device: no
   arithmetic on either side), for the models that plain tracing can trace.
2. ``nmconv.merge`` of the hoisted 2:1 conversion against the same trace, its verification (each run beside its
   original, and the result traced again) left out, on the meta device too: finding, choosing, copying, rewriting.
   In brackets the same on the CPU, with the new weights: there it grows with the weights, which a trace never touches.
3. A converted model's forward against the same model edited by hand.
"""

from __future__ import annotations

import argparse
import statistics
import time
import unittest.mock
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import zoo
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils.benchmark import Timer

import nmconv
from nmconv.merging import _merge


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def brackets(parts: list[str]) -> str:
    """The first, and what else there is in brackets."""
    return " ".join([parts[0], *(f"({part})" for part in parts[1:])])


def conversion(name: str, rounds: int = 2) -> tuple[float, float] | None:
    """Least seconds of a symbolic trace and of a conversion in place, of a fresh model each; None if not traceable."""
    traces, conversions = [], []
    device = "cpu" if name in zoo.NOT_ON_META else "meta"
    for _ in range(rounds):
        model = zoo.build(name, device)
        try:
            traces.append(seconds(lambda model=model: torch.fx.symbolic_trace(model)))
        except Exception:
            return None
        model = zoo.build(name, device)
        try:
            conversions.append(seconds(lambda model=model: nmconv.convert(model, inplace=True, witness=False)))
        except nmconv.NoSitesError:
            return None
    return min(traces), min(conversions)


def merging(name: str, rounds: int = 3) -> tuple[float, float, float] | None:
    """Least seconds of a symbolic trace, and of a merge without its verification, on the meta device and on the CPU.

    None if not traceable.
    """
    found = []
    for device in ("cpu" if name in zoo.NOT_ON_META else "meta", "cpu"):
        model = zoo.build(name, device)
        try:
            traces = [seconds(lambda model=model: torch.fx.symbolic_trace(model)) for _ in range(rounds)]
            converted = nmconv.convert(model, hoist_padding=True, inplace=True, witness=False).eval()
        except Exception:
            return None
        verification = ("check_segment", "check_calls", "calls_by_kind")
        with unittest.mock.patch.multiple(_merge, **dict.fromkeys(verification, lambda *_, **__: None)):
            merges = [seconds(lambda model=converted: nmconv.merge(model, witness=False)) for _ in range(rounds)]
        found.append((min(traces), min(merges)))
    (trace, merge), (_, arithmetic) = found
    return trace, merge, arithmetic


class HandEdited(torchvision.models.resnet.BasicBlock):
    """torchvision's basic block at 2:1, as a person would write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def by_hand_torchvision() -> tuple[nn.Module, nn.Module]:
    """resnet18 converted, and the same with its blocks' class changed by hand."""
    model = torchvision.models.resnet18()
    converted = nmconv.convert(model)
    for module in model.modules():
        if type(module) is torchvision.models.resnet.BasicBlock:
            module.__class__ = HandEdited
    return converted, model


def by_hand_timm() -> tuple[nn.Module, nn.Module]:
    """tf_efficientnet_lite0 converted, and the same with its first activations replaced by hand."""
    model = timm.create_model("tf_efficientnet_lite0")
    converted = nmconv.convert(model)
    model.bn1.act = nn.Identity()
    for block in (block for stage in model.blocks[1:] for block in stage):
        block.bn1.act = nn.Identity()
    return converted, model


def forward_ratio(pair: tuple[nn.Module, nn.Module], rounds: int) -> tuple[float, float]:
    """Median of (converted / edited by hand) over interleaved rounds, and the median of the same model with itself."""
    converted, edited = (model.eval() for model in pair)
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(converted(x), edited(x)), "the hand edit does something else"
        timers = [
            Timer("model(x)", globals={"model": model, "x": x}, num_threads=1) for model in (converted, edited, edited)
        ]
        for timer in timers:
            timer.timeit(3)
        times = [[timer.timeit(2).mean for timer in timers] for _ in range(rounds)]
    return statistics.median(a / b for a, b, _ in times), statistics.median(c / b for _, b, c in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every model of both zoos (an hour)")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of the forward comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console()
    names = zoo.all_names() if options.all else zoo.quick_names()
    for title, measure in (("convert", conversion), ("merge", merging)):
        rows = {name: times for name in track(names, title) if (times := measure(name)) is not None}
        table = Table("model", "symbolic_trace [ms]", f"{title} [ms]", "ratio", title=f"{title} against one trace")
        for name, (trace, *costs) in sorted(rows.items(), key=lambda row: row[1][1] / row[1][0]):
            cost, ratio = (
                brackets([f"{value * by:.{digits}f}" for value in costs]) for by, digits in ((1e3, 0), (1 / trace, 2))
            )
            table.add_row(name, f"{trace * 1e3:.0f}", cost, ratio)
        console.print(table)
        for at, where in enumerate(("", " (with its arithmetic)")[: 1 + (title == "merge")], 1):
            ratios = sorted(times[at] / times[0] for times in rows.values())
            above = sum(ratio > 5 for ratio in ratios)
            print(
                f"{title}{where}: median {statistics.median(ratios):.2f}x over {len(ratios)} models, {above} above 5x"
            )
    for name, pair in (("torchvision resnet18", by_hand_torchvision()), ("tf_efficientnet_lite0", by_hand_timm())):
        ratio, noise = forward_ratio(pair, options.rounds)
        print(f"{name}: converted / edited by hand = {ratio:.4f} (the same model against itself: {noise:.4f})")


if __name__ == "__main__":
    main()
