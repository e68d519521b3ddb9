"""What merging is worth: original, converted and merged timed side by side."""

from nmconv.bench.benchmark import run
from nmconv.bench.command import app
from nmconv.bench.results import Cell

__all__ = ["Cell", "app", "run"]
