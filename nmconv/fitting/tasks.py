"""What to fit: the linear runs in which an activation was dropped, with the locations of their targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import nn

from nmconv.errors import FitError
from nmconv.finding import DefUse, Element, ParallelSum, ValueLocation, conv_names, linear_runs, steps_of
from nmconv.fitting.missing_additions import MissingAdditions
from nmconv.fitting.run_pieces import pieces_of, without_last_sum
from nmconv.planning import Kernel, Plan, ReplacedSum, Site

__all__ = ["FitTask", "FitTasks", "lost_sites"]

ActivationCall: TypeAlias = "tuple[tuple[str, str, str | None], int]"  # (caller, name, function), number of the call


@dataclass(frozen=True)
class FitTask:
    """One unit to fit.

    Attributes:
        elements: Its elements, from the first convolution to the last norm.
        convs: Qualified names of its convolutions, in order of execution.
        first_module: Qualified name of the module that receives the unit's input.
        output: The unit's output, in the converted model.
        residual_sum: The residual add after the unit at which the target is taken, in the converted model, or None.
        target: The target, in the reference: the value at the output or at the residual add; after the activation that
            follows, if that was dropped.
        kernel: The kernel that the plan names, or None.
        acts: The calls of dropped activations outside of the unit that the fit compensates for.
    """

    elements: tuple[Element, ...]
    convs: tuple[str, ...]
    first_module: str
    output: ValueLocation
    residual_sum: ValueLocation | None
    target: ValueLocation
    kernel: Kernel | None
    acts: tuple[ActivationCall, ...] = ()

    @property
    def sum_owners(self) -> set[str]:
        """Qualified names of the modules whose forwards compute its sums and its output."""
        locations = {location.owner for location in (self.output, self.residual_sum) if location is not None}
        return locations | set(_sum_owners(self.elements))


class FitTasks:
    """All fits of a converted model.

    Args:
        model: Converted by ``plan``, not merged.
        reference: The model before it was converted.
        plan: The plan of the conversion.
        default: The kernel of units for which the plan names no kernel; None fits their last convolution alone.
        example_inputs: Inputs of both models; only structure and shapes are used.
        downstream: Whether to fit everything after the first unit too, in factors form.

    Attributes:
        tasks: The fits, in order of execution.
        flags: Attributes that control the flow inside of linear runs, see :class:`nmconv.finding.LinearRun`.

    Raises:
        FitError: If the plan names a kernel for convolutions that do not follow one another.
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
        self._example_inputs = example_inputs
        self._model_uses, self._reference_uses = DefUse(model, example_inputs), DefUse(reference, example_inputs)
        self._dropped = {_call_of(site) for site in plan.sites if _is_dropped(site)}
        self._additions = MissingAdditions(branch.sum for branch in plan.branches)
        reference_runs = linear_runs(reference, example_inputs=example_inputs, sizes=False)
        self._reference_run = {
            conv: index for index, run in enumerate(reference_runs) for conv in conv_names(run.elements)
        }
        self._runs = linear_runs(model, example_inputs=example_inputs, sizes=False)
        self.flags = tuple(dict.fromkeys(flag for run in self._runs for flag in run.flags))
        self.tasks = tuple(self._find(plan, default, downstream))

    def renumbered(self, tasks: Iterable[FitTask], removed: Sequence[ReplacedSum]) -> list[FitTask]:
        """Return the same tasks after additions were removed from the model, which shifts the numbers after them."""
        tasks, before = list(tasks), self._additions
        self._additions = before.without(removed)
        changed = {addition.owner for addition in removed}
        if not any(changed & task.sum_owners for task in tasks):
            return tasks
        in_reference = [before.in_reference(task.elements) for task in tasks]
        self._model_uses = DefUse(self._model, self._example_inputs)
        return [
            replace(self._task(elements, task.kernel), acts=task.acts)
            for elements, task in zip(in_reference, tasks, strict=True)
        ]

    def _find(self, plan: Plan, default: Kernel | None, downstream: bool) -> list[FitTask]:
        kernels = {kernel.convs: kernel for kernel in plan.kernels}
        tasks: list[FitTask] = []
        for run in self._runs:
            elements = self._additions.in_reference(run.elements)
            for piece, kernel in pieces_of(elements, kernels, self._reference_uses):
                task = self._task(piece, kernel)
                if kernel is not None:
                    tasks.append(task)
                    continue
                lost = self._lost_in(piece) - {act for earlier in tasks for act in earlier.acts}
                lost |= self._dropped & set(_acts_inside(piece, self._reference_uses))
                crosses_runs = len({self._reference_run.get(conv) for conv in task.convs}) > 1
                if task.acts or lost or crosses_runs:
                    task = self._task(piece if default else without_last_sum(piece), default)
                    tasks.append(replace(task, acts=(*task.acts, *lost)))
                elif downstream and tasks:
                    rest = pieces_of(without_last_sum(piece), {}, self._reference_uses)
                    tasks += [self._task(part, None) for part, _ in rest]
        missing = set(kernels) - {task.convs for task in tasks}
        if missing:
            names = ", ".join(min(missing))
            raise FitError(
                f"the plan names a kernel for {names}, which are not consecutive in a linear run: drop the activations "
                "between them with Plan.edit, or leave the kernel out of Plan.with_kernels"
            )
        return tasks

    def _lost_in(self, elements: tuple[Element, ...]) -> set[ActivationCall]:
        """Return the dropped activations whose results the elements' convolutions read in the reference."""
        convs = (step for step in steps_of(elements) if step.kind == "conv" and ":" not in step.name)
        read = {self._reference_uses.activation_before(conv) for conv in convs}
        return {act for act in read if act is not None and act in self._dropped}

    def _task(self, elements: tuple[Element, ...], kernel: Kernel | None) -> FitTask:
        """Return the fit of some elements, whose sums are numbered as in the reference."""
        model_uses, reference_uses = self._model_uses, self._reference_uses
        model_elements = self._additions.in_model(elements)
        last = model_elements[-1]
        try:
            output, target = model_uses.location(last), reference_uses.location(elements[-1])
            sums = [use.location for use in model_uses.uses_after(last) if use.kind == "sum"]
            uses = reference_uses.uses_after(elements[-1])
        except KeyError as error:
            raise FitError(
                f"this model makes the call {error.args[0]}, and the reference does not: give the model as it was "
                "before nmconv.convert"
            ) from error
        residual_sum: ValueLocation | None = None
        acts: tuple[ActivationCall, ...] = ()
        for use in uses:
            if use.kind == "sum":
                if not sums:
                    break
                residual_sum, target = sums.pop(0), use.location
            else:
                if use.act is not None and use.act in self._dropped:
                    target, acts = use.location, (use.act,)
                break
        first = next(step.name for step in steps_of(model_elements))
        return FitTask(model_elements, conv_names(model_elements), first, output, residual_sum, target, kernel, acts)


