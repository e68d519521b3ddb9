"""Measurements of an ensemble's members, as plain data."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nmconv.planning import text_table

__all__ = ["Ensemble"]


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Members of a model, each with some activations dropped, and the soft model that mixes at every site.

    Tensors are float64 on the CPU. Accuracies are fractions of the images, or None if the data had no labels.

    Attributes:
        model: Class name of the model.
        slope: The probability with which each site is linear, rounded to float32 as the slopes of a model are.
        sites: Ids of the sites that members drop or keep, in the order of execution.
        sampled: Whether the members were drawn at random; else they are all members.
        dropped: For each member, the ids of the sites that it drops. A member that was drawn twice appears twice.
        weights: For each member, its probability if all were enumerated, else one over their number.
        kept: For each member, the number of activations of convolutions that it keeps.
        ratios: For each member, convolutions over activations kept; infinite if none is kept.
        accuracy: For each member, its accuracy.
        disagreement: Mean over images of the probability that two members, drawn independently, predict different
            classes; for members drawn at random the mean over all pairs of them, NaN if there is only one.
        mean_probabilities: ``[images, classes]``, the members' mean after softmax.
        mean_logits: ``[images, classes]``, the members' mean before softmax.
        soft_logits: ``[images, classes]``, the logits of the model with this slope at every site.
        gap: Mean absolute difference of ``mean_logits`` and ``soft_logits``.
        probabilities_accuracy: Accuracy of ``mean_probabilities``.
        logits_accuracy: Accuracy of ``mean_logits``.
        soft_accuracy: Accuracy of ``soft_logits``.
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
        """Return a tidy table for ``pandas.DataFrame`` or a csv file: one dict per member."""
        return [
            {
                "member": index,
                "weight": self.weights[index],
                "kept": self.kept[index],
                "ratio": self.ratios[index],
                "accuracy": None if self.accuracy is None else self.accuracy[index],
                "dropped": " ".join(dropped),
            }
            for index, dropped in enumerate(self.dropped)
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
        summary = f"disagreement {self.disagreement:.4g}, gap {self.gap:.4g}"
        if self.soft_accuracy is not None:
            summary += (
                f"; accuracy of the mean of probabilities {self.probabilities_accuracy:.4g}, of logits "
                f"{self.logits_accuracy:.4g}, of the soft network {self.soft_accuracy:.4g}"
            )
        return f"{head}\n{text_table(('kept', 'ratio', 'members', 'weight', 'accuracy'), lines)}\n{summary}"
