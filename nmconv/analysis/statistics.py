"""What was measured of each activation: a tidy table, as plain data in one file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from nmconv.analysis.axes import drawn
from nmconv.analysis.map_moments import MapMoments
from nmconv.analysis.observed_sites import Observed
from nmconv.errors import FileError, OptionError
from nmconv.planning import number, read_json, table, write_json

__all__ = ["ActivationStats", "SiteStats", "stats_of"]

_MARK, _VERSION = "nmconv_activation_stats", 1
_AGAIN = "nmconv.activation_stats"
_RELUS = ("ReLU", "ReLU6")  # constant wherever the input is not positive
_STILL = 1e-12  # variance of a channel over the mean of all channels' variances
_ROUNDING = 1e-24  # variance of what is constant over its squared mean, as it comes out in float64
_COLUMNS = ("positive", "dead", "mean", "variance", "sparsity", "rank", "gradient")


@dataclass(frozen=True)
class SiteStats:
    """What one activation is given and gives, over all images and positions.

    Attributes:
        site: Its id, as of :class:`nmconv.Site`: ``layer1.0.relu#2``.
        kind: Its name, such as ``ReLU``.
        channels: How many channels its maps have.
        values: How many numbers it gave: images times channels times positions.
        positive: Part of its inputs that are above 0.
        dead: Numbers, from 0, of the channels that are dead: for ReLU and ReLU6 those whose input is nowhere above 0;
            for other kinds those whose output has no more than 1e-12 of the variance that the channels have on average.
        mean: Of its outputs.
        variance: Of its outputs, all channels together; divided by their number.
        sparsity: Part of its outputs that are exactly 0.
        rank: Effective rank of the outputs' channel covariance S over all images and positions: tr(S)²/tr(S²), from 1
            to ``channels``; 0 where nothing varies.
        gradient: Mean over images of the L2 norm of the image's gradient at the output; NaN where it was not asked for.
    """

    site: str
    kind: str
    channels: int
    values: int
    positive: float
    dead: tuple[int, ...]
    mean: float
    variance: float
    sparsity: float
    rank: float
    gradient: float = math.nan


@dataclass(frozen=True)
class ActivationStats:
    """All activations of a network that ran, measured on one set of images.

    Attributes:
        model: Class name of the network.
        images: How many there were.
        sites: In the order of execution.
    """

    model: str
    images: int
    sites: tuple[SiteStats, ...]

    def __getitem__(self, site: str) -> SiteStats:
        """One activation's, by its id."""
        for one in self.sites:
            if one.site == site:
                return one
        near = [one.site for one in self.sites if str(site) in one.site][:5] or [one.site for one in self.sites][:5]
        raise KeyError(f"no activation {site!r} has run in this {self.model}: did you mean {', '.join(near)}?")

    def __str__(self) -> str:
        rows = [
            [row["site"], row["kind"], str(row["channels"]), *(_shown(row[name]) for name in _COLUMNS)]
            for row in self.rows()
        ]
        head = f"{self.model}: {len(self.sites)} activations on {self.images} images"
        return f"{head}\n{table(('site', 'kind', 'channels', *_COLUMNS), rows)}"

    def rows(self, beside: ActivationStats | None = None) -> list[dict[str, Any]]:
        """A tidy table: one dict for each activation, for ``pandas.DataFrame`` or a csv file; ``dead`` is how many.

        Args:
            beside: Another network's: then there is a row for each activation of either, and each number twice, as
                ``rank_a`` and ``rank_b``; NaN where a network does not have it.
        """
        rows = [{"model": self.model, **asdict(one), "dead": len(one.dead)} for one in self.sites]
        if beside is None:
            return rows
        both = ({row["site"]: row for row in rows}, {row["site"]: row for row in beside.rows()})
        found = []
        for site in merged_order(list(both[0]), list(both[1])):
            known = [table.get(site) for table in both]
            row = {"site": site, "kind": next(each["kind"] for each in known if each is not None)}
            for name in ("channels", "values", *_COLUMNS):
                for suffix, each in zip("ab", known, strict=True):
                    row[f"{name}_{suffix}"] = math.nan if each is None else each[name]
            found.append(row)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to one JSON file, as a whole or not at all; numbers that are not finite are null there."""
        write_json(path, {_MARK: _VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ActivationStats:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: If it is something else.
            OSError: If it cannot be opened.
        """
        data = read_json(path, _MARK, _VERSION, _AGAIN)
        try:
            sites = tuple(_site(row) for row in data.pop("sites"))
            return cls(**data, sites=sites)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(f"{os.fspath(path)} is no table of {_AGAIN} ({error}): measure anew") from error

    def plot(self, where: Any = None, *, column: str = "rank", beside: ActivationStats | None = None) -> Any:
        """One number over the activations in the order of execution; needs matplotlib.

        Args:
            where: A path to save the picture at, the axes to draw into, or None for new axes.
            column: ``"positive"``, ``"dead"``, ``"mean"``, ``"variance"``, ``"sparsity"``, ``"rank"`` or
                ``"gradient"``.
            beside: Another network's, drawn beside it.

        Returns:
            The axes.

        Raises:
            OptionError: If there is no such column, or no matplotlib.
        """
        if column not in _COLUMNS:
            raise OptionError(f"column={column!r}: give one of {', '.join(_COLUMNS)}")
        rows = self.rows(self if beside is None else beside)
        with drawn(where, width=max(6.0, 0.16 * len(rows))) as axes:
            for each, suffix in ((self, "a"), (beside, "b")):
                if each is not None:
                    values = {at: row[f"{column}_{suffix}"] for at, row in enumerate(rows)}
                    there = {at: value for at, value in values.items() if not math.isnan(value)}
                    label = f"{each.model}, {len(each.sites)} activations"
                    axes.plot(
                        [*there], [*there.values()], marker="o" if suffix == "a" else "x", markersize=4, label=label
                    )
            axes.set_xticks(range(len(rows)), [row["site"] for row in rows], rotation=90, fontsize="xx-small")
            axes.set(ylabel={"rank": "effective rank", "dead": "dead channels"}.get(column, column))
            axes.legend(fontsize="small")
        return axes


