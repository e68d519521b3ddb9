"""The arithmetic of convolutions: their extents, their composition, and modules as affine maps."""

from nmconv.algebra.affine import Affine, affine_of_average, affine_of_identity, apply_conv
from nmconv.algebra.affine_composition import add_affines, compose
from nmconv.algebra.conv_modules import conv_from_affine, conv_module, is_finite, reference_tensor
from nmconv.algebra.geometry import Geometry, Refusal, Stage, center_slices, identity_geometry, shrunk
from nmconv.algebra.geometry_composition import add_geometries, compose_geometries, hoisted
from nmconv.algebra.im2col import columns_of, patches
from nmconv.algebra.memory_layout import channels_last, in_memory_format, is_channels_last
from nmconv.algebra.module_affine import affine_in_double, affine_of, copy_in_float64, has_plain_parameter
from nmconv.algebra.module_geometry import (
    PADDED_GEOMETRY,
    PADDING_BEFORE_HOIST,
    Padding,
    before_hoisting,
    check_hooks,
    geometry_of,
    is_average_pool,
    scale_and_shift_of,
)
from nmconv.algebra.padding import pad

__all__ = [
    "PADDED_GEOMETRY",
    "PADDING_BEFORE_HOIST",
    "Affine",
    "Geometry",
    "Padding",
    "Refusal",
    "Stage",
    "add_affines",
    "add_geometries",
    "affine_in_double",
    "affine_of",
    "affine_of_average",
    "affine_of_identity",
    "apply_conv",
    "before_hoisting",
    "center_slices",
    "channels_last",
    "check_hooks",
    "columns_of",
    "compose",
    "compose_geometries",
    "conv_from_affine",
    "conv_module",
    "copy_in_float64",
    "geometry_of",
    "has_plain_parameter",
    "hoisted",
    "identity_geometry",
    "in_memory_format",
    "is_average_pool",
    "is_channels_last",
    "is_finite",
    "pad",
    "patches",
    "reference_tensor",
    "scale_and_shift_of",
    "shrunk",
]
