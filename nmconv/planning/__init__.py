"""Ratios, chains and plans: all decisions as plain data, without torch."""

from nmconv.planning.call_signature import Signature, TensorSpec, to_signature
from nmconv.planning.changes import Change, Changes, changes_of
from nmconv.planning.dataclass_json import from_plain
from nmconv.planning.json_files import nan_if_null, read_json, write_json
from nmconv.planning.plan import Plan
from nmconv.planning.plan_parts import Branch, Counts, Hoist, Kernel, ReplacedSum, is_kernel_size
from nmconv.planning.planner import Options, decide
from nmconv.planning.policies import DEFAULT_KEEP, Keep, Unit, current_keep
from nmconv.planning.ratio import Ratio
from nmconv.planning.selection import as_patterns
from nmconv.planning.site import Site
from nmconv.planning.structure import Activation, Chain, Item, Place, Structure, Untraced
from nmconv.planning.text_table import text_table

__all__ = [
    "DEFAULT_KEEP",
    "Activation",
    "Branch",
    "Chain",
    "Change",
    "Changes",
    "Counts",
    "Hoist",
    "Item",
    "Keep",
    "Kernel",
    "Options",
    "Place",
    "Plan",
    "Ratio",
    "ReplacedSum",
    "Signature",
    "Site",
    "Structure",
    "TensorSpec",
    "Unit",
    "Untraced",
    "as_patterns",
    "changes_of",
    "current_keep",
    "decide",
    "from_plain",
    "is_kernel_size",
    "nan_if_null",
    "read_json",
    "text_table",
    "to_signature",
    "write_json",
]