def lost_sites(plan: Plan, tasks: Iterable[FitTask]) -> Iterator[Site]:
    """Yield the dropped activations that no task compensates for."""
    tasks = tuple(tasks)
    convs = {conv for task in tasks for conv in task.convs}
    acts = {act for task in tasks for act in task.acts}
    for site in plan.sites:
        is_lost = site.action == "drop" and site.modes != "train" and _call_of(site) not in acts
        if is_lost and site.convs and convs.isdisjoint(site.convs):
            yield site


def _sum_owners(elements: Iterable[Element]) -> Iterator[str]:
    for element in elements:
        if isinstance(element, ParallelSum):
            yield element.owner
            for branch in element.branches:
                yield from _sum_owners(branch)


def _acts_inside(elements: tuple[Element, ...], reference_uses: DefUse) -> Iterator[ActivationCall]:
    """Yield the reference's activations directly after an element that is not the last."""
    for element in elements[:-1]:
        if element.is_identity:
            continue
        with suppress(KeyError):  # only the converted model makes this call
            yield from (use.act for use in reference_uses.uses_after(element) if use.act is not None)


def _is_dropped(site: Site) -> bool:
    """Return whether the call is no longer made where the reference makes it."""
    return site.action in ("drop", "move", "gone") and site.modes != "train"


def _call_of(site: Site) -> ActivationCall:
    return (site.owner, site.name, site.function), site.call
