"""Ratios, chains, plans: what is decided, as plain data. Nothing here knows torch."""

from nmconv.planning._geometry import (
    Geometry,
    Refusal,
    Stage,
    composed,
    diagonal,
    hoisted,
    identity,
    joined,
    padded,
    shrunk,
    taps_kept,
)
from nmconv.planning._plain import from_plain
from nmconv.planning._plan import Counts, Hoist, Plan, Site
from nmconv.planning._planner import Options, draw_up
from nmconv.planning._policies import Keep, Unit
from nmconv.planning._ratio import Ratio
from nmconv.planning._selection import listed
from nmconv.planning._structure import Activation, Chain, Item, Place, Structure, Untraced

__all__ = [
    "Activation",
    "Chain",
    "Counts",
    "Geometry",
    "Hoist",
    "Item",
    "Keep",
    "Options",
    "Place",
    "Plan",
    "Ratio",
    "Refusal",
    "Site",
    "Stage",
    "Structure",
    "Unit",
    "Untraced",
    "composed",
    "diagonal",
    "draw_up",
    "from_plain",
    "hoisted",
    "identity",
    "joined",
    "listed",
    "padded",
    "shrunk",
    "taps_kept",
]
