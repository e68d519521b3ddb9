"""What merging is worth: original, converted and merged timed side by side."""

from nmconv.bench._records import Cell, Environment, Measured, Network, Result, Settings
from nmconv.bench._run import run

__all__ = ["Cell", "Environment", "Measured", "Network", "Result", "Settings", "run"]
