"""Time forwards of modules, interleaved, on several backends."""

from nmconv.timing.backends import BACKENDS, check_backend, make_runner
from nmconv.timing.interleaved_timing import Spread, Timing, quotients, time_interleaved
from nmconv.timing.stand_ins import Summed, fixed_normal, randomize_weights
from nmconv.timing.thread_count import thread_count

__all__ = [
    "BACKENDS",
    "Spread",
    "Summed",
    "Timing",
    "check_backend",
    "fixed_normal",
    "make_runner",
    "quotients",
    "randomize_weights",
    "thread_count",
    "time_interleaved",
]
