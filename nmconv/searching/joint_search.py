"""The search: choose by the table, measure the choice as a whole, correct the table, and choose again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nmconv.errors import OptionError
from nmconv.fitting import Loss, fit, get_fit
from nmconv.merging import get_merges, merged_groups
from nmconv.observing import Images
from nmconv.planning import Plan
from nmconv.searching.budget import Budget
from nmconv.searching.cost import Stopwatch, multiply_adds_of
from nmconv.searching.pareto import Option, choose, frontier
from nmconv.searching.search_space import SearchSpace
from nmconv.searching.segments import CandidateSegment
from nmconv.searching.table import Candidate, Sensitivity
from nmconv.surgery import Witness, resolve_plan

__all__ = ["JointSearch", "MeasuredChoice"]

_TOLERANCE = 1.01  # latencies this close to the budget count as within it: timing noise is larger
_MAX_INCREASE = 1.5  # factor of the required savings from one round to the next
_ROUNDING = 1e-12  # relative


@dataclass(frozen=True)
class MeasuredChoice:
    """A set of candidates, fitted and measured as a whole.

    Attributes:
        chosen: Indices of the candidates.
        plan: The plan that makes all of them linear.
        loss: Divergence of the fitted model.
        cost: Its cost, in the cost's unit.
    """

    chosen: tuple[int, ...]
    plan: Plan
    loss: float
    cost: float


class JointSearch:
    """Search the sets of a model's candidates.

    Args:
        space: The model's search space.
        images: The images, some of them held out.
        table: The measurements of all candidates.
        cost: The kind of cost, one of :data:`nmconv.searching.table.COSTS`.
        backend: Where latency is measured.
        loss: As for :func:`nmconv.search`.
        rounds: As for :func:`nmconv.search`.

    Raises:
        OptionError: If the table lacks the kind of cost.
    """

    def __init__(
        self,
        space: SearchSpace,
        images: Images,
        table: Sensitivity,
        cost: str,
        backend: str,
        loss: Loss | None,
        rounds: int,
    ) -> None:
        self._space, self._images, self._table = space, images, table
        self._cost, self._loss, self._rounds = cost, loss, rounds
        self._segments = {(one.convs, one.residual is not None): one for one in space.segments}
        self._candidates = [one for one in table.candidates if one.saves(cost) > 0 and self._segment(one) is not None]
        self._watch = Stopwatch(space, images.first(), backend) if cost == "latency" else None
        self._total = table.totals[cost]
        self._unchanged_loss = table.totals.get("loss", 0.0)
        if math.isnan(self._total):
            raise OptionError(f"the sensitivity table has no {cost}: measure it with nmconv.sensitivity(backend=...)")
        self._measured: dict[tuple[int, ...], MeasuredChoice] = {}
        first = images.first()
        self._witness = Witness(space.model, torch.cat([first, first]), options=())

    def plans(self, budgets: Sequence[Budget]) -> tuple[Plan, ...]:
        """Return the best plan within each budget, of all choices that were measured for any of them.

        Raises:
            OptionError: If a budget cannot be met; before anything is fitted, if the table already shows that.
        """
        most = frontier(self._options(self._losses()))[-1][1]
        for budget in budgets:
            if most < (self._total - budget.of(self._total)) * (1 - _ROUNDING):
                raise OptionError(self._out_of_reach(budget, most))
        for budget in budgets:
            self._explore(budget)
        return tuple(self._best(budget) for budget in budgets)

    def plan_of(self, chosen: Sequence[int]) -> Plan:
        """Return the plan that makes some candidates linear."""
        parts = []
        for index in chosen:
            candidate = self._candidates[index]
            segment = self._segment(candidate)
            assert segment is not None
            parts.append((segment, "" if candidate.size == "none" else candidate.size))
        return self._space.plan_of(parts)

    def _segment(self, candidate: Candidate) -> CandidateSegment | None:
        return self._segments.get((candidate.convs, candidate.size == "none"))

    def _losses(self) -> dict[int, float]:
        return {index: self._added_loss(one.loss) for index, one in enumerate(self._candidates)}

    def _added_loss(self, loss: float) -> float:
        return max(loss - self._unchanged_loss, 0.0)

    def _options(self, losses: dict[int, float]) -> list[Option]:
        return [
            Option(one.first, one.last, losses[index], one.saves(self._cost))
            for index, one in enumerate(self._candidates)
        ]

    def _is_within(self, choice: MeasuredChoice, budget: Budget) -> bool:
        return choice.cost <= budget.of(self._total) * _TOLERANCE

    def _explore(self, budget: Budget) -> None:
        """Measure choices as a whole, for one budget.

        Losses and savings are not quite additive. After each measurement, the candidates' losses are scaled to the
        measured loss, and the required savings by the predicted savings over the measured ones.

        Raises:
            OptionError: If no measured choice is within the budget.
        """
        losses = self._losses()
        wanted = needed = self._total - budget.of(self._total)
        tried: list[MeasuredChoice] = []
        for number in range(2 * self._rounds):
            if number >= self._rounds and any(self._is_within(choice, budget) for choice in tried):
                break
            options = self._options(losses)
            front = frontier(options)
            chosen = choose(front, min(needed, front[-1][1]))
            assert chosen is not None
            if chosen in [choice.chosen for choice in tried]:
                break
            if chosen not in self._measured:
                self._measured[chosen] = self._measure(chosen)
            choice = self._measured[chosen]
            tried.append(choice)
            _scale_losses(losses, chosen, self._added_loss(choice.loss))
            # The increase is limited, since a disturbed timing may show any saving, or none.
            predicted, saved = sum(options[index].saves for index in chosen), self._total - choice.cost
            needed = predicted * min(wanted / saved, _MAX_INCREASE) if saved > 0 else predicted * _MAX_INCREASE
        if not any(self._is_within(choice, budget) for choice in self._measured.values()):
            least = min(choice.cost for choice in tried) / self._total
            raise OptionError(
                f"budget={budget.value!r}: the best of {len(tried)} choices that were measured reached {least:.3f} of "
                f"the {self._cost}: give that as budget, or more rounds than {self._rounds}"
            )

    def _measure(self, chosen: tuple[int, ...]) -> MeasuredChoice:
        """Fit a choice as a whole and measure its loss and cost."""
        original = self._space.model
        plan = self.plan_of(chosen)
        if not chosen:
            return MeasuredChoice(chosen, plan, self._unchanged_loss, self._total)
        converted = self._space.converted(plan)
        model = fit(converted, self._images, reference=original, loss=self._loss, witness=False)
        changes = resolve_plan(original, plan, self._witness.recordings).changes
        self._witness.check(model, changes, merged_groups(*get_merges(model)))
        report = get_fit(model)
        assert report is not None
        if self._watch is not None:
            cost = self._total / self._watch.speedup(original, model)
        elif self._cost == "multiply_adds":
            cost = float(multiply_adds_of(model, self._images.first()))
        else:
            cost = self._total - sum(self._candidates[index].saves(self._cost) for index in chosen)
        return MeasuredChoice(chosen, plan, report.returned.loss, cost)

    def _best(self, budget: Budget) -> Plan:
        """Return the plan of the best choice within a budget, with what it reached among its options."""
        within = (choice for choice in self._measured.values() if self._is_within(choice, budget))
        best = min(within, key=lambda choice: (choice.loss, choice.cost))
        options = (
            *best.plan.options,
            ("search", f"{self._cost} {budget.text()}"),
            ("reached", f"{best.cost / self._total:.4f}"),
            ("loss", f"{best.loss:.6g}"),
        )
        of = "of its" if budget.is_fraction else "of"
        return replace(best.plan, ratio=f"{budget.text()} {of} {self._cost}", options=options)

    def _out_of_reach(self, budget: Budget, most: float) -> str:
        least, unit = self._total - most, "seconds of latency" if self._cost == "latency" else self._cost
        return (
            f"budget={budget.value!r}: this network can be brought to {least:.4g} of {self._total:.4g} {unit}, that is "
            f"{least / self._total:.3f} of it, and no lower: give at least that"
        )


def _scale_losses(losses: dict[int, float], chosen: tuple[int, ...], measured: float) -> None:
    """Scale the losses of a choice's candidates so that they add up to the loss measured for the whole."""
    expected = sum(losses[index] for index in chosen)
    for index in chosen:
        losses[index] = losses[index] * measured / expected if expected > 0 else measured / len(chosen)
