"""Which units lose their activations: the least loss under a budget, by measurement."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nmconv.deprecation import renamed_arguments
from nmconv.errors import FileError, OptionError
from nmconv.fitting import Images, Loss, check_takes, eval_mode, fit, get_fit, read_images
from nmconv.merging import get_merges, groups_of
from nmconv.planning import Plan
from nmconv.searching.budget import Budget, budgets_of, several
from nmconv.searching.candidates import CandidateSegment, SearchSpace
from nmconv.searching.cost import Stopwatch, multiply_adds_of
from nmconv.searching.measure_candidates import check_options, check_setting, measured, setting_of
from nmconv.searching.pareto import Option, choose, frontier
from nmconv.searching.table import COSTS, Candidate, Sensitivity
from nmconv.surgery import Witness, check_model, resolve_plan

__all__ = ["search"]

_SAME = 1.01  # latencies this close to the budget are within it: the machine's noise is larger
_STEP = 1.5  # times as much saving as before is asked for at most, where what was chosen did not save enough


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
    """Choose what of a network becomes linear, and what kernel it becomes, by measurement.

    Every candidate is measured alone (:func:`nmconv.sensitivity`). The choice with the least total loss that meets the
    budget is found exactly, by dynamic programming; then it is fitted and measured as a whole, the losses of its
    candidates are corrected by what was measured, and the best is chosen again. Of all that was measured and meets the
    budget, the best is returned.

    Args:
        model: Not converted; it is not changed.
        data: A tensor ``[images, ...]``, or a loader or iterable of tensors, of (x, y) pairs or of dicts. No labels.
        budget: What is left of the original's cost: a fraction (up to 1.0, which is all of it), an absolute figure
            from the whole number 1 on (seconds, for latency), or a time with its unit (``"8 ms"``, ``"800 us"``,
            ``"0.1 s"``), against the latency that the table has for the original. Several, for several plans from one
            table: each the best of all that was measured for any of them.
        cost: ``"latency"`` (of one image, on ``backend``), ``"multiply_adds"``, ``"activations"`` (layers: rounds of
            private inference) or ``"activation_elements"``.
        backend: Where latency is measured: ``"eager"``, ``"compile"``, ``"frozen"`` or ``"onnxruntime"``.
        sensitivity: A table of this network; measured if not given.
        form: ``"merged"``: one convolution in a segment's place; ``"factors"``: its convolutions stay, and keep their
            keys. By default merged, and factors where activations are what costs.
        rounds: How often a choice is measured as a whole; up to twice as often where none has met the budget.
        max_convs: Longest segment, in convolutions.
        holdout: Which part of the images is held out; losses are measured on it.
        loss: As for :func:`nmconv.sensitivity`.
        key: Where batches are dicts: under which key the images are.
        path: A file that the table is kept in while it is measured.
        quiet: Whether to show no progress bar.

    Returns:
        A plan for :func:`nmconv.apply_plan` and :func:`nmconv.fit`, with what was reached among its ``options``; for
        several budgets a tuple of plans in their order.

    Raises:
        OptionError: For an option that is none, or a budget that cannot be met; the text says what can.
        FitError: If the network does not take the images.
        FileError: If the table is another network's.
        NoSitesError: If nothing of the network can become linear.
    """
    check_model(model)
    if cost not in COSTS:
        raise OptionError(f"cost={cost!r}: give one of {', '.join(COSTS)}")
    if form is None:
        given = None if sensitivity is None else sensitivity.setting.get("form")
        form = given or ("factors" if cost.startswith("activation") else "merged")
    check_options(form, backend, max_convs, holdout, loss)
    if cost in ("latency", "multiply_adds") and form == "factors":
        raise OptionError(f'form="factors" saves no {cost}: its convolutions stay; give form="merged"')
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise OptionError(f"rounds={rounds!r}: give a positive whole number, such as 3")
    budgets = budgets_of(budget, cost)
    pictures = read_images(data, model, holdout=holdout, key=key)
    with eval_mode(model):
        check_takes(model, pictures)
        network = SearchSpace(model, pictures.first(), max_convs)
        timed = backend if cost == "latency" else None
        if sensitivity is not None:
            _check_table(sensitivity, network, setting_of(network, pictures.first(), form, timed, loss))
        table = sensitivity or measured(network, pictures, form, timed, loss, path, quiet)
        found = _Search(network, pictures, table, cost, backend, loss, rounds)
        plans = found.plans(budgets)
    return plans if several(budget) else plans[0]


def _check_table(table: Sensitivity, network: SearchSpace, asked: dict[str, str]) -> None:
    """Refuse numbers of something else. Other images of the same shape will do, and so will longer segments."""
    if table.fingerprint != network.plan.fingerprint or not table.complete:
        raise FileError(
            f"the sensitivity table is of a {table.model} with fingerprint {table.fingerprint}"
            f"{'' if table.complete else ', and not complete'}: measure this network with nmconv.sensitivity"
        )
    if "None" in (asked["backend"], table.setting.get("backend")):  # times are not needed, or missed later
        asked = {name: value for name, value in asked.items() if name != "backend"}
    check_setting(table, asked, "the sensitivity table", "measure anew, or search as it was measured")


@dataclass(frozen=True)
class _Whole:
    """A choice that was measured as a whole."""

    chosen: tuple[int, ...]
    plan: Plan
    loss: float
    cost: float


class _Search:
    """Choices of one network's candidates."""

    def __init__(
        self,
        network: SearchSpace,
        images: Images,
        table: Sensitivity,
        cost: str,
        backend: str,
        loss: Loss | None,
        rounds: int,
    ) -> None:
        self._network, self._images, self._table = network, images, table
        self._cost, self._loss, self._rounds = cost, loss, rounds
        self._segments = {(part.convs, part.residual is not None): part for part in network.segments}
        self._candidates = [one for one in table.candidates if one.saves(cost) > 0 and self._segment(one) is not None]
        self._watch = Stopwatch(network, images.first(), backend) if cost == "latency" else None
        self._total = table.totals[cost]
        self._floor = table.totals.get("loss", 0.0)
        if math.isnan(self._total):
            raise OptionError(f"the sensitivity table has no {cost}: measure it with nmconv.sensitivity(backend=...)")
        self._known: dict[tuple[int, ...], _Whole] = {}
        first = images.first()
        self._witness = Witness(network.model, torch.cat([first, first]))

    def plans(self, budgets: Sequence[Budget]) -> tuple[Plan, ...]:
        """The best plan within each budget, of all that was measured for any of them.

        Raises:
            OptionError: If there is none within one of them: by what the table promises, before anything is fitted.
        """
        most = frontier(self._options(self._losses()))[-1][1]
        for budget in budgets:
            if most < (self._total - budget.of(self._total)) * (1 - 1e-12):
                raise OptionError(self._cannot(budget, most))
        for budget in budgets:
            self._explore(budget)
        return tuple(self._best(budget) for budget in budgets)

    def _losses(self) -> dict[int, float]:
        return {at: max(one.loss - self._floor, 0.0) for at, one in enumerate(self._candidates)}

    def _options(self, losses: dict[int, float]) -> list[Option]:
        return [
            Option(one.first, one.last, losses[at], one.saves(self._cost)) for at, one in enumerate(self._candidates)
        ]

    def _explore(self, budget: Budget) -> None:
        """Measure choices within a budget as a whole.

        Raises:
            OptionError: If none of them is within it.
        """
        allowed = budget.of(self._total)
        losses = self._losses()
        wanted = needed = self._total - allowed
        tried: list[_Whole] = []
        for number in range(2 * self._rounds):
            if number >= self._rounds and any(whole.cost <= allowed * _SAME for whole in tried):
                break
            options = self._options(losses)
            front = frontier(options)
            chosen = choose(front, min(needed, front[-1][1]))
            assert chosen is not None
            if chosen in [whole.chosen for whole in tried]:
                break
            if chosen not in self._known:
                self._known[chosen] = self._measure(chosen)
            whole = self._known[chosen]
            tried.append(whole)
            _correct(losses, whole.chosen, max(whole.loss - self._floor, 0.0))
            # Savings do not quite add up: as much more is asked for as was promised too much; by steps, since a
            # disturbed timing may show any saving, or none.
            promised, saved = sum(options[at].saves for at in chosen), self._total - whole.cost
            needed = promised * min(wanted / saved, _STEP) if saved > 0 else promised * _STEP
        if not any(whole.cost <= allowed * _SAME for whole in self._known.values()):
            least = min(whole.cost for whole in tried) / self._total
            raise OptionError(
                f"budget={budget.given!r}: the best of {len(tried)} choices that were measured came to {least:.3f} of "
                f"its {self._cost}: give that as budget, or more rounds than {self._rounds}"
            )

    def _best(self, budget: Budget) -> Plan:
        allowed = budget.of(self._total)
        within = (whole for whole in self._known.values() if whole.cost <= allowed * _SAME)
        return self._told(min(within, key=lambda whole: (whole.loss, whole.cost)), budget)

    def _segment(self, one: Candidate) -> CandidateSegment | None:
        return self._segments.get((one.convs, one.size == "none"))

    def plan_of(self, chosen: Sequence[int]) -> Plan:
        """The plan that does what some candidates say."""
        parts = []
        for at in chosen:
            one = self._candidates[at]
            segment = self._segment(one)
            assert segment is not None
            parts.append((segment, "" if one.size == "none" else one.size))
        return self._network.plan_of(parts)

    def _measure(self, chosen: tuple[int, ...]) -> _Whole:
        """Fit a choice as a whole."""
        net = self._network.model
        plan = self.plan_of(chosen)
        if not chosen:
            return _Whole(chosen, plan, self._floor, self._total)
        model = fit(self._network.converted(plan), self._images, reference=net, loss=self._loss, witness=False)
        changes = resolve_plan(net, plan, self._witness.recordings).changes
        self._witness.check(model, changes, groups_of(*get_merges(model)))
        report = get_fit(model)
        assert report is not None
        if self._watch is not None:
            cost = self._total / self._watch.faster(net, model)
        elif self._cost == "multiply_adds":
            cost = float(multiply_adds_of(model, self._images.first()))
        else:
            cost = self._total - sum(self._candidates[at].saves(self._cost) for at in chosen)
        return _Whole(chosen, plan, report.returned.loss, cost)

    def _told(self, whole: _Whole, budget: Budget) -> Plan:
        options = (
            *whole.plan.options,
            ("search", f"{self._cost} {budget.named()}"),
            ("reached", f"{whole.cost / self._total:.4f}"),
            ("loss", f"{whole.loss:.6g}"),
        )
        of = "of its" if budget.part else "of"
        return replace(whole.plan, ratio=f"{budget.named()} {of} {self._cost}", options=options)

    def _cannot(self, budget: Budget, most: float) -> str:
        least, unit = self._total - most, "seconds of latency" if self._cost == "latency" else self._cost
        return (
            f"budget={budget.given!r}: this network can be brought to {least:.4g} of {self._total:.4g} {unit}, that is "
            f"{least / self._total:.3f} of it, and no lower"
        )


def _correct(losses: dict[int, float], chosen: tuple[int, ...], lost: float) -> None:
    """Losses do not add up: those of a choice are scaled to what it lost as a whole."""
    expected = sum(losses[at] for at in chosen)
    for at in chosen:
        losses[at] = losses[at] * lost / expected if expected > 0 else lost / len(chosen)
