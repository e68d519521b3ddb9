"""Comparing a changed model with the model that it was made from."""

from __future__ import annotations

from typing import Any

from torch import nn

from nmconv.errors import PlanError
from nmconv.merging import get_merges, merged_groups
from nmconv.surgery import Witness, check_examples, check_plain, get_plan, resolve_plan

__all__ = ["verify"]


def verify(original: nn.Module, result: nn.Module, example_inputs: Any = None) -> None:
    """Check that a changed model computes what the original does, apart from what its plan and merges say.

    Both models are recorded on the meta device: in eval and in train mode, at two input sizes, and without gradients
    or under autocast where their code asks for that. The comparison covers each operation, the module whose forward
    makes it, its settings and constants, and its inputs, but not the weights. :func:`nmconv.convert`, ``merge``,
    ``fit`` and ``load`` make the same comparison on their own results.

    Args:
        original: The model before it was converted, merged or fitted, or at a stage in between.
        result: The changed model, with any weights, dtype and device.
        example_inputs: What both models are called with: a tensor, a tuple of arguments or a dict of keyword arguments.
            None: what the model family's configuration states, or one image batch.

    Raises:
        WitnessError: If ``result`` differs in any other way; names the first difference and the module that makes it.
        PlanError: If ``original`` was converted by another plan than ``result``, or has merges that ``result`` lacks.
        OptionError: If ``original`` cannot be called with ``example_inputs``.
        ModelTypeError: If one of the two is not a module, or is wrapped, compiled or scripted.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> nmconv.verify(model, nmconv.convert(model, "2:1"))
    """
    check_plain(original, "compare with")
    check_plain(result, "verify")
    check_examples(example_inputs)
    original_plan, plan = get_plan(original), get_plan(result)
    if original_plan is not None and original_plan != plan:
        raise PlanError("original was converted by another plan than result: pass the model that result was made from")
    original_rounds, rounds = get_merges(original), get_merges(result)
    if rounds[: len(original_rounds)] != original_rounds:
        raise PlanError("original was merged differently from result: pass the model that result was made from")
    closed_methods = {name for merges in rounds for merge in merges for name in merge.closed}
    witness = Witness(original, example_inputs, call=None if plan is None else plan.call, options=())
    changes = None
    if plan is not None and original_plan is None:
        changes = resolve_plan(original, plan, witness.recordings, "pass the model that result was made from").changes
    witness.check(result, changes, merged_groups(*rounds), closed_methods)
