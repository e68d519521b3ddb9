"""The arithmetic of convolutions: their extents, their composition, and modules as affine maps."""

from nmconv.algebra.affine import Affine, apply, of_average, of_identity
from nmconv.algebra.affine_composition import compose, join
from nmconv.algebra.conv_modules import conv_module, filled, is_finite, like_of
from nmconv.algebra.geometry import Geometry, Refusal, Stage, identity, shrunk, taps_kept
from nmconv.algebra.geometry_composition import composed, hoisted, joined
from nmconv.algebra.im2col import columns_of, patches
from nmconv.algebra.memory_layout import channels_last, is_channels_last, laid_out
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
from nmconv.algebra.padding import pad

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
