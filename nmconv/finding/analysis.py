"""A model's recordings understood: flows, and the chains in them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nmconv.finding.chains import Ownership, own
from nmconv.flow import Flow, fold_parallel, lower, must_copy, resolve_gates
from nmconv.recording import Recordings

__all__ = ["AnalyzedRecording", "Called", "flows_of", "understood"]

# Owner, name and kind of function of an activation call.
Called = tuple[str, str, "str | None"]


@dataclass(eq=False)
class AnalyzedRecording:
    """One recording, with gates resolved, parallel branches folded and chains found.

    Attributes:
        flow: Its flow.
        ownership: Its chains.
        copies: Activations that must leave a copy when they go.
    """

    flow: Flow
    ownership: Ownership
    copies: set[int]


def flows_of(model: nn.Module, recordings: Recordings, *, training: bool = False, linear: bool = False) -> list[Flow]:
    """The flows of a model in one mode, or of those parts of it that run alone.

    Args:
        model: What was recorded.
        recordings: Of it.
        training: The mode.
        linear: Whether linear layers count as convolutions.
    """
    return [lower(model, run, linear=linear) for run in recordings.of_mode(training=training)]


def understood(flow: Flow) -> AnalyzedRecording:
    """Find the chains of a flow; it is changed on the way."""
    resolve_gates(flow)
    copies = must_copy(flow)
    fold_parallel(flow)
    return AnalyzedRecording(flow, own(flow), copies)
