"""Checks on what the user gives to a merge, before anything is looked at."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from nmconv.errors import MergeError, OptionError
from nmconv.surgery import check_examples, check_finished, check_has_run, check_plain
from nmconv.timing import BACKENDS

__all__ = ["check_made", "check_mode", "check_options"]

_GATES = ("flops", "latency", "always")


def check_options(gate: str, min_gain: float, backend: str, example_inputs: Any) -> None:
    """Refuse what is none, with OptionError."""
    if gate not in _GATES:
        raise OptionError(f"gate={gate!r}: give one of {', '.join(_GATES)}")
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r}: give one of {', '.join(BACKENDS)}")
    if isinstance(min_gain, bool) or not isinstance(min_gain, (int, float)) or not 0 < min_gain < math.inf:
        raise OptionError(f"min_gain={min_gain!r}: give a positive number, such as 1.05")
    if gate == "latency" and example_inputs is None:
        raise OptionError('gate="latency" times on example_inputs: give what the model is called with')
    check_examples(example_inputs)


def check_made(model: nn.Module, todo: str) -> None:
    """Refuse what is no plain model, or has lazy modules that never ran, with ModelTypeError.

    And what is gradual, with MergeError.
    """
    check_plain(model, todo)
    check_has_run(model)
    check_finished(model, MergeError)


def check_mode(model: nn.Module, todo: str) -> None:
    """The same, and refuse train mode, with MergeError."""
    check_made(model, todo)
    if model.training:
        raise MergeError(
            f"this {type(model).__name__} is in train mode, where norms depend on the batch: call model.eval() first"
        )
