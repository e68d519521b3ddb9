"""The schedule that takes a gradual model to the hard conversion during training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from nmconv.errors import OptionError, SlopeWarning, warn_user
from nmconv.surgery import check_gradual, check_plain, finish, get_slopes, set_slope

__all__ = ["Gradual"]

_LATEST_SAFE_END = 0.9
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: progress,
}


class Gradual:
    """Take a gradual model from the original to the hard conversion: its slopes rise from 0 to 1 during training.

    After n of N updates, let p = (n/N - start) / (end - start), clamped to [0, 1]. All slopes are p (``"linear"``) or
    (1 - cos(π p)) / 2 (``"cosine"``). This is VanillaNet's deep training (arXiv 2305.12972, section 3.1), whose slope
    is linear in the epoch. A slope depends on n alone, so it is the same on every rank and after a restart.

    With ``sampling=True`` sites are not mixed: each update samples one member of the ensemble that
    :func:`nmconv.ensemble.members` reads a mixed network as. Each site is dropped (slope 1) with the scheduled
    probability and kept (slope 0) otherwise, independently of the others. The sample depends on ``seed``, n and the
    site's id alone: it is the same on every rank, after a restart, for all micro-batches of an update, and where a
    checkpointed block is recomputed. Global RNG states are not touched. From ``end`` on every site is dropped. In eval
    mode the model stays the member sampled last: ``set_slope(model, gradual.slope_at(n))`` makes it the mixed network,
    which approximates the average, and ``gradual.step_update(n)`` makes it the member again.

    The methods are those of a timm scheduler. Call :meth:`step_update` once per optimizer update, not per micro-batch
    where gradients are accumulated.

    Args:
        model: The result of ``nmconv.convert(..., gradual=True)`` or ``apply_plan``, or a module that contains it; if
            its plan changes nothing, nothing is done. Wrapped and compiled versions of it need not be passed: slopes
            are set in place, without recompiling.
        total_steps: Number of optimizer updates in the whole training.
        schedule: ``"cosine"`` or ``"linear"``.
        start: Fraction of the training at which the slopes begin to rise.
        end: Fraction of the training at which they reach 1. The rest adapts weights and norm statistics to the hard
            conversion.
        followers: Copies of the model that get the same slopes, such as ``ema.module`` of timm's ``ModelEmaV2`` or
            ``V3``, which averages the state dict: slopes are not in it. With ``sampling`` they get the scheduled slope
            instead of the sample: weights averaged over many members are evaluated in the network that approximates
            the average of these members.
        sampling: Whether to sample a member at each update.
        seed: Seed of the samples.

    Raises:
        OptionError: If an option is invalid, a model is not gradual, or a follower has other gradual sites.
        ModelTypeError: If ``model`` is not a module, or is wrapped, compiled or scripted (``model.compile()`` is fine).

    Warns:
        SlopeWarning: If ``end`` is above 0.9: the running statistics of norms lag behind a model that changes until
            the end.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> model = nmconv.convert(model, "2:1", gradual=True)
        >>> gradual = nmconv.Gradual(model, total_steps=10, schedule="linear", end=0.8)
        >>> for n in range(1, 11):
        ...     _ = model(torch.rand(2, 3, 16, 16))  # a training step
        ...     gradual.step_update(n)
        >>> gradual.finish()
        >>> model[3]
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
        schedule_options = {"total_steps": total_steps, "schedule": schedule, "start": start, "end": end}
        self._state = _checked({**schedule_options, "sampling": sampling, "seed": seed, "step": 0})
        if not isinstance(followers, (Iterable, nn.Module)):
            raise OptionError(f"followers={followers!r:.80}: give a list of models, such as [ema.module]")
        self._models = [model, *([followers] if isinstance(followers, nn.Module) else followers)]
        for each in self._models:
            check_plain(each, "schedule", compiled=True)
        sites = check_gradual(model, "schedule", or_unchanged=True)
        for follower in self._models[1:]:
            if check_gradual(follower, "let follow", or_unchanged=True).keys() != sites.keys():
                raise OptionError(f"a follower, a {type(follower).__name__}, has other gradual sites than the model")
        if end > _LATEST_SAFE_END:
            warn_user(
                f"the slopes reach 1 at {end:g} of the training, and norms' running statistics lag behind: give an "
                f"end of at most {_LATEST_SAFE_END}, or call nmconv.recalibrate_norms after finish()",
                SlopeWarning,
            )
        self._finished = not sites  # of a model whose plan changes nothing
        self.step_update(0)

    def slope_at(self, n: int) -> float:
        """Return the slope after ``n`` updates; with ``sampling``, the probability that a site is dropped then."""
        start, end = self._state["start"], self._state["end"]
        fraction = n / self._state["total_steps"]
        if fraction >= end:
            return 1.0
        return _SCHEDULES[self._state["schedule"]]((fraction - start) / (end - start)) if fraction > start else 0.0

    def step_update(self, n: int, metric: Any = None) -> None:
        """Set the slopes to their values after ``n`` optimizer updates; do nothing after :meth:`finish`.

        Call it after the backward pass, in which checkpointed blocks run again and must see the same slopes.

        Args:
            n: Number of updates made.
            metric: Ignored; accepted because timm's schedulers take it.

        Raises:
            OptionError: If ``n`` is not a whole number, 0 or more.
        """
        self._state["step"] = _checked({**self._state, "step": n})["step"]
        slope = self.slope_at(n)
        for model in () if self._finished else self._models:
            samples = self._state["sampling"] and model is self._models[0]
            set_slope(model, self._sampled_slopes(get_slopes(model), n) if samples else slope)

    def _sampled_slopes(self, sites: Iterable[str], n: int) -> dict[str, float]:
        """Return the slopes of the member sampled after ``n`` updates; each site has an RNG of its own."""
        seed, drop_probability = self._state["seed"], self.slope_at(n)
        return {site: float(random.Random(f"{seed} {n} {site}").random() < drop_probability) for site in sites}

    def state_dict(self) -> dict[str, Any]:
        """Return the options and the number of updates made, as plain data."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, and set the slopes accordingly.

        Raises:
            OptionError: If ``state`` is anything else.
        """
        if not isinstance(state, Mapping) or state.keys() != self._state.keys():
            raise OptionError("this is not the state of a Gradual: give what its state_dict() returned")
        self._state = _checked(dict(state))
        self.step_update(self._state["step"])

    def finish(self) -> None:
        """Turn the model and its followers into exactly what a hard conversion leaves, in place.

        Optimizers keep their parameters. A second call does nothing.

        Raises:
            ModelTypeError: If a part of one of the models has been wrapped or compiled meanwhile.

        Warns:
            SlopeWarning: If the slopes have not reached 1, so that the outputs change now.
        """
        if self._finished:
            return
        for model in self._models:
            check_plain(model, "finish", compiled=True)
        slope = min(check_gradual(self._models[0], "finish").values())
        if self._state["sampling"]:  # a member that drops every site may be sampled before the end
            slope = min(slope, self.slope_at(self._state["step"]))
        if slope < 1:
            warn_user(
                f"the model is finished at a slope of {slope:g}, and its outputs change: train on, or call "
                "nmconv.recalibrate_norms",
                SlopeWarning,
            )
        for model in self._models:
            finish(model)
        self._finished = True


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state, or raise OptionError if a value is invalid."""
    for name, minimum in (("total_steps", 1), ("step", 0), ("seed", 0)):
        value = state[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise OptionError(f"{name}={value!r}: give a whole number, {minimum} or more")
    if not isinstance(state["sampling"], bool):
        raise OptionError(f"sampling={state['sampling']!r}: give True, to draw members, or False, to mix")
    if state["schedule"] not in tuple(_SCHEDULES):
        raise OptionError(f"schedule={state['schedule']!r}: give one of {', '.join(map(repr, _SCHEDULES))}")
    for name in ("start", "end"):
        value = state[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise OptionError(f"{name}={value!r}: give a fraction of the training, from 0 to 1")
    if state["start"] > state["end"]:
        raise OptionError(f"start={state['start']} is above end={state['end']}: give a start that is at most end")
    return state
