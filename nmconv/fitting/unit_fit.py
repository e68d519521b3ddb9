"""The fit of one unit: its samples from both models, the regression, and the installation of the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import nn

from nmconv.algebra import Refusal, shrunk
from nmconv.errors import FitError
from nmconv.fitting.factors_form import FactorsForm
from nmconv.fitting.merged_form import MergedForm
from nmconv.fitting.report import UnitFit
from nmconv.fitting.ridge_regression import Regression, RidgeSolution, select_ridge
from nmconv.fitting.samples import UnitSamples
from nmconv.fitting.tasks import FitTask
from nmconv.observing import Capture, Images, check_finite

__all__ = ["fit_unit", "refused"]

_TOLERATED = 1.1  # kernel="auto": the smallest kernel with a held-out error of at most this times the least


def fit_unit(
    model: nn.Module,
    reference: nn.Module,
    images: Images,
    task: FitTask,
    ridges: Sequence[float],
    *,
    keep_norm: bool,
    flags: Iterable[tuple[str, str]],
) -> UnitFit:
    """Fit one unit of a model in place.

    Args:
        model: The converted model.
        reference: The model before it was converted.
        images: The images, some of them held out.
        task: The unit.
        ridges: The ridges to choose from.
        keep_norm: In the merged form: whether the last norm stays after the convolution.
        flags: Attributes that must keep their values, see :class:`nmconv.finding.LinearRun`.

    Returns:
        The report; for a refused unit, with the reason.
    """
    form: FactorsForm | MergedForm
    try:
        form = FactorsForm(model, task) if task.kernel is None else MergedForm(model, task, task.kernel)
    except Refusal as refusal:
        return refused(task.convs, str(refusal), images)
    fitted, held = _samples(model, reference, images, task, form)
    norm = ""
    if isinstance(form, FactorsForm):
        size = form.geometry.kernel
        regression = fitted.regression(size)
        best = select_ridge(
            regression, held.regression(size), form.initial, size, ridges, fit_intercept=form.has_intercept
        )
        tried = [best]
        try:
            if best.ridge != math.inf:
                form.install(best.coefficients, regression)
        except Refusal as refusal:
            return refused(task.convs, str(refusal), images)
    else:
        tried = [
            select_ridge(
                fitted.regression(size), held.regression(size), form.initial(size), size, ridges, fit_intercept=True
            )
            for size in form.sizes
        ]
        best = _smallest_good(tried)
        regression = fitted.regression(best.size)
        norm = form.install(best.size, best.coefficients, regression if keep_norm else None, flags).norm
    unknowns = best.coefficients.weight.shape[1]
    return UnitFit(
        convs=task.convs,
        form="factors" if isinstance(form, FactorsForm) else "merged",
        kernel=best.size,
        ridge=best.ridge,
        before=best.before,
        after=best.after,
        held_before=best.held_before,
        held_after=best.held_after,
        images=images.count,
        positions=fitted.rows,
        unknowns=unknowns,
        why=_undetermined(regression, unknowns),
        sizes=tuple((solution.size, solution.held_after) for solution in tried) if len(tried) > 1 else (),
        norm=norm,
    )


def refused(convs: tuple[str, ...], why: str, images: Images) -> UnitFit:
    """Return the report of a unit that was left as converted."""
    nan = math.nan
    return UnitFit(convs, "", (), math.inf, nan, nan, nan, nan, images.count, 0, 0, why)


def _samples(
    model: nn.Module, reference: nn.Module, images: Images, task: FitTask, form: FactorsForm | MergedForm
) -> tuple[UnitSamples, UnitSamples]:
    """Return the unit's inputs and targets from the images that are fitted, and from those held out."""
    geometry = form.geometry if isinstance(form, FactorsForm) else shrunk(form.geometry, max(form.sizes))
    samples = (UnitSamples(geometry), UnitSamples(geometry))
    outputs = [task.output] if task.residual_sum is None else [task.output, task.residual_sum]
    # Sums are identified by their number, which is reliable only if their total is as recorded: run one full forward.
    for each, locations in ((model, outputs), (reference, [task.target])):
        with Capture(each, locations, full_forward=True) as capture:
            capture.run(images.first())
    with (
        Capture(model, outputs, [form.input_module]) as model_capture,
        Capture(reference, [task.target]) as reference_capture,
    ):
        for batch, held in images.batches():
            values = model_capture.run(batch)
            input, output = values[form.input_module], values[task.output]
            target = reference_capture.run(batch)[task.target]
            if task.residual_sum is not None:  # the target is a sum: subtract what this model adds to the output
                target = output.double() + target.double() - values[task.residual_sum]
            if target.shape != output.shape:
                raise FitError(
                    f"{task.convs[-1]} gives {tuple(output.shape)} in this model and {tuple(target.shape)} in the "
                    "reference: give the model that was converted as the reference"
                )
            check_finite(input, f"{task.convs[0]}'s input in this model")
            check_finite(target, f"{task.convs[-1]}'s target in the reference")
            samples[held].add(input, target)
    return samples


def _smallest_good(solutions: Sequence[RidgeSolution]) -> RidgeSolution:
    """Return the first solution, by size, whose error is close to the least."""
    least = min(solution.selection_error for solution in solutions)
    return next(solution for solution in solutions if solution.selection_error <= _TOLERATED * least)


def _undetermined(regression: Regression, unknowns: int) -> str:
    """Return what the images do not determine, in words, or ""."""
    if regression.rows < unknowns:
        return f"{regression.rows} positions for {unknowns} unknowns: the ridge alone determines the rest"
    constant, dependent = regression.degenerate_columns()
    total = unknowns * len(regression.mean)
    parts = [f"{constant} of {total} inputs never change"] if constant else []
    parts += [f"{dependent} of {total} inputs follow from the others"] if dependent else []
    return f"{' and '.join(parts)}: the ridge determines their weights" if parts else ""
