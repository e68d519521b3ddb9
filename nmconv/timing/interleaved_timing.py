"""Time several callables in turn, so that disturbances of the machine affect all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nmconv.errors import OptionError

__all__ = ["Spread", "Timing", "quotients", "time_interleaved"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of measurements, in their unit.

    Attributes:
        median: The median.
        lower: The first quartile.
        upper: The third quartile.
    """

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one or more measurements."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Timing:
    """Durations of one call.

    Attributes:
        seconds: Seconds per call, one value per round, in order.
    """

    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Median and quartiles, in seconds."""
        return Spread.of(self.seconds)

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return self.spread.median

    @property
    def interquartile_range(self) -> float:
        """Difference between the third and the first quartile, in seconds."""
        return self.spread.upper - self.spread.lower


def time_interleaved(runners: Sequence[Callable[[], object]], *, rounds: int, seconds: float) -> list[Timing]:
    """Time callables in turn, one sample of each per round; each round begins with the next one.

    Each sample follows two untimed calls (or a hundredth of the sample's calls, if that is more), so that caches filled
    by the previous callable do not count. CUDA is synchronized.

    Args:
        runners: The callables.
        rounds: Number of samples of each.
        seconds: Minimum duration of a sample, which has as many calls as this takes, at least one.

    Returns:
        One timing per callable, in the order given.

    Raises:
        OptionError: If ``rounds`` or ``seconds`` is not positive.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise OptionError(f"rounds={rounds!r}: give a positive whole number, such as 11")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise OptionError(f"seconds={seconds!r}: give a positive number, such as 0.2")
    from torch.utils.benchmark import Timer  # imported here, as it searches for compilers

    timers = [Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()) for run in runners]
    calls = [max(1, math.ceil(seconds / max(timer.timeit(1).mean, 1e-9))) for timer in timers]
    samples: list[list[float]] = [[] for _ in timers]
    for round_index in range(rounds):
        for offset in range(len(timers)):
            index = (round_index + offset) % len(timers)
            samples[index].append(timers[index].timeit(calls[index]).mean)
    return [Timing(tuple(times)) for times in samples]


def quotients(first: Timing, second: Timing) -> Spread:
    """Return the spread of the quotients ``first / second``, round by round.

    Args:
        first: The slower one, if the result is above 1.
        second: Timed in the same call of :func:`time_interleaved`.

    Raises:
        ValueError: If the numbers of rounds differ.
    """
    return Spread.of([a / b for a, b in zip(first.seconds, second.seconds, strict=True)])
