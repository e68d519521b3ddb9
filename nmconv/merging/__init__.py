"""Merging linear runs into single convolutions."""

from nmconv.merging.api import find_runs, fold_norms, merge
from nmconv.merging.call_guards import with_flags
from nmconv.merging.merge_records import norms_behind, record, trains
from nmconv.merging.node_affines import interior_affine, interior_geometry
from nmconv.merging.nodes import Node, nodes_of
from nmconv.merging.partitioning import Segment
from nmconv.merging.placing import install, write_methods
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
