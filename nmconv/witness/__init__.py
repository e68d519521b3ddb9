"""The witness: compares a result's recording with the original's, to which the intended changes are applied."""

from nmconv.witness.allowed import MergedGroup, allowed_differences
from nmconv.witness.comparison import Difference, broken_groups, compare

__all__ = ["Difference", "MergedGroup", "allowed_differences", "broken_groups", "compare"]
