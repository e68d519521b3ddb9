"""Draw docs/gradual.svg: what a gradual site computes, and how its slope rises.

python docs/gradual.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import nn

import nmconv

X = torch.linspace(-2.0, 2.0, 41)
STEPS = 50
SCHEDULES = {
    "cosine, the default": {},
    "linear": {"schedule": "linear"},
    "cosine, start=0.2, end=0.8": {"start": 0.2, "end": 0.8},
}
STYLE = {"svg.hashsalt": "nmconv", "svg.fonttype": "none", "path.simplify": False, "font.size": 9}


def soft() -> nn.Sequential:
    """A gradual model whose module 1 is a ReLU that the plan drops."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.ReLU())
    return nmconv.convert(net, "2:1", keep="boundary", gradual=True)


def curves() -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """The lines of both panels, by the panel's name and the line's."""
    model = soft()
    sites, slopes = {}, {}
    for slope, name in ((0.0, "s = 0: ReLU"), (0.5, "s = 0.5: Leaky ReLU"), (1.0, "s = 1: identity")):
        nmconv.set_slope(model, slope)
        sites[name] = (X.tolist(), model[1](X.view(1, 1, 1, -1)).flatten().tolist())
    for name, options in SCHEDULES.items():
        gradual = nmconv.Gradual(model, STEPS, **options)
        slopes[name] = ([n / STEPS for n in range(STEPS + 1)], [gradual.slope_at(n) for n in range(STEPS + 1)])
    return {"site": sites, "slope": slopes}


def draw(path: Path) -> None:
    """Write the picture as SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.1))
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.08, right=0.98, bottom=0.16, top=0.9, wspace=0.22)
        for axes, lines in zip(panels, curves().values(), strict=True):
            for (name, (x, y)), style in zip(lines.items(), ("-", "--", "-."), strict=True):
                axes.plot(x, y, style, label=name, gid=name)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        panels[0].set(title="a ReLU that is dropped by degrees", xlabel="x", ylabel="lerp(ReLU(x), x, s)")
        panels[1].set(title="the slope while the network trains", xlabel="n / total_steps", ylabel="s(n)")
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("gradual.svg"))
