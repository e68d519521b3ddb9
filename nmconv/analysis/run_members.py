"""The public function that reads a model with Leaky ReLUs as an ensemble and measures its members."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nmconv.analysis.ensemble import Ensemble
from nmconv.analysis.member_outputs import MemberAverages, MemberModel, Slopes
from nmconv.analysis.observed_model import state_preserved
from nmconv.errors import NoSitesError, OptionError
from nmconv.observing import device_and_dtype_of, read_batches, to_device_and_dtype
from nmconv.planning import Plan, Site
from nmconv.surgery import check_model, check_slope, plan_to_keep_all

__all__ = ["members"]

_MAX_ENUMERATED_SITES = 12  # 4096 members


def members(
    model: nn.Module,
    data: Any,
    slope: float,
    *,
    n: int | Literal["all"],
    seed: int = 0,
    sites: Iterable[str | Site] | None = None,
    recalibrate: Any = None,
    key: str | None = None,
    label_key: str | None = None,
) -> Ensemble:
    """Read a model with Leaky ReLUs as an ensemble of models of different ratios, and measure its members.

    A Leaky ReLU of slope a is ``a * x + (1 - a) * relu(x)``. Read as an expectation, each of L activations is linear
    with probability a, which gives 2^L members with shared weights; one that drops d activations has the probability
    a^d (1 - a)^(L - d). The same holds for any other activation that a gradual conversion mixes with its input. The
    soft model, with slope a at every site, approximates the members' average, and equals it if one site is followed by
    linear layers only.

    One copy of the model runs as every member, in eval mode; slopes of 0 and 1 are bitwise equal to the original and to
    the hard conversion. The model is left unchanged. Each batch is read once and runs through all members.

    Args:
        model: The original, without slopes, which returns logits ``[images, classes]``.
        data: A tensor ``[images, ...]``, or a loader or iterable of batches: tensors, (x, y) pairs or dicts. If y is a
            tensor with one integer per image, these are labels.
        slope: The probability a, from 0 to 1.
        n: How many members to draw, with replacement; or ``"all"`` for every member, weighted by its probability, of at
            most 12 sites.
        seed: Seed of the draw.
        sites: Ids of the activations that members drop or keep, as in a plan, or sites of a plan (``plan.changes``).
            None stands for all that a plan of the model has and can drop.
        recalibrate: Other images. The norms' statistics of each member and of the soft model are then estimated on
            these, as :func:`nmconv.recalibrate_norms` does; they run through all members, too. None leaves every member
            the model's own statistics.
        key: The key of the images if batches are dicts.
        label_key: The key of the labels if batches are dicts.

    Returns:
        The members and their measurements, as :class:`nmconv.ensemble.Ensemble` describes them.

    Raises:
        ModelTypeError: If ``model`` is not a module, or is wrapped, compiled or scripted.
        AlreadyConvertedError: If it was converted, or is gradual: :func:`nmconv.restore` gives the original back.
        OptionError: If an option is out of range, there are no images, or an activation is random (RReLU).
        PlanError: If a site is unknown, or cannot be dropped.
        NoSitesError: If the model has no activation that can be dropped.
        FitError: If the model fails on the images, or does not return logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import nmconv
        >>> layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        >>> model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
        >>> ensemble = nmconv.ensemble.members(model, torch.randn(16, 3, 8, 8), 0.25, n="all")
        >>> ensemble.kept, ensemble.ratios, ensemble.weights
        ((2, 1, 1, 0), (1.0, 2.0, 2.0, inf), (0.5625, 0.1875, 0.1875, 0.0625))
        >>> nmconv.ensemble.members(model, torch.randn(16, 3, 8, 8), 0.25, n=100).mean_probabilities.shape
        torch.Size([16, 10])
    """
    check_slope(slope)
    if n != "all" and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise OptionError(f"n={n!r}: give a number of members, 1 or more, or 'all'")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise OptionError(f"seed={seed!r}: give a whole number, 0 or more")
    if recalibrate is not None and recalibrate is data:
        raise OptionError("recalibrate is data itself: give other images, such as some of the training set")
    check_model(model, "take members of")
    slope = float(torch.tensor(slope, dtype=torch.float32))  # as the soft model's buffers hold it
    with state_preserved(model), torch.no_grad():
        batches = _labeled_batches(data, model, key, label_key)
        first = next(batches)
        plan = _plan_to_drop(model, first[0][:2], sites)
        site_count = len(plan.changes)
        drawn = _draw_members(n, slope, site_count, seed)
        counts = Counter(drawn)
        weights = {member: _probability(member, slope) if n == "all" else counts[member] / n for member in counts}
        soft = (slope,) * site_count
        member_model = MemberModel(model, plan)
        if recalibrate is not None:
            member_model.recalibrate([soft, *weights], recalibrate, key)
        averages = MemberAverages(weights, soft)
        for images, labels in itertools.chain([first], batches):
            averages.add(partial(member_model.logits, images), labels)
    return _ensemble(model, plan, slope, n, drawn, weights, averages)


def _labeled_batches(
    data: Any, model: nn.Module, key: str | None, label_key: str | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield images and their labels, if there are any, on the model's device."""
    device_and_dtype = device_and_dtype_of(model)
    for images, y in read_batches(data, key):
        if isinstance(y, Mapping):
            if label_key is not None and label_key not in y:
                names = ", ".join(map(repr, y))
                raise OptionError(f"batches are dicts with {names}: name the labels' by label_key=")
            y = None if label_key is None else y[label_key]
        are_labels = isinstance(y, Tensor) and not y.is_floating_point() and y.shape == images.shape[:1]
        yield to_device_and_dtype(images, device_and_dtype), y.to(device_and_dtype[0]) if are_labels else None


