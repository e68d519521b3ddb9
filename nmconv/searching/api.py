"""The search for the activations to drop: the least loss under a budget, by measurement."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from nmconv.deprecation import renamed_arguments
from nmconv.errors import FileError, OptionError
from nmconv.fitting import Loss
from nmconv.observing import check_accepts, eval_mode, read_images
from nmconv.planning import Plan
from nmconv.searching.budget import budgets_of, is_several
from nmconv.searching.joint_search import JointSearch
from nmconv.searching.measure_candidates import check_options, measure_table
from nmconv.searching.search_space import SearchSpace
from nmconv.searching.table import Sensitivity, check_cost
from nmconv.searching.table_settings import check_settings, settings_of
from nmconv.surgery import check_model

__all__ = ["search"]


@renamed_arguments(net="model", images="data", most="max_convs")
def search(
    model: nn.Module,
    data: Any,
    *,
    budget: float | str | Iterable[float | str],
    cost: str = "latency",
    backend: str = "eager",
    sensitivity: Sensitivity | None = None,
    form: str | None = None,
    rounds: int = 3,
    max_convs: int = 6,
    holdout: float = 0.25,
    loss: Loss | None = None,
    key: str | None = None,
    path: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Plan | tuple[Plan, ...]:
    """Choose which parts of a model become linear, and with which kernel sizes, by measurement.

    Every candidate is measured alone (:func:`nmconv.sensitivity`). The choice with the least total loss that meets the
    budget is found exactly, by interval dynamic programming; then it is fitted and measured as a whole, its candidates'
    losses are corrected by the measurement, and the best choice is computed again. The best measured choice that meets
    the budget is returned.

    Args:
        model: A model that was not converted; it is not changed.
        data: A tensor ``[images, ...]``, or a loader or iterable of tensors, of (x, y) pairs or of dicts. Labels are
            not used.
        budget: How much of the original's cost may remain: a fraction (a float up to 1.0), an absolute number (whole
            numbers from 1 on, and all above 1; seconds, for latency), or a time with its unit (``"8 ms"``,
            ``"800 us"``, ``"0.1 s"``), compared with the original's latency in the table. Several, for several plans
            from one table: each is the best of all choices measured for any of them.
        cost: ``"latency"`` (of one image, on ``backend``), ``"multiply_adds"``, ``"activations"`` (layers: rounds of
            private inference) or ``"activation_elements"``.
        backend: Where latency is measured: ``"eager"``, ``"compile"``, ``"frozen"`` or ``"onnxruntime"``.
        sensitivity: A table of this model; measured if not given.
        form: ``"merged"``: one convolution replaces a segment; ``"factors"``: its convolutions stay and keep their
            keys. By default the table's form, else factors if the cost counts activations, else merged.
        rounds: How many choices are measured as a whole; up to twice as many while none meets the budget.
        max_convs: Longest segment, in convolutions.
        holdout: The fraction of the images that is held out; losses are measured on them.
        loss: As for :func:`nmconv.sensitivity`.
        key: Where batches are dicts: the key of the images.
        path: A file that the table is saved to while it is measured.
        quiet: Whether to show no progress bar.

    Returns:
        A plan for :func:`nmconv.apply_plan` and :func:`nmconv.fit`, with the cost and loss reached among its
        ``options``; for several budgets a tuple of plans in their order.

    Raises:
        OptionError: If an option is invalid, or a budget cannot be met; the message says which can.
        FitError: If the model does not accept the images.
        FileError: If the table belongs to another model or other settings.
        NoSitesError: If no activation of the model can be dropped.
        ModelTypeError: If ``model`` is not a module, or is wrapped, compiled or scripted.

    Example:
        >>> import torch, nmconv
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> layers = [(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU()) for c in (3, 8, 8)]
        >>> net = nn.Sequential(*(module for layer in layers for module in layer)).eval()
        >>> images = torch.randn(16, 3, 8, 8)
        >>> plan = nmconv.search(net, images, budget=0.9, cost="multiply_adds", quiet=True)
        >>> fitted = nmconv.fit(nmconv.apply_plan(net, plan), images, reference=net)
        >>> plan.ratio, sum(isinstance(module, nn.Conv2d) for module in fitted.modules())
        ('0.9 of its multiply_adds', 2)
    """
    check_model(model, "search")
    check_cost(cost)
    if sensitivity is not None and not isinstance(sensitivity, Sensitivity):
        what = type(sensitivity).__name__
        raise OptionError(f"sensitivity is a {what}: give what nmconv.sensitivity or Sensitivity.load returned")
    if form is None:
        form_of_table = None if sensitivity is None else sensitivity.setting.get("form")
        form = form_of_table or ("factors" if cost.startswith("activation") else "merged")
    check_options(form, backend, max_convs, holdout, loss)
    if cost in ("latency", "multiply_adds") and form == "factors":
        raise OptionError(f'form="factors" saves no {cost}: its convolutions stay; give form="merged"')
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise OptionError(f"rounds={rounds!r}: give a positive whole number, such as 3")
    budgets = budgets_of(budget, cost)
    images = read_images(data, model, holdout=holdout, key=key)
    with eval_mode(model):
        check_accepts(model, images)
        space = SearchSpace(model, images.first(), max_convs)
        timed = backend if cost == "latency" else None
        if sensitivity is not None:
            _check_table(sensitivity, space, settings_of(space, images.first(), form, timed, loss))
        table = sensitivity or measure_table(space, images, form, timed, loss, path, quiet)
        plans = JointSearch(space, images, table, cost, backend, loss, rounds).plans(budgets)
    return plans if is_several(budget) else plans[0]


def _check_table(table: Sensitivity, space: SearchSpace, settings: dict[str, str]) -> None:
    """Raise FileError if a table is incomplete, or belongs to another model or other settings.

    Other images of the same shape are accepted, and so are longer segments.
    """
    if table.fingerprint != space.plan.fingerprint:
        raise FileError(
            f"the sensitivity table is of a {table.model} with fingerprint {table.fingerprint}, not of this "
            f"{space.plan.model} with {space.plan.fingerprint}: measure this one with nmconv.sensitivity"
        )
    if not table.complete:
        raise FileError("the sensitivity table is incomplete: resume nmconv.sensitivity with the same path")
    # Without latency, the backend does not matter; if the table lacks latencies, JointSearch says so.
    if "None" in (settings["backend"], table.setting.get("backend")):
        settings = {name: value for name, value in settings.items() if name != "backend"}
    check_settings(table, settings, "the sensitivity table", "measure again, or search with that setting")
