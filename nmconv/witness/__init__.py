"""The witness: compares a result's recording with the original's, to which the intended changes are applied."""

from nmconv.witness.allowed import MergedGroup, allowed_by
from nmconv.witness.comparison import Difference, broken_groups, compare

__all__ = ["Difference", "MergedGroup", "allowed_by", "broken_groups", "compare"]
