"""What nmconv knows of a plan's sites besides what the plan says: how each call is made in a model."""

from typing import Any

from torch import nn

import nmconv
from nmconv.finding import read
from nmconv.flow import recordings_of
from nmconv.planning import Activation


def calls_of(model: nn.Module, plan: nmconv.Plan, example_inputs: Any = None) -> dict[str, Activation]:
    """From the id of every site to the call, as the analysis of the model finds it anew."""
    recordings = recordings_of(model, example_inputs, both_sizes=False, linear=plan.linear, call=plan.call)
    return {call.id: call for call in read(model, recordings, linear=plan.linear).activations}
