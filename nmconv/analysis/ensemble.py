"""What was measured of an ensemble's members: plain data."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nmconv.planning import table

__all__ = ["Ensemble"]


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Members of a network, each with some activations dropped, and the soft network that mixes at every site.

    Tensors are float64, on the CPU. Accuracies are parts of the images, or None where the data had no labels.

    Attributes:
        model: Class name of the network.
        slope: The probability by which each site is linear, rounded to float32 as the slopes of a network are.
        sites: Ids of the sites that members drop or keep, in the order of execution.
        sampled: Whether the members were drawn; else they are all that there are.
        dropped: Of each member, the ids of the sites that it drops. A member that is drawn twice stands here twice.
        weights: Of each member: its probability where all were enumerated, else one over their number.
        kept: How many activations of convolutions each member keeps.
        ratios: Convolutions over activations kept, of each member; infinite where none is kept.
        accuracy: Of each member.
        disagreement: Mean over images of the probability that two members, drawn independently, predict other classes;
            for drawn members the mean over all pairs of them, NaN where there is only one.
        mean_probabilities: ``[images, classes]``, the members' average after softmax.
        mean_logits: ``[images, classes]``, the members' average before softmax.
        soft_logits: ``[images, classes]``, of the network with this slope at every site.
        gap: Mean absolute difference of ``mean_logits`` and ``soft_logits``, in the unit of logits.
        probabilities_accuracy: Of the average over probabilities.
        logits_accuracy: Of the average over logits.
        soft_accuracy: Of the soft network.
    """

    model: str
    slope: float
    sites: tuple[str, ...]
    sampled: bool
    dropped: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...]
    kept: tuple[int, ...]
    ratios: tuple[float, ...]
    accuracy: tuple[float, ...] | None
    disagreement: float
    mean_probabilities: Tensor
    mean_logits: Tensor
    soft_logits: Tensor
    gap: float
    probabilities_accuracy: float | None
    logits_accuracy: float | None
    soft_accuracy: float | None

    def rows(self) -> list[dict[str, Any]]:
        """A tidy table: one dict for each member, for ``pandas.DataFrame`` or a csv file."""
        return [
            {
                "member": at,
                "weight": self.weights[at],
                "kept": self.kept[at],
                "ratio": self.ratios[at],
                "accuracy": None if self.accuracy is None else self.accuracy[at],
                "dropped": " ".join(dropped),
            }
            for at, dropped in enumerate(self.dropped)
        ]

    def __str__(self) -> str:
        by_kept = defaultdict(list)
        for row in self.rows():
            by_kept[row["kept"]].append(row)
        lines = []
        for kept, rows in sorted(by_kept.items()):
            weight = sum(row["weight"] for row in rows)
            correct = [row["weight"] * row["accuracy"] for row in rows if row["accuracy"] is not None]
            accuracy = f"{sum(correct) / weight:.4g}" if correct and weight else ""
            lines.append((str(kept), f"{rows[0]['ratio']:.4g}", str(len(rows)), f"{weight:.4g}", accuracy))
        drawn = " drawn" if self.sampled else ""
        head = (
            f"{self.model} at slope {self.slope:g}: {len(self.dropped)} members{drawn}, of {len(self.sites)} sites, on "
            f"{len(self.soft_logits)} images"
        )
        said = f"disagreement {self.disagreement:.4g}, gap {self.gap:.4g}"
        if self.soft_accuracy is not None:
            said += (
                f"; accuracy of the mean of probabilities {self.probabilities_accuracy:.4g}, of logits "
                f"{self.logits_accuracy:.4g}, of the soft network {self.soft_accuracy:.4g}"
            )
        return f"{head}\n{table(('kept', 'ratio', 'members', 'weight', 'accuracy'), lines)}\n{said}"
