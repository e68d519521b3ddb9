"""Timing modules on a backend, side by side."""

from nmconv.timing._backends import BACKENDS, require, runner
from nmconv.timing._interleaved import Spread, Timing, interleaved, ratios
from nmconv.timing._noise import drawn, noise
from nmconv.timing._summed import Summed
from nmconv.timing._threads import threads

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
