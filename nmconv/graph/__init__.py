"""Reading models: from an ``nn.Module`` to chains of convolutions and their activations. Changes nothing."""

from nmconv.graph._analysis import Called, flows_of
from nmconv.graph._branches import Residual, copied_sums, residuals
from nmconv.graph._call import signature_of
from nmconv.graph._choices import chosen_by
from nmconv.graph._elements import (
    Element,
    Join,
    LinearRun,
    Step,
    elements_from,
    steps_of,
    takes_in,
    text_of,
    without_end,
)
from nmconv.graph._expressions import Expression, expressions_of
from nmconv.graph._fingerprint import fingerprint
from nmconv.graph._flow import Flow
from nmconv.graph._geometry import BEFORE, PADS, Padding, averages, before_hoisting, check_hooks, geometry_of, norm_of
from nmconv.graph._method import Method, MethodTrace, trace_methods
from nmconv.graph._mixing import GRADUAL, held, mixed, mixed_into
from nmconv.graph._modules import LEAF, THROUGH, act_kind, hooks_of, is_activation, is_sequential, leaf_op
from nmconv.graph._ops import PLAIN_ACTS, Op, is_inplace
from nmconv.graph._recordings import inputs_of, is_leaf, recordings_of
from nmconv.graph._records import UnknownNumber
from nmconv.graph._register import Registration, register, registered_names
from nmconv.graph._runs import linear_runs
from nmconv.graph._shapes import Shapes, shapes_of
from nmconv.graph._structure import read
from nmconv.graph._takes import takes_by_forward
from nmconv.graph._tracer import MethodTracer
from nmconv.graph._ways import NORM, SUM, Hop, Spot, Ways
from nmconv.graph._zoo import ZOOS, builders, has_plain_weight, is_frozen_norm, is_norm_act, pads_same

__all__ = [
    "BEFORE",
    "GRADUAL",
    "LEAF",
    "NORM",
    "PADS",
    "PLAIN_ACTS",
    "SUM",
    "THROUGH",
    "ZOOS",
    "Called",
    "Element",
    "Expression",
    "Flow",
    "Hop",
    "Join",
    "LinearRun",
    "Method",
    "MethodTrace",
    "MethodTracer",
    "Op",
    "Padding",
    "Registration",
    "Residual",
    "Shapes",
    "Spot",
    "Step",
    "UnknownNumber",
    "Ways",
    "act_kind",
    "averages",
    "before_hoisting",
    "builders",
    "check_hooks",
    "chosen_by",
    "copied_sums",
    "elements_from",
    "expressions_of",
    "fingerprint",
    "flows_of",
    "geometry_of",
    "has_plain_weight",
    "held",
    "hooks_of",
    "inputs_of",
    "is_activation",
    "is_frozen_norm",
    "is_inplace",
    "is_leaf",
    "is_norm_act",
    "is_sequential",
    "leaf_op",
    "linear_runs",
    "mixed",
    "mixed_into",
    "norm_of",
    "pads_same",
    "read",
    "recordings_of",
    "register",
    "registered_names",
    "residuals",
    "shapes_of",
    "signature_of",
    "steps_of",
    "takes_by_forward",
    "takes_in",
    "text_of",
    "trace_methods",
    "without_end",
]
