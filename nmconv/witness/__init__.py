"""The witness: holds a result's recording against the original's, less what was to be done."""

from nmconv.witness.allowed import MergedGroup, allowed_by
from nmconv.witness.comparison import Difference, broken_groups, compare

__all__ = ["Difference", "MergedGroup", "allowed_by", "broken_groups", "compare"]
