"""The sensitivity table: the measurements of all candidates, as plain data in one file."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from nmconv.errors import FileError, OptionError
from nmconv.planning import nan_if_null, read_json, text_table, write_json

__all__ = ["COSTS", "Candidate", "Sensitivity", "check_cost"]

COSTS = ("latency", "multiply_adds", "activations", "activation_elements")
_VERSION = 1


def check_cost(cost: object) -> None:
    """Raise OptionError unless ``cost`` is the name of a cost."""
    if cost not in COSTS:
        raise OptionError(f"cost={cost!r}: give one of {', '.join(COSTS)}")


@dataclass(frozen=True)
class Candidate:
    """One segment made linear in one way, measured alone: everything else is as in the original model.

    Attributes:
        convs: Qualified names of its convolutions, in order of execution.
        sites: Ids of the activations that are dropped.
        size: Kernel size of the one convolution that replaces them, such as ``"3x3"``; ``""`` where they stay and the
            last one is refitted; ``"none"`` where they are a residual branch that is removed.
        loss: Divergence of the model's output from the original's on held-out images.
        agreement: Fraction of these images with the same top-1 class; NaN where the model is not a classifier.
        error: Squared error of the segment's output on held-out images, relative to its variance; NaN for a branch.
        activations: Number of activation layers that are dropped.
        activation_elements: Number of their elements, for one image.
        multiply_adds: Multiply-adds of its convolutions for one image, (before, after).
        parameters: Parameters, norms folded, (before, after).
        latency: Seconds, norms folded, (before, after); NaN where not measured.
        first, last: Positions of its convolutions in the order of execution.
    """

    convs: tuple[str, ...]
    sites: tuple[str, ...]
    size: str
    loss: float
    agreement: float
    error: float
    activations: int
    activation_elements: int
    multiply_adds: tuple[int, int]
    parameters: tuple[int, int]
    latency: tuple[float, float]
    first: int
    last: int

    def saves(self, cost: str) -> float:
        """Return how much it saves, in the unit of ``cost`` (as for :func:`nmconv.search`).

        Raises:
            OptionError: If there is no such cost.
        """
        check_cost(cost)
        if cost in ("latency", "multiply_adds"):
            before, after = getattr(self, cost)
            return float(before - after)
        return float(getattr(self, cost))


@dataclass
class Sensitivity:
    """The table of all candidates of a model, measured on one set of images.

    Attributes:
        model: Class name of the model.
        fingerprint: Identifies its structure.
        setting: What the measurements depend on: form, backend, max_convs, loss, weights, image (its shape) and images.
        totals: The cost of the original model, by kind; latency in seconds, NaN where not measured. ``"loss"`` is the
            loss of the original against itself: 0 by default.
        candidates: The candidates, in the order of measurement.
        complete: Whether all candidates have been measured.

    Example:
        >>> import torch, nmconv
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
        >>> table = nmconv.sensitivity(net, torch.randn(16, 3, 12, 12), quiet=True)
        >>> table.totals["multiply_adds"], table.candidates[0].saves("multiply_adds")
        (58464.0, 56928.0)
    """

    model: str
    fingerprint: str
    setting: dict[str, str]
    totals: dict[str, float]
    candidates: list[Candidate] = field(default_factory=list)
    complete: bool = False

    def __str__(self) -> str:
        count = f"{len(self.candidates)} candidates" + ("" if self.complete else " so far")
        rows = [
            (
                " … ".join(dict.fromkeys((one.convs[0], one.convs[-1]))),
                one.size,
                f"{one.loss:.4f}",
                _or_blank(one.agreement, ".1%"),
                str(one.activations),
                f"{one.saves('multiply_adds'):.3g}",
                _or_blank(one.saves("latency") * 1e3, ".3f"),
            )
            for one in sorted(self.candidates, key=lambda one: one.loss)
        ]
        header = ("convolutions", "kernel", "loss", "same class", "activations", "multiply-adds", "latency, ms")
        return f"{self.model}: {count} and what each one saves, by loss\n{text_table(header, rows)}"

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict for each candidate, for ``pandas.DataFrame`` or a csv file."""
        rows = []
        for one in self.candidates:
            row = {**asdict(one), "convs": ",".join(one.convs), "sites": ",".join(one.sites)}
            for name in ("multiply_adds", "parameters", "latency"):
                row[f"{name}_before"], row[f"{name}_after"] = row.pop(name)
            rows.append(row)
        return rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a JSON file, atomically; NaN becomes null.

        Raises:
            FileError: If the folder does not exist.
        """
        write_json(path, {"nmconv_sensitivity": _VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read a table that :meth:`save` wrote.

        Raises:
            FileError: If the file is something else.
            OSError: If it cannot be opened.
        """
        data = read_json(path, "nmconv_sensitivity", _VERSION, "nmconv.sensitivity")
        try:
            candidates = [_candidate(row) for row in data.pop("candidates")]
            totals = {name: nan_if_null(value) for name, value in data.pop("totals").items()}
            if "most" in data["setting"]:  # the name in tables of version 0.1
                data["setting"]["max_convs"] = data["setting"].pop("most")
            return cls(**data, totals=totals, candidates=candidates)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(
                f"{os.fspath(path)} is not a table of nmconv.sensitivity ({error}): measure again"
            ) from error

    def plot(self, cost: str = "multiply_adds", axes: Any = None) -> Any:
        """Plot the loss over the savings, one point for each candidate, and return the axes; needs matplotlib.

        Args:
            cost: The kind of savings, as for :func:`nmconv.search`.
            axes: Matplotlib axes; new ones by default.

        Raises:
            OptionError: If there is no such cost.
        """
        check_cost(cost)
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1] if axes is None else axes
        total = self.totals[cost]
        for size in sorted({one.size for one in self.candidates}):
            points = [one for one in self.candidates if one.size == size and one.loss > 0]
            label = {"": "last convolution refitted", "none": "branch removed"}.get(size, f"one {size}")
            axes.scatter([one.saves(cost) / total for one in points], [one.loss for one in points], label=label, s=18)
        axes.set(xlabel=f"fraction of the network's {cost.replace('_', ' ')} that is saved", ylabel="divergence alone")
        axes.set_yscale("log")
        axes.legend(fontsize="small")
        return axes


def _or_blank(value: float, form: str) -> str:
    """Format a number; NaN is blank."""
    return "" if math.isnan(value) else format(value, form)


def _candidate(row: dict[str, Any]) -> Candidate:
    values: dict[str, Any] = {
        key: tuple(map(nan_if_null, value)) if isinstance(value, list) else nan_if_null(value)
        for key, value in row.items()
    }
    return Candidate(**values)
