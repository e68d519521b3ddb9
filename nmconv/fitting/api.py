"""Fitting a converted model to the one it was made from: unit by unit, in the order of execution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nmconv.algebra import Refusal, shrunk
from nmconv.errors import FitError, OptionError, PlanError
from nmconv.fitting.capture import Capture
from nmconv.fitting.data import Images, check_finite, home_of, read_images
from nmconv.fitting.factors_form import FactorsForm
from nmconv.fitting.merged_form import MergedForm
from nmconv.fitting.norm_recalibration import eval_mode, give_back, recalibrate
from nmconv.fitting.normal_equations import Rows
from nmconv.fitting.output_divergence import Loss, NotFiniteError, Outputs, check_loss, divergence, outputs_of
from nmconv.fitting.report import Divergence, Fit, UnitFit
from nmconv.fitting.ridge import RIDGES, RidgeSolution, solved
from nmconv.fitting.samples import UnitSamples
from nmconv.fitting.tasks import FitTask, FitTasks, left_out
from nmconv.flow import recordings_of
from nmconv.merging import get_merges, groups_of
from nmconv.planning import Kernel, Plan
from nmconv.surgery import FITTED, Witness, WorkingCopy, check_finished, check_plain, get_plan, resolve_plan

__all__ = ["fit", "fit_units", "get_fit"]

_LOST = (
    "there is no linear run around it that a fit could change (a transposed convolution, or a norm without running "
    "statistics, ends one)"
)
_WITHIN = 1.1  # kernel="auto": the smallest kernel whose held-out error is no more than this times the least


def fit(
    model: nn.Module,
    data: Any,
    *,
    reference: nn.Module,
    kernel: str | int | None = None,
    ridge: str | float = "auto",
    holdout: float = 0.25,
    recalibrate: bool = True,
    keep_norms: bool = True,
    downstream: bool = False,
    loss: Loss | None = None,
    key: str | None = None,
    inplace: bool = False,
    witness: bool = True,
) -> nn.Module:
    """Refit a converted model to the one it was made from, by least squares, on a few hundred unlabelled images.

    For each unit that lost an activation, in the order of execution: its input as the converted model computes it, its
    target as the reference computes it at the same place, and the convolution with the least squared error (normal
    equations in float64; He et al., arXiv 1707.06168, for channel pruning). ``docs/fitting.md`` tells what is fitted.

    Args:
        model: Converted, and not merged.
        data: Images: a tensor ``[images, ...]``, or a loader or iterable of tensors, of (x, y) pairs (y is ignored) or
            of dicts. Read once.
        reference: The model before it was converted, with the weights it had.
        kernel: None: units of which the plan names a kernel become one convolution; of the others the last
            convolution and its norm are refitted, under their old keys. ``"exact"``, ``"auto"`` or a size such as 3:
            all others become one convolution too, of the exact merge's size, of the smallest that is hardly worse, or
            of that size where the exact merge's is no smaller.
        ridge: How firmly the fit is held to the converted model's own convolutions, relative to the inputs' mean
            square; ``"auto"`` chooses by the error on held-out images.
        holdout: Which part of the images is held out, spread evenly over them.
        recalibrate: Estimate the norms' statistics anew at the end, if that brings the outputs closer to the
            reference's on held-out images.
        keep_norms: Where a unit becomes one convolution, leave its last batch norm behind it, with the statistics of
            what it is given now: the output is the same, and fine-tuning goes on as it would have before. Without, a
            fitted convolution has no norm to train with. :func:`nmconv.merge` and :func:`nmconv.fold_norms` fold it.
        downstream: Refit the convolutions behind the first unit that belong to none too, each to what the reference
            computes there, from what this model gives it: they make up for some of what the units could not. Keys and
            shapes stay.
        loss: What tells how close: a function of (output, the reference's output) of a batch that gives a
            number, or one for each image. By default the KL divergence for classifiers, else the relative squared
            error.
        key: Where batches are dicts: under which key the images are.
        inplace: Change ``model`` itself instead of a copy.
        witness: Record the model's own run on the first images' shape before and after, as :func:`nmconv.convert` does,
            and raise if the fitted model does anything else than the same with other weights and fewer convolutions.

    Returns:
        The fitted model. :func:`get_fit` tells what was done, and what was refused.

    Raises:
        OptionError: For an option that is none, or data without images.
        FitError: If the model was not converted, was merged, or is gradual and not finished; if the reference is
            another model's; or if values are not finite. The model is as it was then.
        WitnessError: If the fitted model would do anything else; the model is as it was then.
        ModelTypeError: If one of the models is no module, or wrapped, compiled or scripted.
    """
    ridges = _ridges(ridge, holdout)
    check_loss(loss)
    default = None if kernel is None else _kernel(kernel)
    plan = get_plan(check_plain(model, "fit"))
    check_plain(reference, "compare with")
    check_finished(model, FitError)
    if plan is None:
        raise FitError(
            f"this {type(model).__name__} was not converted: give what nmconv.apply_plan or convert returned"
        )
    if get_merges(model):
        raise FitError(f"this {type(model).__name__} was merged or fitted: fit what nmconv.apply_plan returned")
    if get_plan(reference) is not None or model is reference:
        raise FitError("the reference was converted itself: give the model as it was before nmconv.convert")
    _check_reference(reference, plan)
    if home_of(reference) != home_of(model):
        where, told = (" in ".join(map(str, home_of(each))) for each in (reference, model))
        raise FitError(f"the reference is on {where}, and the model on {told}: move one to the other with .to()")
    images = read_images(data, model, holdout=holdout, key=key)
    seen = _seen(model, images) if witness else None
    work = WorkingCopy(model, inplace=inplace, numbers=True)
    result = work.model
    with torch.no_grad(), eval_mode(result, reference):
        report = _Fitting(result, reference, images, ridges, loss, keep_norms, downstream).run(default, recalibrate)
        if seen is not None:
            seen.check(result, None, groups_of(*get_merges(result)))
    result.__dict__[FITTED] = report
    return work.finish()


def _check_reference(reference: nn.Module, plan: Plan) -> None:
    try:
        resolve_plan(reference, plan, recordings_of(reference, both_sizes=False, linear=plan.linear, call=plan.call))
    except (PlanError, OptionError) as error:
        raise FitError(f"the reference is another model than the one that was converted: {error}") from error


def _seen(model: nn.Module, images: Images) -> Witness:
    first = images.first()
    try:
        return Witness(model, torch.cat([first, first]))  # some norms take no single image in train mode
    except OptionError as error:
        what = f"this {type(model).__name__} does not take images of shape {tuple(first.shape[1:])}"
        raise FitError(f"{what} ({error.__cause__}): give batches of images") from error


def fit_units(model: nn.Module, reference: nn.Module, images: Images) -> tuple[UnitFit, ...]:
    """Fit a converted model in place, the ridge chosen on held-out images, norms' statistics left alone.

    Args:
        model: Changed, also where it fails.
        reference: As it was before it was converted.
        images: Some of them held out.
    """
    with torch.no_grad(), eval_mode(model, reference):
        return _Fitting(model, reference, images, RIDGES, None, False, False).units(None)


def get_fit(model: nn.Module) -> Fit | None:
    """What :func:`fit` did to a model, or None."""
    found = check_plain(model, "ask", compiled=True).__dict__.get(FITTED)
    return found if isinstance(found, Fit) else None


def _ridges(ridge: str | float, holdout: float) -> tuple[float, ...]:
    if isinstance(holdout, bool) or not isinstance(holdout, (int, float)) or not 0 <= holdout < 1:
        raise OptionError(f"holdout={holdout!r}: give a part of the images, from 0 to less than 1")
    if ridge == "auto":
        if not holdout:
            raise OptionError('ridge="auto" chooses on held-out images: give holdout=0.25, or a ridge such as 1e-3')
        return RIDGES
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not ridge >= 0:
        raise OptionError(f'ridge={ridge!r}: give "auto" or a number from 0 on')
    return (float(ridge),)


def _kernel(kernel: object) -> Kernel:
    text = str(kernel)
    numbers = text.split("x")
    if isinstance(kernel, bool) or not (
        text in ("exact", "auto") or all(part.isdecimal() and int(part) for part in numbers)
    ):
        raise OptionError(f'kernel={kernel!r}: give "exact", "auto" or a size such as 3')
    return Kernel((), text)


class _Fitting:
    """One fit of one model."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        images: Images,
        ridges: tuple[float, ...],
        loss: Loss | None,
        keep_norms: bool,
        downstream: bool,
    ) -> None:
        self._model = model
        self._reference = reference
        self._images = images
        self._ridges = ridges
        self._loss = loss
        self._keep_norms = keep_norms
        self._downstream = downstream
        self._held = True if images.held else None  # where divergences are measured
        self._wanted: Outputs = []
        self._flags: tuple[tuple[str, str], ...] = ()

    def units(self, default: Kernel | None) -> tuple[UnitFit, ...]:
        """Fit all units, in the order of execution."""
        plan = get_plan(self._model)
        assert plan is not None
        first, ahead = self._images.first(), self._downstream
        units = FitTasks(self._model, self._reference, plan, default, first, downstream=ahead)
        self._flags = units.flags
        fits: list[UnitFit] = []
        todo = list(units.found)
        while todo:
            rounds = len(get_merges(self._model))
            fits.append(self._fit(todo.pop(0)))
            gone = [addition for merges in get_merges(self._model)[rounds:] for one in merges for addition in one.sums]
            todo = units.renewed(todo, gone)
        lost = left_out(plan, units.found)
        fits += [self._refused(site.convs, f"{site.id} was dropped, and {_LOST}") for site in lost]
        return tuple(fits)

    def run(self, default: Kernel | None, recalibrating: bool) -> Fit:
        self._wanted = outputs_of(self._reference, self._images, self._held)
        try:
            converted = self._divergence()
        except NotFiniteError:  # before it is repaired, a network of small floats may overflow
            converted = Divergence(math.nan, math.nan)
        baseline, _ = self._recalibrated(-math.inf)
        found = self.units(default)
        fitted = returned = self._divergence()
        kept = False
        if recalibrating:
            again, kept = self._recalibrated(fitted.loss)
            returned = again if kept else fitted
        return Fit(
            units=found,
            images=self._images.count,
            held=self._images.held,
            converted=converted,
            recalibrated=baseline,
            fitted=fitted,
            returned=returned,
            norms_recalibrated=kept,
        )

    def _divergence(self) -> Divergence:
        return divergence(outputs_of(self._model, self._images, self._held), self._wanted, self._loss)

    def _recalibrated(self, below: float) -> tuple[Divergence, bool]:
        """With the norms' statistics re-estimated, which stay if that brings the loss below something.

        NaN where the images give no statistics.
        """
        try:
            before = recalibrate(self._model, self._images)
        except FitError:
            return Divergence(math.nan, math.nan), False
        try:
            found = self._divergence()
        except FitError:
            found = Divergence(math.nan, math.nan)
        kept = found.loss < below
        if not kept:
            give_back(before)
        return found, kept

    # -- one unit -----------------------------------------------------------------------------------------------------

    def _fit(self, unit: FitTask) -> UnitFit:
        try:
            form: FactorsForm | MergedForm = (
                FactorsForm(self._model, unit) if unit.kernel is None else MergedForm(self._model, unit, unit.kernel)
            )
        except Refusal as refusal:
            return self._refused(unit.convs, str(refusal))
        fitted, held = self._samples(unit, form)
        norm = ""
        if isinstance(form, FactorsForm):
            size = form.geometry.kernel
            rows = fitted.of(size)
            best = solved(rows, held.of(size), form.start, size, self._ridges, intercept=form.has_intercept)
            tried: tuple[RidgeSolution, ...] = (best,)
            try:
                if best.ridge != math.inf:
                    form.install(best.line, rows)
            except Refusal as refusal:
                return self._refused(unit.convs, str(refusal))
        else:
            tried = tuple(
                solved(fitted.of(size), held.of(size), form.start(size), size, self._ridges, intercept=True)
                for size in form.sizes
            )
            least = min(answer.judged for answer in tried)
            best = next(answer for answer in tried if answer.judged <= _WITHIN * least)
            rows = fitted.of(best.size)
            norm = form.install(best.size, best.line, rows if self._keep_norms else None, self._flags).norm
        positions, unknowns = fitted.rows, best.line.weight.shape[1]
        return UnitFit(
            convs=unit.convs,
            form="factors" if isinstance(form, FactorsForm) else "merged",
            kernel=best.size,
            ridge=best.ridge,
            before=best.before,
            after=best.after,
            held_before=best.held_before,
            held_after=best.held_after,
            images=self._images.count,
            positions=positions,
            unknowns=unknowns,
            why=_lacking(rows, unknowns),
            sizes=tuple((answer.size, answer.held_after) for answer in tried) if len(tried) > 1 else (),
            norm=norm,
        )

    def _refused(self, convs: tuple[str, ...], why: str) -> UnitFit:
        nan = math.nan
        return UnitFit(convs, "", (), math.inf, nan, nan, nan, nan, self._images.count, 0, 0, why)

    def _samples(self, unit: FitTask, form: FactorsForm | MergedForm) -> tuple[UnitSamples, UnitSamples]:
        """Of the images that are fitted, and of those held out."""
        geometry = form.geometry if isinstance(form, FactorsForm) else shrunk(form.geometry, max(form.sizes))
        sums = (UnitSamples(geometry), UnitSamples(geometry))
        key = form.inputs[0]
        spots = [unit.end] if unit.far is None else [unit.end, unit.far]
        # Once to the end: sums are told apart by how many there are.
        for model, asked in ((self._model, spots), (self._reference, [unit.target])):
            with Capture(model, asked, whole=True) as watch:
                watch.run(self._images.first())
        with Capture(self._model, spots, [key]) as here, Capture(self._reference, [unit.target]) as there:
            for batch, held in self._images.batches():
                seen = here.run(batch)
                target = there.run(batch)[unit.target]
                wanted = target if unit.far is None else seen[unit.end].double() + target.double() - seen[unit.far]
                if wanted.shape != seen[unit.end].shape:
                    raise FitError(
                        f"{unit.convs[-1]} gives {tuple(seen[unit.end].shape)}, and {tuple(wanted.shape)} in the "
                        "reference: it is another model's"
                    )
                check_finite(seen[key], f"{unit.convs[0]}'s input in this model")
                check_finite(wanted, f"{unit.convs[-1]}'s target in the reference")
                sums[held].add(seen[key], wanted)
        return sums


def _lacking(rows: Rows, unknowns: int) -> str:
    """What the images do not decide."""
    if rows.rows < unknowns:
        return f"{rows.rows} positions for {unknowns} unknowns: held by the ridge alone"
    dead, alike = rows.lacks()
    total = unknowns * len(rows.mean)
    found = [f"{dead} of {total} inputs never change"] if dead else []
    found += [f"{alike} of {total} inputs follow from the others"] if alike else []
    return f"{' and '.join(found)}: there the ridge decides" if found else ""
