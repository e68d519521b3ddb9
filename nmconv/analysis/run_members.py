"""The public call: a Leaky ReLU network read as an ensemble, its members run one by one."""

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
from torch.nn.modules.batchnorm import _BatchNorm

from nmconv.analysis.ensemble import Ensemble
from nmconv.analysis.leave_untouched import untouched
from nmconv.analysis.member_averages import Averages, Slopes
from nmconv.errors import FitError, NoSitesError, OptionError
from nmconv.fitting import home_of, read_batches, read_images, recalibrate_norms, taking
from nmconv.planning import Plan, Site
from nmconv.surgery import apply_plan, check_model, check_plain, check_slope, is_slope, make_plan, set_slope

__all__ = ["members"]

_MOST = 12  # sites of which all members are enumerated: 4096


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
    """Read a network with Leaky ReLUs as an ensemble of networks of different ratios, and measure its members.

    A Leaky ReLU of slope a is ``a * x + (1 - a) * relu(x)``: of L activations each is linear with probability a, which
    makes 2^L members with shared weights. One that drops d of them has the probability a^d (1 - a)^(L - d). The same
    holds for any other activation that a gradual conversion mixes with its input. The soft network, with slope a at
    every site, stands for their average: exactly where one site is followed by linear layers alone.

    One copy of the model runs as every member, in eval mode: slopes of 0 and 1 are the original and the hard conversion
    to the bit. The model is left as it was. Each batch is read once, and runs through all members.

    Args:
        model: The original, without slopes, which gives logits ``[images, classes]``.
        data: A tensor ``[images, ...]``, or a loader or iterable of batches: tensors, (x, y) pairs or dicts. Where y is
            a tensor with one integer for each image, these are labels.
        slope: The probability a, from 0 to 1.
        n: How many members to draw, with replacement; or ``"all"`` for every one, weighted, of at most 12 sites.
        seed: Of the draw.
        sites: Ids of the activations that members drop or keep, as in a plan, or its sites (``plan.changes``). None:
            all that a plan of the model has and can drop.
        recalibrate: Other images. The norms' statistics of each member, and of the soft network, are then estimated
            on these, as :func:`nmconv.recalibrate_norms` does: they run through all members, too. None: every member
            has the model's own statistics.
        key: Where batches are dicts: under which key the images are.
        label_key: The same of the labels.

    Returns:
        The members and what they give: :class:`nmconv.ensemble.Ensemble` says what the numbers are.

    Raises:
        ModelTypeError: If ``model`` is no module, or wrapped, compiled or scripted.
        AlreadyConvertedError: If it was converted, or is gradual: :func:`nmconv.restore` gives the original back.
        OptionError: If an option is out of range, there are no images, or an activation is random (RReLU).
        PlanError: If a site is unknown, or cannot be dropped.
        NoSitesError: If the model has no activation that can be dropped.
        FitError: If the model does not take the images, or gives no logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import nmconv
        >>> layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        >>> net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
        >>> found = nmconv.ensemble.members(net, torch.randn(16, 3, 8, 8), 0.25, n="all")
        >>> found.kept, found.ratios, found.weights
        ((2, 1, 1, 0), (1.0, 2.0, 2.0, inf), (0.5625, 0.1875, 0.1875, 0.0625))
        >>> nmconv.ensemble.members(net, torch.randn(16, 3, 8, 8), 0.25, n=100).mean_probabilities.shape
        torch.Size([16, 10])
    """
    check_slope(slope)
    if n != "all" and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise OptionError(f"n={n!r}: give a number of members, 1 or more, or 'all'")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise OptionError(f"seed={seed!r}: give a whole number, 0 or more")
    if recalibrate is not None and recalibrate is data:
        raise OptionError("recalibrate is data itself: give other images, such as some of the training set")
    check_plain(model, "take members of")
    check_model(model)
    slope = float(torch.tensor(slope, dtype=torch.float32))  # what the soft network's buffers hold
    with untouched(model), torch.no_grad():
        batches = _batches(data, model, key, label_key)
        first = next(batches)
        plan = _planned(model, first[0][:2], sites)
        found = tuple(site.id for site in plan.changes)
        drawn = _drawn(n, slope, len(found), seed)
        counted = Counter(drawn)
        shares = {each: _chance(each, slope) if n == "all" else counted[each] / n for each in counted}
        soft = (slope,) * len(found)
        networks = _Networks(model, plan)
        if recalibrate is not None:
            networks.recalibrate([soft, *shares], recalibrate, key)
        averages = Averages(shares, soft)
        for images, labels in itertools.chain([first], batches):
            averages.add(partial(networks.logits, images), labels)
    return _ensemble(model, plan, slope, n, drawn, shares, averages)


