"""Holding any result against the model it was made from, on demand."""

from __future__ import annotations

from typing import Any

from torch import nn

from nmconv.errors import PlanError
from nmconv.merging import get_merges, groups_of
from nmconv.surgery import Witness, check_examples, check_plain, get_plan, resolve_plan

__all__ = ["verify"]


def verify(original: nn.Module, result: nn.Module, example_inputs: Any = None) -> None:
    """Check that a model does what another one does, less what its plan and its merges say.

    Both are recorded on the meta device: in eval and in train mode, at two sizes, and without gradients or under
    autocast where their code asks for that. Compared are every operation, the module whose forward makes it, its
    settings and constants, and what it reads; not the weights. It is the comparison that :func:`nmconv.convert`,
    ``merge``, ``fit`` and ``load`` make of their own results.

    Args:
        original: As it was before it was converted, merged or fitted, or as it was in between.
        result: What became of it; of any weights, dtype and device.
        example_inputs: What both are called with: a tensor, a tuple of arguments or a dict of keyword arguments. None:
            what the model's family states, or one image batch.

    Raises:
        WitnessError: If ``result`` does anything else; it names the first difference and the module that makes it.
        PlanError: If ``original`` was converted by another plan than ``result``, or merged where that was not.
        OptionError: If ``original`` cannot be called with ``example_inputs``.
        ModelTypeError: If one of them is no module, or wrapped, compiled or scripted.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> nmconv.verify(net, nmconv.convert(net, "2:1"))
    """
    check_plain(original, "compare with")
    check_plain(result, "verify")
    check_examples(example_inputs)
    before, plan = get_plan(original), get_plan(result)
    if before is not None and before != plan:
        raise PlanError("the original was converted by another plan than the result: give what that was made from")
    rounds, earlier = get_merges(result), get_merges(original)
    if rounds[: len(earlier)] != earlier:
        raise PlanError("the original was merged otherwise than the result: give what that was made from")
    merges = [merge for merges in rounds for merge in merges]
    closed = {name for merge in merges for name in merge.closed}
    witness = Witness(original, example_inputs, call=None if plan is None else plan.call)
    changes = None if plan is None or before is not None else resolve_plan(original, plan, witness.recordings).changes
    witness.check(result, changes, groups_of(*rounds), closed)
