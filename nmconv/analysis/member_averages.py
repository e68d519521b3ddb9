"""What members of an ensemble give, averaged batch by batch in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nmconv.errors import OptionError

__all__ = ["Averages", "Slopes"]

Slopes = tuple[float, ...]  # of the sites, in the order of execution


class Averages:
    """Averages over members of the outputs on some images.

    Args:
        shares: Of each member, its part of the average.
        soft: The slopes of the soft network.
    """

    def __init__(self, shares: Mapping[Slopes, float], soft: Slopes) -> None:
        self._shares = shares
        self._soft = soft
        self._right = dict.fromkeys(shares, 0)
        self._logits: list[Tensor] = []
        self._probabilities: list[Tensor] = []
        self._soft_logits: list[Tensor] = []
        self._same: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, logits_of: Callable[[Slopes], Tensor], labels: Tensor | None) -> None:
        """Run a batch through all networks.

        Args:
            logits_of: What the network of these slopes gives on the batch: ``[images, classes]``, float64.
            labels: ``[images]``, or None where there are none.

        Raises:
            OptionError: If there are labels, and there were none before, or the other way round.
        """
        if self._soft_logits and (labels is None) != (not self._labels):
            raise OptionError("some batches of data have labels, one integer for each image, and others have none")
        soft = logits_of(self._soft)
        logits, probabilities, votes = torch.zeros_like(soft), torch.zeros_like(soft), torch.zeros_like(soft)
        for member, share in self._shares.items():
            given = logits_of(member)
            classes = given.argmax(1)
            if labels is not None:
                self._right[member] += int((classes == labels).sum())
            if share:  # 0 · inf is NaN
                logits += share * given
                probabilities += share * given.softmax(1)
                votes += share * one_hot(classes, votes.shape[1]).to(votes)
        self._logits.append(logits.cpu())
        self._probabilities.append(probabilities.cpu())
        self._soft_logits.append(soft.cpu())
        self._same.append(votes.square().sum(1).cpu())
        if labels is not None:
            self._labels.append(labels.cpu())

    def logits(self) -> Tensor:
        """``[images, classes]``, the members' mean."""
        return torch.cat(self._logits)

    def probabilities(self) -> Tensor:
        """``[images, classes]``, the members' mean."""
        return torch.cat(self._probabilities)

    def soft_logits(self) -> Tensor:
        """``[images, classes]``, of the soft network."""
        return torch.cat(self._soft_logits)

    def disagreement(self) -> float:
        """Mean over images of the chance that two members, each drawn by its share, predict other classes."""
        return max(0.0, 1.0 - float(torch.cat(self._same).mean()))

    def accuracies(self) -> dict[Slopes, float] | None:
        """Of each member, or None without labels."""
        images = sum(map(len, self._labels))
        return {member: right / images for member, right in self._right.items()} if images else None

    def accuracy(self, values: Tensor) -> float | None:
        """The same of values ``[images, classes]`` for all images."""
        if not self._labels:
            return None
        return float((values.argmax(1) == torch.cat(self._labels)).double().mean())
