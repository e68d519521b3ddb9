"""Benchmark of a model: original, converted and merged, timed side by side. The command line is in ``command``."""

from nmconv.bench.benchmark import run
from nmconv.bench.results import Cell, Settings

__all__ = ["Cell", "Settings", "run"]
