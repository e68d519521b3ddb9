"""Reading models: from an ``nn.Module`` to chains of convolutions and their activations. Changes nothing."""

from nmconv.graph._analysis import Called, act_calls
from nmconv.graph._fingerprint import fingerprint
from nmconv.graph._geometry import BEFORE, PADS, Padding, before_hoisting, check_hooks, geometry_of, norm_of
from nmconv.graph._lower import is_inplace
from nmconv.graph._method import MethodTrace, trace_method
from nmconv.graph._modules import LEAF, THROUGH, act_kind, hooks_of, is_activation, is_sequential, leaf_op
from nmconv.graph._ops import PLAIN_ACTS, Op
from nmconv.graph._quiet import mode_hidden
from nmconv.graph._runs import Element, Join, LinearRun, Step, calls_by_kind, linear_runs, steps_of
from nmconv.graph._structure import Reading, read
from nmconv.graph._tracer import FlowTracer
from nmconv.graph._zoo import has_plain_weight, is_frozen_norm, is_norm_act, pads_same

__all__ = [
    "BEFORE",
    "LEAF",
    "PADS",
    "PLAIN_ACTS",
    "THROUGH",
    "Called",
    "Element",
    "FlowTracer",
    "Join",
    "LinearRun",
    "MethodTrace",
    "Op",
    "Padding",
    "Reading",
    "Step",
    "act_calls",
    "act_kind",
    "before_hoisting",
    "calls_by_kind",
    "check_hooks",
    "fingerprint",
    "geometry_of",
    "has_plain_weight",
    "hooks_of",
    "is_activation",
    "is_frozen_norm",
    "is_inplace",
    "is_norm_act",
    "is_sequential",
    "leaf_op",
    "linear_runs",
    "mode_hidden",
    "norm_of",
    "pads_same",
    "read",
    "steps_of",
    "trace_method",
]
