"""Run the members of an ensemble, and average their outputs batch by batch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.modules.batchnorm import _BatchNorm

from nmconv.errors import FitError, OptionError
from nmconv.fitting import recalibrate_norms
from nmconv.observing import input_errors_as_fit_errors, read_images
from nmconv.planning import Plan
from nmconv.surgery import apply_plan, is_slope, set_slope

__all__ = ["MemberAverages", "MemberModel", "Slopes"]

Slopes = tuple[float, ...]  # one slope per site, in the order of execution: 0 keeps the activation, 1 drops it


class MemberModel:
    """A gradual copy of a model that runs as each of its members.

    Args:
        model: The original model; not changed.
        plan: The plan of the member that drops all sites.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model = apply_plan(model, plan, gradual=True).eval()
        self._sites = [site.id for site in plan.changes]
        norms = [module for module in self._model.modules() if isinstance(module, _BatchNorm)]
        named = [pair for norm in norms for pair in norm.named_buffers(recurse=False)]
        self._norm_buffers = [value for name, value in named if not is_slope(name)]
        self._recalibrated: dict[Slopes, list[Tensor]] = {}

    def recalibrate(self, members: Iterable[Slopes], data: Any, key: str | None) -> None:
        """Estimate the norms' statistics of each member separately."""
        images = read_images(data, self._model, key=key)
        for slopes in members:
            self._set_slopes(slopes)
            recalibrate_norms(self._model, images)
            self._recalibrated[slopes] = [value.clone() for value in self._norm_buffers]

    def logits(self, images: Tensor, slopes: Slopes) -> Tensor:
        """Return the logits of the member with these slopes: ``[images, classes]``, float64.

        Raises:
            FitError: If the model fails on the images, or returns something else.
        """
        self._set_slopes(slopes)
        for buffer, value in zip(self._norm_buffers, self._recalibrated.get(slopes, ()), strict=False):
            buffer.copy_(value)
        with input_errors_as_fit_errors(self._model, images):
            output = self._model(images.clone())  # some models overwrite their input
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(images) or output.shape[1] < 2:
            what = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise FitError(
                f"this {type(self._model).__name__} gives {what}: members are compared by logits [images, classes]; "
                "wrap the model in a module that returns them"
            )
        return output.double()

    def _set_slopes(self, slopes: Slopes) -> None:
        set_slope(self._model, dict(zip(self._sites, slopes, strict=True)))


class MemberAverages:
    """Weighted averages of the members' outputs.

    Args:
        weights: The weight of each member in the averages; they sum to 1.
        soft: The slopes of the soft model.
    """

    def __init__(self, weights: Mapping[Slopes, float], soft: Slopes) -> None:
        self._weights = weights
        self._soft = soft
        self._correct = dict.fromkeys(weights, 0)
        self._logits: list[Tensor] = []
        self._probabilities: list[Tensor] = []
        self._soft_logits: list[Tensor] = []
        self._agreement: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, logits_of: Callable[[Slopes], Tensor], labels: Tensor | None) -> None:
        """Run a batch through all members and the soft model.

        Args:
            logits_of: Returns the batch's logits ``[images, classes]``, float64, for given slopes.
            labels: ``[images]``, or None if there are none.

        Raises:
            OptionError: If some batches have labels and others have none.
        """
        if self._soft_logits and (labels is None) != (not self._labels):
            raise OptionError("some batches of data have labels, one integer for each image, and others have none")
        soft_logits = logits_of(self._soft)
        mean_logits, mean_probabilities, votes = (torch.zeros_like(soft_logits) for _ in range(3))
        for member, weight in self._weights.items():
            logits = logits_of(member)
            classes = logits.argmax(1)
            if labels is not None:
                self._correct[member] += int((classes == labels).sum())
            if weight:  # 0 · inf is NaN
                mean_logits += weight * logits
                mean_probabilities += weight * logits.softmax(1)
                votes += weight * one_hot(classes, votes.shape[1]).to(votes)
        self._logits.append(mean_logits.cpu())
        self._probabilities.append(mean_probabilities.cpu())
        self._soft_logits.append(soft_logits.cpu())
        self._agreement.append(votes.square().sum(1).cpu())
        if labels is not None:
            self._labels.append(labels.cpu())

    def logits(self) -> Tensor:
        """Return the members' mean logits, ``[images, classes]``."""
        return torch.cat(self._logits)

    def probabilities(self) -> Tensor:
        """Return the members' mean probabilities, ``[images, classes]``."""
        return torch.cat(self._probabilities)

    def soft_logits(self) -> Tensor:
        """Return the soft model's logits, ``[images, classes]``."""
        return torch.cat(self._soft_logits)

    def disagreement(self) -> float:
        """Return the mean probability that two members, each drawn by its weight, predict different classes."""
        return max(0.0, 1.0 - float(torch.cat(self._agreement).mean()))

    def accuracies(self) -> dict[Slopes, float] | None:
        """Return the accuracy of each member, or None without labels."""
        images = sum(map(len, self._labels))
        return {member: correct / images for member, correct in self._correct.items()} if images else None

    def accuracy(self, scores: Tensor) -> float | None:
        """Return the accuracy of scores ``[images, classes]`` for all images, or None without labels."""
        if not self._labels:
            return None
        return float((scores.argmax(1) == torch.cat(self._labels)).double().mean())
