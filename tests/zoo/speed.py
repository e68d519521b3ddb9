"""What a conversion and a merge cost, in CPU seconds of one thread, and a converted model's forward, as a ratio.

    python -m zoo.speed                  one model of every timm file, and torchvision's classifiers
    python -m zoo.speed --all            every model of both zoos
    python -m zoo.speed timm/resnet50    these, and nothing else

1. ``nmconv.convert`` at 2:1, with and without the witness.
2. ``nmconv.merge`` of the hoisted conversion at ``--ratio``, with and without.
3. A converted model's forward against the same model edited by hand, interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils.benchmark import Timer

import nmconv
from zoo import models as zoo


def seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def costs(name: str, ratio: str) -> tuple[float, float, float, float] | None:
    """Of a conversion with and without the witness, and of a merge; None for a model without sites."""
    model = zoo.build(name).eval()
    given = {"example_inputs": next(zoo.inputs(model))} if zoo.is_detector(model) else {}
    try:
        converted = nmconv.convert(model, ratio, keep="boundary", hoist_padding=True, **given)
    except nmconv.NoSitesError:
        return None
    calls = [
        partial(nmconv.convert, model, keep="boundary", **given),
        partial(nmconv.convert, model, keep="boundary", witness=False, **given),
        partial(nmconv.merge, converted, **given),
        partial(nmconv.merge, converted, witness=False, **given),
    ]
    one, two, three, four = map(seconds, calls)
    return one, two, three, four


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
    converted = nmconv.convert(model, keep="boundary")
    for module in model.modules():
        if type(module) is torchvision.models.resnet.BasicBlock:
            module.__class__ = HandEdited
    return converted, model


def by_hand_timm() -> tuple[nn.Module, nn.Module]:
    """tf_efficientnet_lite0 converted, and the same with its first activations replaced by hand."""
    model = timm.create_model("tf_efficientnet_lite0")
    converted = nmconv.convert(model, keep="boundary")
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
    parser.add_argument("names", nargs="*", help="these only")
    parser.add_argument("--ratio", default="2:1", help="of the conversion that is merged")
    parser.add_argument("--all", action="store_true", help="every model of both zoos (an hour)")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of the forward comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console()
    names = options.names or (zoo.all_names() if options.all else zoo.one_of_each_file())
    rows = {name: found for name in track(names, "models") if (found := costs(name, options.ratio)) is not None}
    table = Table("model", "convert, s", "without witness", "merge, s", "without witness")
    for name, found in sorted(rows.items(), key=lambda row: row[1][0]):
        table.add_row(name, *(f"{value:.2f}" for value in found))
    console.print(table)
    titles = ("convert", "convert without witness", "merge", "merge without witness")
    for title, column in zip(titles, zip(*rows.values(), strict=True), strict=True):
        print(f"{title}: median {statistics.median(column):.2f} s, largest {max(column):.2f} s")
    if options.names:
        return
    for name, pair in (("torchvision resnet18", by_hand_torchvision()), ("tf_efficientnet_lite0", by_hand_timm())):
        ratio, noise = forward_ratio(pair, options.rounds)
        print(f"{name}: converted / edited by hand = {ratio:.4f} (the same model against itself: {noise:.4f})")


if __name__ == "__main__":
    main()
