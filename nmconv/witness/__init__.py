"""The witness: holds a result's recording against the original's, less what was to be done."""

from nmconv.witness._changes import Changes, Group, changes_of
from nmconv.witness._compare import Difference, broken_groups, compare

__all__ = ["Changes", "Difference", "Group", "broken_groups", "changes_of", "compare"]
