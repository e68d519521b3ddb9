"""Merging linear runs into single convolutions."""

from nmconv.merging._asking import get_merges
from nmconv.merging._install import install, write_methods
from nmconv.merging._merge import find_runs, fold_norms, merge
from nmconv.merging._module import conv_module
from nmconv.merging._records import Merge, Run

__all__ = [
    "Merge",
    "Run",
    "conv_module",
    "find_runs",
    "fold_norms",
    "get_merges",
    "install",
    "merge",
    "write_methods",
]
