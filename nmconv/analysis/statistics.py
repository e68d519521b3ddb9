"""Statistics of a model's activations: a tidy table, saved to one file as plain data."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from nmconv.analysis.plot_axes import axes_for_plot
from nmconv.errors import FileError, OptionError
from nmconv.planning import nan_if_null, read_json, text_table, write_json

__all__ = ["ActivationStats", "SiteStats"]

_FILE_KEY, _FILE_VERSION = "nmconv_activation_stats", 1
_MADE_BY = "nmconv.activation_stats"
_COLUMNS = ("positive", "dead", "mean", "variance", "sparsity", "rank", "gradient")


@dataclass(frozen=True)
class SiteStats:
    """Statistics of one activation's inputs and outputs, over all images and positions.

    Attributes:
        site: The activation's id, as in :class:`nmconv.Site`: ``layer1.0.relu#2``.
        kind: The activation's name, such as ``ReLU``.
        channels: Number of channels of its maps.
        values: Number of output values: images times channels times positions.
        positive: Fraction of the inputs that are above 0.
        dead: Indices, from 0, of the dead channels: for ReLU and ReLU6 those whose input is never above 0; for other
            kinds those whose output variance is at most 1e-12 of the channels' mean variance.
        mean: Mean of the outputs.
        variance: Variance of the outputs, all channels together (divided by n, not n - 1).
        sparsity: Fraction of the outputs that are exactly 0.
        rank: Effective rank of the outputs' channel covariance S over all images and positions: tr(S)²/tr(S²), from 1
            to ``channels``; 0 if nothing varies.
        gradient: Mean over images of the L2 norm of the gradient of the image's loss at the output; NaN if gradients
            were not measured.
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
    """Statistics of all activations of a model that ran on one set of images.

    Attributes:
        model: Class name of the model.
        images: Number of images.
        sites: The activations, in the order of execution.
    """

    model: str
    images: int
    sites: tuple[SiteStats, ...]

    def __getitem__(self, site: str) -> SiteStats:
        """Return the statistics of the activation with this id."""
        for stats in self.sites:
            if stats.site == site:
                return stats
        ids = [stats.site for stats in self.sites]
        suggestions = [each for each in ids if str(site) in each][:5] or ids[:5]
        raise KeyError(f"no activation {site!r} has run in this {self.model}: did you mean {', '.join(suggestions)}?")

    def __str__(self) -> str:
        rows = [
            [row["site"], row["kind"], str(row["channels"]), *(_format_number(row[name]) for name in _COLUMNS)]
            for row in self.rows()
        ]
        head = f"{self.model}: {len(self.sites)} activations on {self.images} images"
        return f"{head}\n{text_table(('site', 'kind', 'channels', *_COLUMNS), rows)}"

    def rows(self, beside: ActivationStats | None = None) -> list[dict[str, Any]]:
        """Return a tidy table for ``pandas.DataFrame`` or a csv file: one dict per activation.

        The column ``dead`` is the number of dead channels.

        Args:
            beside: The statistics of another model. The table then has one row for each activation of either model,
                with each number twice, such as ``rank_a`` and ``rank_b``; NaN where a model lacks the activation.
        """
        rows = [{"model": self.model, **asdict(stats), "dead": len(stats.dead)} for stats in self.sites]
        if beside is None:
            return rows
        tables = ({row["site"]: row for row in rows}, {row["site"]: row for row in beside.rows()})
        joined = []
        for site in _merge_orders(list(tables[0]), list(tables[1])):
            pair = [by_site.get(site) for by_site in tables]
            row = {"site": site, "kind": next(side["kind"] for side in pair if side is not None)}
            for name in ("channels", "values", *_COLUMNS):
                for suffix, side in zip("ab", pair, strict=True):
                    row[f"{name}_{suffix}"] = math.nan if side is None else side[name]
            joined.append(row)
        return joined

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to one JSON file, atomically. Numbers that are not finite are written as null.

        Raises:
            FileError: If the folder does not exist.
        """
        write_json(path, {_FILE_KEY: _FILE_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ActivationStats:
        """Read a file written by :meth:`save`.

        Raises:
            FileError: If the file is not such a table.
            OSError: If it cannot be opened.
        """
        data = read_json(path, _FILE_KEY, _FILE_VERSION, _MADE_BY)
        try:
            sites = tuple(_read_site(row) for row in data.pop("sites"))
            return cls(**data, sites=sites)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(f"{os.fspath(path)} is not a table of {_MADE_BY} ({error}): measure again") from error

    def plot(self, where: Any = None, *, column: str = "rank", beside: ActivationStats | None = None) -> Any:
        """Plot one column over the activations, in the order of execution. Needs matplotlib.

        Args:
            where: A path to save the figure to, the axes to draw into, or None for new axes.
            column: ``"positive"``, ``"dead"``, ``"mean"``, ``"variance"``, ``"sparsity"``, ``"rank"`` or
                ``"gradient"``.
            beside: The statistics of another model, drawn into the same axes.

        Returns:
            The matplotlib axes.

        Raises:
            OptionError: If there is no such column, ``where`` is something else, or matplotlib is not installed.
        """
        if column not in _COLUMNS:
            raise OptionError(f"column={column!r}: give one of {', '.join(_COLUMNS)}")
        rows = self.rows(self if beside is None else beside)
        with axes_for_plot(where, width=max(6.0, 0.16 * len(rows))) as axes:
            for stats, suffix, marker in ((self, "a", "o"), (beside, "b", "x")):
                if stats is not None:
                    values = [(x, row[f"{column}_{suffix}"]) for x, row in enumerate(rows)]
                    points = [(x, value) for x, value in values if not math.isnan(value)]
                    label = f"{stats.model}, {len(stats.sites)} activations"
                    axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, markersize=4, label=label)
            axes.set_xticks(range(len(rows)), [row["site"] for row in rows], rotation=90, fontsize="xx-small")
            axes.set(ylabel={"rank": "effective rank", "dead": "dead channels"}.get(column, column))
            axes.legend(fontsize="small")
        return axes


def _merge_orders(first: list[str], second: list[str]) -> list[str]:
    """Return the names of both lists, each once.

    A name that only the second list has is inserted after its predecessor in the second list.
    """
    merged = list(first)
    position = 0
    for name in second:
        if name in first:
            position = merged.index(name) + 1
        else:
            merged.insert(position, name)
            position += 1
    return merged


def _read_site(row: dict[str, Any]) -> SiteStats:
    if row.keys() != {field.name for field in fields(SiteStats)}:
        raise TypeError(f"a row has the fields {', '.join(row)}")
    values: dict[str, Any] = {
        name: tuple(value) if name == "dead" else nan_if_null(value) for name, value in row.items()
    }
    return SiteStats(**values)


def _format_number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
