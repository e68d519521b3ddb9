"""Methods traced with torch.fx, on a copy: the starting point of rewriting them."""

from nmconv.tracing.methods import MethodSpec, MethodTrace, trace_methods
from nmconv.tracing.tracer import MethodTracer

__all__ = ["MethodSpec", "MethodTrace", "MethodTracer", "trace_methods"]
