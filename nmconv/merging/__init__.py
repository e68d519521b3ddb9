"""Merging linear runs into single convolutions."""

from nmconv.merging._algebra import Affine
from nmconv.merging._asking import get_merges
from nmconv.merging._brackets import Node, Segment, nodes_of
from nmconv.merging._guards import with_flags
from nmconv.merging._install import install, norms_behind, record, trains, write_methods
from nmconv.merging._interior import interior_affine, interior_geometry
from nmconv.merging._merge import find_runs, fold_norms, merge
from nmconv.merging._module import conv_module, filled, is_channels_last, is_finite, laid_out, like_of
from nmconv.merging._numbers import has_plain_parameter
from nmconv.merging._records import Guard, Merge, Run
from nmconv.merging._seen import groups_of

__all__ = [
    "Affine",
    "Guard",
    "Merge",
    "Node",
    "Run",
    "Segment",
    "conv_module",
    "filled",
    "find_runs",
    "fold_norms",
    "get_merges",
    "groups_of",
    "has_plain_parameter",
    "install",
    "interior_affine",
    "interior_geometry",
    "is_channels_last",
    "is_finite",
    "laid_out",
    "like_of",
    "merge",
    "nodes_of",
    "norms_behind",
    "record",
    "trains",
    "with_flags",
    "write_methods",
]
