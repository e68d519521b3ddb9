"""What nmconv knows of a plan's sites besides what the plan says: how each call is made in a model."""

from typing import Any

from torch import nn

import nmconv
from nmconv.finding import structure_of
from nmconv.flow import record_model
from nmconv.planning import Activation


def calls_of(model: nn.Module, plan: nmconv.Plan, example_inputs: Any = None) -> dict[str, Activation]:
    """From the id of every site to the call, as the analysis of the model finds it anew."""
    recordings = record_model(model, example_inputs, both_sizes=False, linear=plan.linear, call=plan.call)
    return {call.id: call for call in structure_of(model, recordings, linear=plan.linear).activations}