def _batches(
    data: Any, model: nn.Module, key: str | None, label_key: str | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and labels, on the model's device."""
    device, dtype = home_of(model)
    for images, y in read_batches(data, key):
        if isinstance(y, Mapping):
            if label_key is not None and label_key not in y:
                names = ", ".join(map(repr, y))
                raise OptionError(f"batches are dicts with {names}: name the labels' by label_key=")
            y = None if label_key is None else y[label_key]
        fits = isinstance(y, Tensor) and not y.is_floating_point() and y.shape == images.shape[:1]
        yield images.to(device, dtype if images.is_floating_point() else images.dtype), y.to(device) if fits else None


def _planned(model: nn.Module, images: Tensor, sites: Iterable[str | Site] | None) -> Plan:
    """The plan of the member that drops all sites, and nothing else.

    Raises:
        OptionError: If ``sites`` is no list of sites, or one of them does not run in eval mode.
        PlanError: If one is unknown, or cannot be dropped.
        NoSitesError: If none can be dropped.
    """
    plan = make_plan(model, "1:1", example_inputs=images)
    real = [site for site in plan.sites if site.is_real]
    if sites is None:
        wanted = [site.id for site in real if site.modes != "train" and not site.locked]
        if not wanted:
            raise NoSitesError(f"no activation of this {type(model).__name__} can be dropped: {real[0].locked}")
    elif isinstance(sites, Iterable) and not isinstance(sites, str):
        wanted = [site.id if isinstance(site, Site) else site for site in sites]
    else:
        raise OptionError(f"sites={sites!r:.80}: give a list of ids of activations, as in a plan")
    if not wanted:
        raise OptionError("sites is empty: give ids of activations, or None for all that can be dropped")
    plan = plan.edit({**dict.fromkeys((site.id for site in real), "keep"), **dict.fromkeys(wanted, "drop")})
    for site in plan.changes:
        if site.modes == "train":
            raise OptionError(f"{site.id} runs in train mode only, and members run in eval mode: leave it out of sites")
    return plan


def _drawn(n: int | Literal["all"], slope: float, count: int, seed: int) -> list[Slopes]:
    """All members of so many sites, or some drawn at random: slopes of 0, which keep, and 1, which drop.

    Raises:
        OptionError: If there are too many to enumerate.
    """
    if n != "all":
        draw = random.Random(seed)
        return [tuple(float(draw.random() < slope) for _ in range(count)) for _ in range(n)]
    if count > _MOST:
        raise OptionError(
            f"n='all' of {count} sites would be {2**count} members: give a number of members to draw, or name at most "
            f"{_MOST} sites"
        )
    return list(itertools.product((0.0, 1.0), repeat=count))


def _chance(member: Slopes, slope: float) -> float:
    return math.prod(slope if gone else 1 - slope for gone in member)


class _Networks:
    """One gradual copy of a model that runs as each of its members.

    Args:
        model: Read only.
        plan: Of the member that drops all sites.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model = apply_plan(model, plan, gradual=True).eval()
        self._sites = [site.id for site in plan.changes]
        norms = [module for module in self._model.modules() if isinstance(module, _BatchNorm)]
        named = [pair for norm in norms for pair in norm.named_buffers(recurse=False)]
        self._buffers = [value for name, value in named if not is_slope(name)]
        self._statistics: dict[Slopes, list[Tensor]] = {}

    def recalibrate(self, networks: Iterable[Slopes], data: Any, key: str | None) -> None:
        """Estimate the norms' statistics of networks with these slopes, each by itself."""
        images = read_images(data, self._model, key=key)
        for slopes in networks:
            self._turn_into(slopes)
            recalibrate_norms(self._model, images)
            self._statistics[slopes] = [value.clone() for value in self._buffers]

    def logits(self, images: Tensor, slopes: Slopes) -> Tensor:
        """What the network with these slopes gives: ``[images, classes]``, float64.

        Raises:
            FitError: If it does not take the images, or gives something else.
        """
        self._turn_into(slopes)
        for value, had in zip(self._buffers, self._statistics.get(slopes, ()), strict=False):
            value.copy_(had)
        with taking(self._model, images):
            output = self._model(images.clone())  # some models overwrite their input
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(images) or output.shape[1] < 2:
            what = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise FitError(
                f"this {type(self._model).__name__} gives {what}: members are compared by logits [images, classes]; "
                "wrap the model in a module that returns them"
            )
        return output.double()

    def _turn_into(self, slopes: Slopes) -> None:
        set_slope(self._model, dict(zip(self._sites, slopes, strict=True)))


def _ensemble(
    model: nn.Module,
    plan: Plan,
    slope: float,
    n: int | Literal["all"],
    drawn: list[Slopes],
    shares: Mapping[Slopes, float],
    averages: Averages,
) -> Ensemble:
    ids = [site.id for site in plan.changes]
    kept = [plan.counts.activations_before - int(sum(member)) for member in drawn]
    accuracies = averages.accuracies()
    disagreement = averages.disagreement()
    if n != "all":  # pairs of a member with itself are none
        disagreement = disagreement * n / (n - 1) if n > 1 else math.nan
    logits, probabilities, soft = averages.logits(), averages.probabilities(), averages.soft_logits()
    return Ensemble(
        model=type(model).__name__,
        slope=slope,
        sites=tuple(ids),
        sampled=n != "all",
        dropped=tuple(tuple(site for site, gone in zip(ids, member, strict=True) if gone) for member in drawn),
        weights=tuple(shares[member] if n == "all" else 1 / n for member in drawn),
        kept=tuple(kept),
        ratios=tuple(plan.convs / count if count else math.inf for count in kept),
        accuracy=None if accuracies is None else tuple(accuracies[member] for member in drawn),
        disagreement=disagreement,
        mean_probabilities=probabilities,
        mean_logits=logits,
        soft_logits=soft,
        gap=float((logits - soft).abs().mean()),
        probabilities_accuracy=averages.accuracy(probabilities),
        logits_accuracy=averages.accuracy(logits),
        soft_accuracy=averages.accuracy(soft),
    )
