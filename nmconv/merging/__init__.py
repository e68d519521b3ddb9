"""Merging linear runs into single convolutions."""

from nmconv.merging.api import find_runs, fold_norms, merge
from nmconv.merging.call_guards import with_attribute_guards
from nmconv.merging.merge_records import any_requires_grad, merge_of_segment, norms_after
from nmconv.merging.node_affines import interior_affine, interior_geometry
from nmconv.merging.nodes import RunNode, nodes_of
from nmconv.merging.partitioning import Segment
from nmconv.merging.placing import install, rewrite_forwards
from nmconv.merging.recorded_runs import merged_groups
from nmconv.merging.report import Merge, Run, get_merges

__all__ = [
    "Merge",
    "Run",
    "RunNode",
    "Segment",
    "any_requires_grad",
    "find_runs",
    "fold_norms",
    "get_merges",
    "install",
    "interior_affine",
    "interior_geometry",
    "merge",
    "merge_of_segment",
    "merged_groups",
    "nodes_of",
    "norms_after",
    "rewrite_forwards",
    "with_attribute_guards",
]
