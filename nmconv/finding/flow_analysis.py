"""Lower a model's recordings to flows, and analyze a flow: gates, parallel branches, chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nmconv.finding.chains import Ownership, find_chains
from nmconv.flow import Flow, fold_parallel, lower, must_copy, record_model, resolve_gates
from nmconv.recording import Recordings

__all__ = ["AnalyzedFlow", "analyze", "eval_flows", "flows_of"]


@dataclass(eq=False)
class AnalyzedFlow:
    """A flow with gates resolved, parallel branches folded and chains found.

    Attributes:
        flow: The flow.
        ownership: Its chains.
        copies: Indices of activations whose replacement must copy its input, or two readers would share memory.
    """

    flow: Flow
    ownership: Ownership
    copies: set[int]


def flows_of(model: nn.Module, recordings: Recordings, *, training: bool = False, linear: bool = False) -> list[Flow]:
    """Return the flow of a model in one mode; if it does not run in that mode, the flows of the parts that do.

    Args:
        model: The model that was recorded.
        recordings: Its recordings.
        training: Whether the mode is train mode.
        linear: Whether linear layers count as convolutions.
    """
    return [lower(model, run, linear=linear) for run in recordings.of_mode(training=training)]


def eval_flows(model: nn.Module, example_inputs: Any) -> list[Flow]:
    """Record a model and return its flows in eval mode.

    Args:
        model: Not modified.
        example_inputs: What the model is called with, or None; only structure and shapes are used.
    """
    return flows_of(model, record_model(model, example_inputs, both_sizes=False))


def analyze(flow: Flow) -> AnalyzedFlow:
    """Find the chains of a flow, which is modified in place."""
    resolve_gates(flow)
    copies = must_copy(flow)
    fold_parallel(flow)
    return AnalyzedFlow(flow, find_chains(flow), copies)
