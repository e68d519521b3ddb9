"""Reading models: from an ``nn.Module`` to chains of convolutions and their activations. Changes nothing."""

from nmconv.graph._analysis import Called, act_calls
from nmconv.graph._fingerprint import fingerprint
from nmconv.graph._method import MethodTrace, trace_method
from nmconv.graph._modules import act_kind, is_activation, is_sequential
from nmconv.graph._ops import PLAIN_ACTS
from nmconv.graph._quiet import mode_hidden
from nmconv.graph._structure import Reading, read
from nmconv.graph._tracer import FlowTracer

__all__ = [
    "PLAIN_ACTS",
    "Called",
    "FlowTracer",
    "MethodTrace",
    "Reading",
    "act_calls",
    "act_kind",
    "fingerprint",
    "is_activation",
    "is_sequential",
    "mode_hidden",
    "read",
    "trace_method",
]
