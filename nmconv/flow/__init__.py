"""The flow graph of a recording: every call classified, every value with its readers, gates, sums and dominators."""

from nmconv.flow.aliasing import must_copy, sums_must_copy
from nmconv.flow.arguments import (
    ATOMS,
    Arguments,
    UnknownNumber,
    argument_structure,
    containers,
    forward_argument_structures,
    map_leaves,
    parse_arguments,
)
from nmconv.flow.dominators import Dominators
from nmconv.flow.expressions import (
    Expression,
    Operation,
    expressions_in,
    expressions_of,
    is_elementwise,
    operation_of_module,
)
from nmconv.flow.flow_graph import ActCall, Flow, FlowNode, ModuleCall, ancestors
from nmconv.flow.gates import resolve_gates
from nmconv.flow.gradual_ops import GRADUAL, held, mixed, mixed_into
from nmconv.flow.leaves import LEAF, PASS_THROUGH, act_kind, hooks_of, is_activation, is_conv, is_sequential, leaf_op
from nmconv.flow.lowering import lower
from nmconv.flow.ops import ACT_KINDS, PLAIN_ACTS, SUMS, Op, is_inplace
from nmconv.flow.probed_modules import crop_of_module
from nmconv.flow.recordings import is_leaf, record_model, signature_of
from nmconv.flow.registry import register, registered_kind, registered_names
from nmconv.flow.sums import fold_parallel, summands
from nmconv.flow.zoo import ZOOS, builders, has_plain_weight, is_frozen_norm, is_norm_act, pads_same

__all__ = [
    "ACT_KINDS",
    "ATOMS",
    "GRADUAL",
    "LEAF",
    "PASS_THROUGH",
    "PLAIN_ACTS",
    "SUMS",
    "ZOOS",
    "ActCall",
    "Arguments",
    "Dominators",
    "Expression",
    "Flow",
    "FlowNode",
    "ModuleCall",
    "Op",
    "Operation",
    "UnknownNumber",
    "act_kind",
    "ancestors",
    "argument_structure",
    "builders",
    "containers",
    "crop_of_module",
    "expressions_in",
    "expressions_of",
    "fold_parallel",
    "forward_argument_structures",
    "has_plain_weight",
    "held",
    "hooks_of",
    "is_activation",
    "is_conv",
    "is_elementwise",
    "is_frozen_norm",
    "is_inplace",
    "is_leaf",
    "is_norm_act",
    "is_sequential",
    "leaf_op",
    "lower",
    "map_leaves",
    "mixed",
    "mixed_into",
    "must_copy",
    "operation_of_module",
    "pads_same",
    "parse_arguments",
    "record_model",
    "register",
    "registered_kind",
    "registered_names",
    "resolve_gates",
    "signature_of",
    "summands",
    "sums_must_copy",
]
