"""Timing modules on a backend, side by side."""

from nmconv.timing.backends import BACKENDS, require, runner
from nmconv.timing.interleaved_timing import Spread, Timing, interleaved, ratios
from nmconv.timing.random_inputs import drawn, noise
from nmconv.timing.summed import Summed
from nmconv.timing.thread_count import threads

__all__ = [
    "BACKENDS",
    "Spread",
    "Summed",
    "Timing",
    "drawn",
    "interleaved",
    "noise",
    "ratios",
    "require",
    "runner",
    "threads",
]
