"""Choosing which units lose their activations, by measurement."""

from nmconv.searching._records import Candidate, Sensitivity
from nmconv.searching._search import search
from nmconv.searching._sensitivity import sensitivity

__all__ = ["Candidate", "Sensitivity", "search", "sensitivity"]
