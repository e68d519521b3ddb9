"""What was measured of every candidate: a table, as plain data in one file."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from nmconv.errors import FileError
from nmconv.planning import number, read_json, write_json

__all__ = ["COSTS", "Candidate", "Sensitivity"]

COSTS = ("latency", "multiply_adds", "activations", "activation_elements")
_VERSION = 1


@dataclass(frozen=True)
class Candidate:
    """One segment made linear in one way, measured alone: everything else is as in the original.

    Attributes:
        convs: Qualified names of its convolutions, in order of execution.
        sites: Ids of the activations that go.
        size: Of the one convolution that replaces them, such as ``"3x3"``; ``""`` where they stay and the last one is
            refitted; ``"none"`` where they are a residual branch that goes.
        loss: Divergence of the network's output from the original's on held-out images.
        agreement: Part of these images with the same top-1 class; NaN for networks that are no classifiers.
        error: Squared error of the segment's output on held-out images, relative to the variance; NaN for a branch.
        activations: Activation layers that go.
        activation_elements: Their elements, for one image.
        multiply_adds: (before, after) of its convolutions, for one image.
        parameters: (before, after), norms folded.
        latency: (before, after) in seconds, norms folded; NaN where it was not measured.
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
        """How much it saves, in the cost's unit."""
        if cost in ("latency", "multiply_adds"):
            before, after = getattr(self, cost)
            return float(before - after)
        return float(getattr(self, cost))


@dataclass
class Sensitivity:
    """All candidates of a network, measured on one set of images.

    Attributes:
        model: Class name of the network.
        fingerprint: Identifies its structure.
        setting: What the measurements depend on: form, backend, max_convs, loss, weights, image (its shape) and images.
        totals: Of the whole network, by cost; latency in seconds, NaN where it was not measured. Under ``"loss"``
            what the loss gives where nothing is changed: 0 for the default.
        candidates: In the order they were measured in.
        complete: Whether all of them are there.
    """

    model: str
    fingerprint: str
    setting: dict[str, str]
    totals: dict[str, float]
    candidates: list[Candidate] = field(default_factory=list)
    complete: bool = False

    def rows(self) -> list[dict[str, Any]]:
        """A tidy table: one dict for each candidate, for ``pandas.DataFrame`` or a csv file."""
        found = []
        for one in self.candidates:
            row = {**asdict(one), "convs": ",".join(one.convs), "sites": ",".join(one.sites)}
            for name in ("multiply_adds", "parameters", "latency"):
                row[f"{name}_before"], row[f"{name}_after"] = row.pop(name)
            found.append(row)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to one JSON file, as a whole or not at all; what is NaN is null there."""
        write_json(path, {"nmconv_sensitivity": _VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: If it is something else.
            OSError: If it cannot be opened.
        """
        data = read_json(path, "nmconv_sensitivity", _VERSION, "nmconv.sensitivity")
        try:
            found = [_candidate(row) for row in data.pop("candidates")]
            totals = {name: number(value) for name, value in data.pop("totals").items()}
            if "most" in data["setting"]:  # its name in tables of version 0.1
                data["setting"]["max_convs"] = data["setting"].pop("most")
            return cls(**data, totals=totals, candidates=found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(f"{os.fspath(path)} is no table of nmconv.sensitivity ({error}): measure anew") from error

    def plot(self, cost: str = "multiply_adds", axes: Any = None) -> Any:
        """Loss over what is saved, one point a candidate; needs matplotlib. Gives the axes."""
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1] if axes is None else axes
        total = self.totals[cost]
        for size in sorted({one.size for one in self.candidates}):
            part = [one for one in self.candidates if one.size == size and one.loss > 0]
            label = {"": "last convolution refitted", "none": "branch goes"}.get(size, f"one {size}")
            axes.scatter([one.saves(cost) / total for one in part], [one.loss for one in part], label=label, s=18)
        axes.set(xlabel=f"part of the network's {cost.replace('_', ' ')} that is saved", ylabel="divergence alone")
        axes.set_yscale("log")
        axes.legend(fontsize="small")
        return axes


def _candidate(row: dict[str, Any]) -> Candidate:
    values: dict[str, Any] = {
        key: tuple(map(number, value)) if isinstance(value, list) else number(value) for key, value in row.items()
    }
    return Candidate(**values)
