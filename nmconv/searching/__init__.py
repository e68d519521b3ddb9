"""Choosing by measurement which activations to drop."""

from nmconv.searching.api import search
from nmconv.searching.measure_candidates import sensitivity
from nmconv.searching.table import Candidate, Sensitivity

__all__ = ["Candidate", "Sensitivity", "search", "sensitivity"]
