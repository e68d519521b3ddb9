"""The schedule by which a gradual model becomes the hard conversion while it trains."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from nmconv.errors import OptionError, SlopeWarning
from nmconv.surgery import check_gradual, check_plain, finish, get_slopes, set_slope

__all__ = ["Gradual"]

_LATE = 0.9
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda part: (1 - math.cos(math.pi * part)) / 2,
    "linear": lambda part: part,
}


class Gradual:
    """Takes a gradual model from the original to the hard conversion: all slopes rise from 0 to 1 while it trains.

    After n of N updates, with p = (n/N - start) / (end - start), held to [0, 1], all slopes are p, or
    (1 - cos(π p)) / 2: VanillaNet's deep training (arXiv 2305.12972, section 3.1), whose slope is linear in the epoch.
    A slope depends on n alone, so that it is the same on every rank and after a restart.

    With ``sampling=True`` the model is not mixed: at each update it becomes one member of the ensemble as which
    :func:`nmconv.ensemble.members` reads a mixed network. Each site is dropped (slope 1) with the scheduled probability
    and else kept (slope 0), independently of the others. The draw depends on ``seed``, n and the site's id alone: it is
    the same on every rank, after a restart, for all micro-batches of an update, and where a checkpointed block is
    recomputed. It leaves global random states alone. From ``end`` on everything is dropped. In eval mode the model
    stays the member that was drawn last: ``set_slope(model, gradual.slope_at(n))`` makes it the soft network, which
    stands for the average, and ``gradual.step_update(n)`` the member again.

    It has the verbs of a timm scheduler. Call :meth:`step_update` once an update of the optimizer, and not for each
    micro-batch where gradients are accumulated.

    Args:
        model: What ``nmconv.convert(..., gradual=True)`` or ``apply_plan`` returned, or a module that holds it. What
            wraps it, or is compiled from it, need not be known: slopes are set in place, and nothing is compiled anew.
        total_steps: How many updates there will be.
        schedule: ``"cosine"`` or ``"linear"``.
        start: At which part of them the slopes begin to rise.
        end: At which part of them they are 1. What is left adapts weights and norm statistics to the hard conversion.
        followers: Copies of the model that get the same slopes, such as ``ema.module`` of timm's ``ModelEmaV2`` or
            ``V3``, which averages the state dict: slopes are not in it. With ``sampling`` they get the scheduled slope,
            not the draw: weights averaged over many members are evaluated in the network that stands for their average.
        sampling: Whether to draw a member at each update.
        seed: Of the draws.

    Raises:
        OptionError: If an option is none, or if a model is not gradual, or a follower has other sites.
        ModelTypeError: If ``model`` is no module, or wrapped, compiled (``model.compile()`` will do) or scripted.

    Warns:
        SlopeWarning: If ``end`` is above 0.9: norms' running statistics lag behind a model that changes to the end.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import nmconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> soft = nmconv.convert(net, "2:1", gradual=True)
        >>> gradual = nmconv.Gradual(soft, total_steps=10, schedule="linear", end=0.8)
        >>> for n in range(1, 11):
        ...     _ = soft(torch.rand(2, 3, 16, 16))  # a step of training
        ...     gradual.step_update(n)
        >>> gradual.finish()
        >>> soft[1]
        Identity()
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        schedule: str = "cosine",
        start: float = 0.0,
        end: float = 0.6,
        followers: Iterable[nn.Module] = (),
        sampling: bool = False,
        seed: int = 0,
    ) -> None:
        told = {"total_steps": total_steps, "schedule": schedule, "start": start, "end": end}
        self._told = _checked({**told, "sampling": sampling, "seed": seed, "step": 0})
        if not isinstance(followers, (Iterable, nn.Module)):
            raise OptionError(f"followers={followers!r:.80}: give a list of models, such as [ema.module]")
        self._models = [model, *([followers] if isinstance(followers, nn.Module) else followers)]
        for each in self._models:
            check_plain(each, "schedule", compiled=True)
        sites = check_gradual(model, "schedule")
        for follower in self._models[1:]:
            if check_gradual(follower, "let follow").keys() != sites.keys():
                raise OptionError(f"a follower, a {type(follower).__name__}, has other gradual sites than the model")
        if end > _LATE:
            warnings.warn(
                f"the slopes reach 1 at {end:g} of the training, and norms' running statistics lag behind: give an "
                f"end of at most {_LATE}, or call nmconv.recalibrate_norms after finish()",
                SlopeWarning,
                stacklevel=2,
            )
        self._finished = False
        self.step_update(0)

    def slope_at(self, n: int) -> float:
        """The slope after ``n`` updates; with ``sampling`` the probability that a site is dropped then."""
        start, end = self._told["start"], self._told["end"]
        now = n / self._told["total_steps"]
        if now >= end:
            return 1.0
        return _SCHEDULES[self._told["schedule"]]((now - start) / (end - start)) if now > start else 0.0

    def step_update(self, n: int, metric: Any = None) -> None:
        """Set the slopes to what they are after ``n`` updates of the optimizer; after :meth:`finish` do nothing.

        Nothing else changes them, so call it after the backward pass, in which checkpointed blocks run again.

        Args:
            n: How many updates were made.
            metric: Not used; what timm's schedulers take.

        Raises:
            OptionError: If ``n`` is no count.
        """
        self._told["step"] = _checked({**self._told, "step": n})["step"]
        slope = self.slope_at(n)
        for model in () if self._finished else self._models:
            drawn = self._told["sampling"] and model is self._models[0]
            set_slope(model, self._member(get_slopes(model), n) if drawn else slope)

    def _member(self, sites: Iterable[str], n: int) -> dict[str, float]:
        """The slopes of the member drawn after ``n`` updates; a site's draw has nothing to do with the other sites."""
        seed, slope = self._told["seed"], self.slope_at(n)
        return {site: float(random.Random(f"{seed} {n} {site}").random() < slope) for site in sites}

    def state_dict(self) -> dict[str, Any]:
        """The options, and how many updates were made: plain data."""
        return dict(self._told)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, and set the slopes to that.

        Raises:
            OptionError: If it is something else.
        """
        if not isinstance(state, Mapping) or state.keys() != self._told.keys():
            raise OptionError("this is no state of a Gradual: give what its state_dict() returned")
        self._told = _checked(dict(state))
        self.step_update(self._told["step"])

    def finish(self) -> None:
        """Leave exactly what a hard conversion leaves, of the model and its followers, in place: plain identities.

        Optimizers keep the parameters that they have. A second call does nothing.

        Raises:
            ModelTypeError: If a part of one of them was wrapped or compiled meanwhile.

        Warns:
            SlopeWarning: If the slopes were not 1 yet, so that the outputs change now.
        """
        if self._finished:
            return
        for model in self._models:
            check_plain(model, "finish", compiled=True)
        slope = min(check_gradual(self._models[0], "finish").values())
        if self._told["sampling"]:  # a member that drops everything may be drawn before the end
            slope = min(slope, self.slope_at(self._told["step"]))
        if slope < 1:
            warnings.warn(
                f"the model is finished at a slope of {slope:g}, and its outputs change: train on, or call "
                "nmconv.recalibrate_norms",
                SlopeWarning,
                stacklevel=2,
            )
        for model in self._models:
            finish(model)
        self._finished = True


def _checked(told: dict[str, Any]) -> dict[str, Any]:
    """Return options that are some.

    Raises:
        OptionError: At the first that is none.
    """
    for name, least in (("total_steps", 1), ("step", 0), ("seed", 0)):
        value = told[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r}: give a whole number, {least} or more")
    if not isinstance(told["sampling"], bool):
        raise OptionError(f"sampling={told['sampling']!r}: give True, to draw members, or False, to mix")
    if told["schedule"] not in tuple(_SCHEDULES):
        raise OptionError(f"schedule={told['schedule']!r}: give one of {', '.join(map(repr, _SCHEDULES))}")
    for name in ("start", "end"):
        value = told[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise OptionError(f"{name}={value!r}: give a part of the training, from 0 to 1")
    if told["start"] > told["end"]:
        raise OptionError(f"start={told['start']} is behind end={told['end']}: give a start that is not")
    return told
