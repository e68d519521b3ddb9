"""Ratios, chains, plans: what is decided, as plain data. Nothing here knows torch."""

from nmconv.planning._changes import Change, Changes, changes_of
from nmconv.planning._geometry import (
    Geometry,
    Refusal,
    Stage,
    composed,
    cropped,
    diagonal,
    hoisted,
    identity,
    joined,
    padded,
    shrunk,
    taps_kept,
)
from nmconv.planning._plain import from_plain
from nmconv.planning._plan import Branch, Counts, Hoist, Kernel, Plan, Site, Sum
from nmconv.planning._planner import Options, draw_up
from nmconv.planning._policies import Keep, Unit
from nmconv.planning._ratio import Ratio
from nmconv.planning._saved import number, read_json, write_json
from nmconv.planning._selection import listed
from nmconv.planning._signature import Signature, TensorSpec, to_signature
from nmconv.planning._structure import Activation, Chain, Item, Place, Structure, Untraced
from nmconv.planning._table import table

__all__ = [
    "Activation",
    "Branch",
    "Chain",
    "Change",
    "Changes",
    "Counts",
    "Geometry",
    "Hoist",
    "Item",
    "Keep",
    "Kernel",
    "Options",
    "Place",
    "Plan",
    "Ratio",
    "Refusal",
    "Signature",
    "Site",
    "Stage",
    "Structure",
    "Sum",
    "TensorSpec",
    "Unit",
    "Untraced",
    "changes_of",
    "composed",
    "cropped",
    "diagonal",
    "draw_up",
    "from_plain",
    "hoisted",
    "identity",
    "joined",
    "listed",
    "number",
    "padded",
    "read_json",
    "shrunk",
    "table",
    "taps_kept",
    "to_signature",
    "write_json",
]
