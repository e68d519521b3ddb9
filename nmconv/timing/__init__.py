"""Time forwards of modules, interleaved, on several backends."""

from nmconv.timing.backends import BACKENDS, require, runner
from nmconv.timing.interleaved_timing import Spread, Timing, interleaved, ratios
from nmconv.timing.stand_ins import Summed, drawn, noise
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
