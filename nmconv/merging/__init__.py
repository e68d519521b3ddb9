"""Merging linear runs into single convolutions."""

from nmconv.merging.api import find_runs, fold_norms, merge
from nmconv.merging.call_guards import with_flags
from nmconv.merging.interior import interior_affine, interior_geometry
from nmconv.merging.partitioning import Node, Segment, nodes_of
from nmconv.merging.placing import install, norms_behind, record, trains, write_methods
from nmconv.merging.recorded_runs import groups_of
from nmconv.merging.report import Merge, Run, get_merges

__all__ = [
    "Merge",
    "Node",
    "Run",
    "Segment",
    "find_runs",
    "fold_norms",
    "get_merges",
    "groups_of",
    "install",
    "interior_affine",
    "interior_geometry",
    "merge",
    "nodes_of",
    "norms_behind",
    "record",
    "trains",
    "with_flags",
    "write_methods",
]
