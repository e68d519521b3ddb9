"""What is fitted: the linear runs in which an activation was dropped, and where their targets are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import nn

from nmconv.errors import FitError
from nmconv.finding import DefUse, Element, Join, ValueLocation, linear_runs, steps_of, without_end
from nmconv.fitting.missing_additions import MissingAdditions
from nmconv.planning import Kernel, Plan, Site, Sum

__all__ = ["FitTask", "FitTasks", "left_out"]


Act: TypeAlias = "tuple[tuple[str, str, str | None], int]"  # who calls it, its name and kind; which call of it


@dataclass(frozen=True)
class FitTask:
    """One fit.

    Attributes:
        elements: From the first convolution to the last norm.
        convs: Qualified names of its convolutions, in order of execution.
        head: Qualified name of the module that gets the unit's input.
        end: The unit's output, in the converted model.
        far: The sum that it ends in, in the converted model, or None.
        target: In the reference, the value at the end, or at the sum; behind it where its activation was dropped.
        kernel: What the plan says, or None.
        acts: The dropped activations that it makes up for beyond those inside: calls, as in the plan's sites.
    """

    elements: tuple[Element, ...]
    convs: tuple[str, ...]
    head: str
    end: ValueLocation
    far: ValueLocation | None
    target: ValueLocation
    kernel: Kernel | None
    acts: tuple[Act, ...] = ()

    @property
    def adders(self) -> set[str]:
        """Qualified names of the modules in whose forwards its sums and its end are counted."""
        return {spot.owner for spot in (self.end, self.far) if spot is not None} | set(_adders(self.elements))


class FitTasks:
    """All fits of a converted model.

    Args:
        model: Converted by ``plan``, not merged.
        reference: As it was before.
        plan: What was done.
        default: The kernel of units of which the plan names none; None to fit their last convolution alone.
        example_inputs: What both are called with; only structure and shapes are used.
        downstream: Whether to take in whatever comes after the first of them, too, to be fitted in factors form.

    Attributes:
        found: In order of execution.
        flags: By which the model goes another way inside of its linear runs, see :class:`nmconv.finding.LinearRun`.

    Raises:
        FitError: If the plan names kernels for convolutions that do not follow one another.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        plan: Plan,
        default: Kernel | None,
        example_inputs: Any,
        *,
        downstream: bool = False,
    ) -> None:
        self._model = model
        self._examples = example_inputs
        self._here, self._there = DefUse(model, example_inputs), DefUse(reference, example_inputs)
        self._dropped = {_act_of(site) for site in plan.sites if _is_gone(site)}
        self._sums = MissingAdditions(branch.sum for branch in plan.branches)
        self._run_of = {
            conv: number
            for number, run in enumerate(linear_runs(reference, example_inputs=example_inputs, sizes=False))
            for conv in _convs(run.elements)
        }
        self._runs = linear_runs(model, example_inputs=example_inputs, sizes=False)
        self.flags = tuple(dict.fromkeys(flag for run in self._runs for flag in run.flags))
        self.found = tuple(self._find(plan, default, downstream))

    def renewed(self, units: Iterable[FitTask], gone: Sequence[Sum]) -> list[FitTask]:
        """The same units after sums of the model are gone: those behind them in the same forward have other numbers."""
        units, before = list(units), self._sums
        self._sums = before.without(gone)
        changed = {one.owner for one in gone}
        if not any(changed & unit.adders for unit in units):
            return units
        in_reference = [before.in_reference(unit.elements) for unit in units]
        self._here = DefUse(self._model, self._examples)
        return [
            replace(self._unit(elements, unit.kernel), acts=unit.acts)
            for elements, unit in zip(in_reference, units, strict=True)
        ]

    def _find(self, plan: Plan, default: Kernel | None, downstream: bool) -> list[FitTask]:
        there, dropped = self._there, self._dropped
        kernels = {kernel.convs: kernel for kernel in plan.kernels}
        found: list[FitTask] = []
        for run in self._runs:
            for part, kernel in _parts(self._sums.in_reference(run.elements), kernels, there):
                unit = self._unit(part, kernel)
                if kernel is not None:
                    found.append(unit)
                    continue
                # What stands before it may have lost its activation where no unit could make up for that.
                read = {there.read_by(step) for step in steps_of(part) if step.kind == "conv" and ":" not in step.name}
                lost = (dropped & read) - {act for other in found for act in other.acts}
                lost |= dropped & set(_acts_inside(part, there))
                if unit.acts or lost or len({self._run_of.get(conv) for conv in unit.convs}) > 1:
                    unit = self._unit(part if default else _opened(part), default)
                    found.append(replace(unit, acts=(*unit.acts, *lost)))
                elif downstream and found:
                    found += [self._unit(piece, None) for piece, _ in _parts(_opened(part), {}, there)]
        missing = set(kernels) - {unit.convs for unit in found}
        if missing:
            names = ", ".join(min(missing))
            raise FitError(f"the plan names a kernel for {names}, which are not one linear run here, nor a part of one")
        return found

    def _unit(self, elements: tuple[Element, ...], kernel: Kernel | None) -> FitTask:
        """The fit of some elements, their sums numbered as in the reference."""
        here, there = self._here, self._there
        own = self._sums.in_model(elements)
        try:
            end, target = here.spot(own[-1]), there.spot(elements[-1])
            sums = [hop.spot for hop in here.after(own[-1]) if hop.kind == "sum"]
            hops = there.after(elements[-1])
        except KeyError as error:
            raise FitError(
                f"the reference makes no call {error.args[0]} that this model makes: give the model that was converted "
                "as it was before that"
            ) from error
        far: ValueLocation | None = None
        acts: tuple[Act, ...] = ()
        for hop in hops:
            if hop.kind == "sum":
                if not sums:
                    break
                far, target = sums.pop(0), hop.spot
            else:
                if hop.act is not None and hop.act in self._dropped:
                    target, acts = hop.spot, (hop.act,)
                break
        head = next(step.name for step in steps_of(own))
        return FitTask(own, _convs(own), head, end, far, target, kernel, acts)


