"""The witness: holds a result's recording against the original's, less what was to be done."""

from nmconv.witness._changes import Allowed, Group, allowed_by
from nmconv.witness._compare import Difference, broken_groups, compare

__all__ = ["Allowed", "Difference", "Group", "allowed_by", "broken_groups", "compare"]
