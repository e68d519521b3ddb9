"""Times of several callables, taken in turn, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nmconv.errors import OptionError

__all__ = ["Spread", "Timing", "interleaved", "ratios"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some measurements, in their unit.

    Attributes:
        median: The middle.
        lower: The first quartile.
        upper: The third quartile.
    """

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one measurement or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        seconds: Seconds a call, one for each round, in order.
    """

    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Median and quartiles, in seconds."""
        return Spread.of(self.seconds)

    @property
    def median(self) -> float:
        """Seconds."""
        return self.spread.median

    @property
    def interquartile_range(self) -> float:
        """Seconds between the first quartile and the third."""
        return self.spread.upper - self.spread.lower


def interleaved(runners: Sequence[Callable[[], object]], *, rounds: int, seconds: float) -> list[Timing]:
    """Time callables in turn, one sample of each a round; each round begins with the next one.

    Each sample follows two calls that are not timed (a hundredth of the sample's calls, if that is more), so that
    nobody pays for the caches that the one before has filled. CUDA is waited for.

    Args:
        runners: What to time.
        rounds: Samples of each.
        seconds: Least duration of a sample: as many calls as it takes, at least one.

    Returns:
        One timing for each runner, in the order given.

    Raises:
        OptionError: For rounds or seconds that are not positive.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise OptionError(f"rounds={rounds!r}: give a positive whole number, such as 11")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise OptionError(f"seconds={seconds!r}: give a positive number, such as 0.2")
    from torch.utils.benchmark import Timer  # here, since it looks for compilers

    timers = [Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()) for run in runners]
    calls = [max(1, math.ceil(seconds / max(timer.timeit(1).mean, 1e-9))) for timer in timers]
    taken: list[list[float]] = [[] for _ in timers]
    for turn in range(rounds):
        for place in range(len(timers)):
            index = (turn + place) % len(timers)
            taken[index].append(timers[index].timeit(calls[index]).mean)
    return [Timing(tuple(times)) for times in taken]


def ratios(first: Timing, second: Timing) -> Spread:
    """How many times longer the first takes than the second: the spread of the quotients round by round.

    Args:
        first: What takes longer, if the result is above 1.
        second: Timed in the same call of :func:`interleaved`.

    Raises:
        ValueError: If their numbers of rounds differ.
    """
    return Spread.of([one / two for one, two in zip(first.seconds, second.seconds, strict=True)])