def _plan_to_drop(model: nn.Module, images: Tensor, sites: Iterable[str | Site] | None) -> Plan:
    """Return the plan that drops the given sites, by default all that can be dropped, and nothing else.

    Raises:
        OptionError: If ``sites`` is not a list of sites, or one of them does not run in eval mode.
        PlanError: If a site is unknown, or cannot be dropped.
        NoSitesError: If no site can be dropped.
    """
    plan = plan_to_keep_all(model, images)
    real = [site for site in plan.sites if site.is_real]
    if sites is None:
        chosen = [site.id for site in real if site.modes != "train" and not site.locked]
        if not chosen:
            raise NoSitesError(f"no activation of this {type(model).__name__} can be dropped: {real[0].locked}")
    elif isinstance(sites, Iterable) and not isinstance(sites, str):
        chosen = [site.id if isinstance(site, Site) else site for site in sites]
    else:
        raise OptionError(f"sites={sites!r:.80}: give a list of ids of activations, as in a plan")
    if not chosen:
        raise OptionError("sites is empty: give ids of activations, or None for all that can be dropped")
    plan = plan.edit({**dict.fromkeys((site.id for site in real), "keep"), **dict.fromkeys(chosen, "drop")})
    for site in plan.changes:
        if site.modes == "train":
            raise OptionError(f"{site.id} runs in train mode only, and members run in eval mode: leave it out of sites")
    return plan


def _draw_members(n: int | Literal["all"], slope: float, site_count: int, seed: int) -> list[Slopes]:
    """Return the slopes of all members, or of ``n`` members drawn at random.

    Raises:
        OptionError: If there are too many members to enumerate.
    """
    if n != "all":
        rng = random.Random(seed)
        return [tuple(float(rng.random() < slope) for _ in range(site_count)) for _ in range(n)]
    if site_count > _MAX_ENUMERATED_SITES:
        raise OptionError(
            f"n='all' of {site_count} sites would be {2**site_count} members: give a number of members to draw, or "
            f"name at most {_MAX_ENUMERATED_SITES} sites"
        )
    return list(itertools.product((0.0, 1.0), repeat=site_count))


def _probability(member: Slopes, slope: float) -> float:
    return math.prod(slope if dropped else 1 - slope for dropped in member)


def _ensemble(
    model: nn.Module,
    plan: Plan,
    slope: float,
    n: int | Literal["all"],
    drawn: list[Slopes],
    weights: Mapping[Slopes, float],
    averages: MemberAverages,
) -> Ensemble:
    ids = [site.id for site in plan.changes]
    kept = [plan.counts.activations_before - int(sum(member)) for member in drawn]
    accuracies = averages.accuracies()
    disagreement = averages.disagreement()
    if n != "all":  # leave out the pairs of a member with itself
        disagreement = disagreement * n / (n - 1) if n > 1 else math.nan
    logits, probabilities, soft_logits = averages.logits(), averages.probabilities(), averages.soft_logits()
    return Ensemble(
        model=type(model).__name__,
        slope=slope,
        sites=tuple(ids),
        sampled=n != "all",
        dropped=tuple(tuple(site for site, gone in zip(ids, member, strict=True) if gone) for member in drawn),
        weights=tuple(weights[member] if n == "all" else 1 / n for member in drawn),
        kept=tuple(kept),
        ratios=tuple(plan.convs / count if count else math.inf for count in kept),
        accuracy=None if accuracies is None else tuple(accuracies[member] for member in drawn),
        disagreement=disagreement,
        mean_probabilities=probabilities,
        mean_logits=logits,
        soft_logits=soft_logits,
        gap=float((logits - soft_logits).abs().mean()),
        probabilities_accuracy=averages.accuracy(probabilities),
        logits_accuracy=averages.accuracy(logits),
        soft_accuracy=averages.accuracy(soft_logits),
    )