def _adders(elements: Iterable[Element]) -> Iterator[str]:
    for element in elements:
        if isinstance(element, Join):
            yield element.owner
            for branch in element.branches:
                yield from _adders(branch)


def _acts_inside(elements: tuple[Element, ...], there: DefUse) -> Iterator[Act]:
    """The reference's activations right behind an element that is not the last."""
    for element in elements[:-1]:
        if element.quiet:
            continue
        with suppress(KeyError):  # a call that only the converted model makes
            yield from (hop.act for hop in there.after(element) if hop.act is not None)


def left_out(plan: Plan, units: Iterable[FitTask]) -> Iterator[Site]:
    """Dropped activations that no unit makes up for."""
    units = tuple(units)
    convs = {conv for unit in units for conv in unit.convs}
    acts = {act for unit in units for act in unit.acts}
    for site in plan.sites:
        is_lost = site.action == "drop" and site.modes != "train" and _act_of(site) not in acts
        if is_lost and site.convs and convs.isdisjoint(site.convs):
            yield site


def _is_gone(site: Site) -> bool:
    """Whether the call is not made any more where the reference makes it."""
    return site.action in ("drop", "move", "gone") and site.modes != "train"


def _act_of(site: Site) -> Act:
    return (site.owner, site.name, site.function), site.call


def _convs(elements: Iterable[Element]) -> tuple[str, ...]:
    return tuple(step.name for step in steps_of(elements) if step.kind == "conv")


def _parts(
    elements: tuple[Element, ...], kernels: Mapping[tuple[str, ...], Kernel], there: DefUse
) -> Iterator[tuple[tuple[Element, ...], Kernel | None]]:
    """The run cut where named kernels begin and end, and where the reference has no activation either.

    The more places there are where the reference tells what is wanted, the less there is to make up for at each.
    """
    blocks = list(_blocks(elements))
    rest: list[Element] = []
    at = 0
    while at < len(blocks):
        names: tuple[str, ...] = ()
        for end in range(at, len(blocks)):
            names += _convs(blocks[end])
            if names in kernels:
                yield from _part(rest, None)
                rest = []
                yield from _part([element for block in blocks[at : end + 1] for element in block], kernels[names])
                at = end + 1
                break
        else:
            inside = list(_branches_named(blocks[at], kernels))
            if inside:
                yield from _part(rest, None)
                rest = []
                for branch in inside:
                    yield from _parts(branch, kernels, there)
            else:
                rest += blocks[at]
                if not _is_before_activation(rest, there):
                    yield from _part(rest, None)
                    rest = []
            at += 1
    yield from _part(rest, None)


def _branches_named(block: list[Element], kernels: Mapping[tuple[str, ...], Kernel]) -> Iterator[tuple[Element, ...]]:
    """The branches of the block's sums, if a kernel is named for a part of one."""
    branches = [branch for element in block if isinstance(element, Join) for branch in element.branches]
    if any(set(names) <= set(_convs(branch)) for names in kernels for branch in branches):
        yield from branches


def _is_before_activation(elements: list[Element], there: DefUse) -> bool:
    """Whether the reference has an activation in or behind the last of the elements' blocks, sums passed over."""
    *_, block = _blocks(tuple(elements))
    parts = [element for element in block if not element.quiet]
    try:
        return any(hop.kind == "act" for element in parts for hop in there.after(element))
    except KeyError:
        return True


def _blocks(elements: tuple[Element, ...]) -> Iterator[list[Element]]:
    """Each convolution or sum with the norms and so on behind it."""
    block: list[Element] = []
    for element in elements:
        if _convs([element]) and _convs(block):
            yield block
            block = []
        block.append(element)
    yield block


def _part(elements: list[Element], kernel: Kernel | None) -> Iterator[tuple[tuple[Element, ...], Kernel | None]]:
    while elements and not _convs(elements[:1]):  # what comes before the first convolution stays as it is
        elements = elements[1:]
    kept = tuple(without_end(elements))
    if kept:
        yield kept, kernel


def _opened(elements: tuple[Element, ...]) -> tuple[Element, ...]:
    """Without a sum at the end of which only one branch has convolutions: that branch ends the run, the sum follows."""
    while isinstance(elements[-1], Join):
        full = [branch for branch in elements[-1].branches if _convs(branch)]
        if len(full) != 1:
            return elements
        elements = tuple(without_end((*elements[:-1], *full[0])))
    return elements