def merged_order(first: list[str], second: list[str]) -> list[str]:
    """The names of both lists, each once, what only the second has behind what it follows there."""
    found = list(first)
    at = 0
    for name in second:
        if name in first:
            at = found.index(name) + 1
        else:
            found.insert(at, name)
            at += 1
    return found


def stats_of(model: str, images: int, sites: Mapping[str, Observed], sums: Mapping[str, MapMoments]) -> ActivationStats:
    """The numbers of each activation of which anything came by.

    Args:
        model: Class name of the network.
        images: How many there were.
        sites: By id.
        sums: Of each.
    """
    seen = [name for name in sites if sums[name].positions and sums[name].given]
    return ActivationStats(model, images, tuple(_stats(sites[name], sums[name]) for name in seen))


def _stats(site: Observed, sums: MapMoments) -> SiteStats:
    assert sums.mean is not None and sums.scatter is not None and sums.positive is not None
    channels = len(sums.mean)
    covariance = sums.scatter / sums.positions
    variances = covariance.diagonal()
    variances = variances.where(variances > _ROUNDING * sums.mean.square(), 0.0)
    mean, trace = sums.mean.mean(), variances.sum()
    still = sums.positive == 0 if site.kind in _RELUS else variances <= _STILL * variances.mean()
    return SiteStats(
        site=site.id,
        kind=site.kind,
        channels=channels,
        values=sums.positions * channels,
        positive=float(sums.positive.sum()) / (sums.given * channels),
        dead=tuple(torch.nonzero(still).flatten().tolist()),
        mean=float(mean),
        variance=float(variances.mean() + (sums.mean - mean).square().mean()),
        sparsity=sums.zeros / (sums.positions * channels),
        rank=float(trace.square() / covariance.square().sum()) if trace != 0 else 0.0,
        gradient=sums.norms / sums.images if sums.images else math.nan,
    )


def _site(row: dict[str, Any]) -> SiteStats:
    if row.keys() != {field.name for field in fields(SiteStats)}:
        raise TypeError(f"a row has the fields {', '.join(row)}")
    values: dict[str, Any] = {name: tuple(value) if name == "dead" else number(value) for name, value in row.items()}
    return SiteStats(**values)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
