"""The arithmetic of convolutions: their extents, their composition, and modules read as affine maps."""

from nmconv.algebra.affine import Affine, apply, compose, join, of_average, of_identity
from nmconv.algebra.geometry import Geometry, Refusal, Stage, composed, hoisted, identity, joined, shrunk, taps_kept
from nmconv.algebra.im2col import columns_of, patches
from nmconv.algebra.merged_conv import (
    channels_last,
    conv_module,
    filled,
    is_channels_last,
    is_finite,
    laid_out,
    like_of,
)
from nmconv.algebra.module_affine import affine_in_double, affine_of, doubled, has_plain_parameter
from nmconv.algebra.module_geometry import (
    BEFORE,
    PADS,
    Padding,
    averages,
    before_hoisting,
    check_hooks,
    geometry_of,
    norm_of,
)
from nmconv.algebra.padding import is_known, pad

__all__ = [
    "BEFORE",
    "PADS",
    "Affine",
    "Geometry",
    "Padding",
    "Refusal",
    "Stage",
    "affine_in_double",
    "affine_of",
    "apply",
    "averages",
    "before_hoisting",
    "channels_last",
    "check_hooks",
    "columns_of",
    "compose",
    "composed",
    "conv_module",
    "doubled",
    "filled",
    "geometry_of",
    "has_plain_parameter",
    "hoisted",
    "identity",
    "is_channels_last",
    "is_finite",
    "is_known",
    "join",
    "joined",
    "laid_out",
    "like_of",
    "norm_of",
    "of_average",
    "of_identity",
    "pad",
    "patches",
    "shrunk",
    "taps_kept",
]
