"""Fitting a converted model to the model it was made from: the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nmconv.errors import FitError, OptionError, PlanError
from nmconv.fitting.fitter import Fitter
from nmconv.fitting.output_divergence import Loss, check_loss
from nmconv.fitting.report import Fit, UnitFit
from nmconv.fitting.ridge_regression import RIDGES
from nmconv.flow import record_model
from nmconv.merging import get_merges, merged_groups
from nmconv.observing import Images, device_and_dtype_of, eval_mode, read_images
from nmconv.planning import Kernel, Plan, is_kernel_size
from nmconv.surgery import FITTED, Witness, WorkingCopy, check_finished, check_plain, get_plan, resolve_plan

__all__ = ["fit", "fit_units", "get_fit"]


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

    Each unit that lost an activation is fitted, in the order of execution: its input is what the converted model
    computes, its target what the reference computes at the same place, and the result the convolution with the least
    squared error (ridge regression by normal equations in float64). Channel pruning reconstructs layers in this way
    (He et al., arXiv 1707.06168, section 3.1). ``docs/fitting.md`` has the details.

    Args:
        model: A converted model that was not merged.
        data: Images: a tensor ``[images, ...]``, or a loader or iterable of tensors, of (x, y) pairs (y is ignored) or
            of dicts. It is read once.
        reference: The model before it was converted, with the weights it had then.
        kernel: None: units for which the plan names a kernel become one convolution; of the others, the last
            convolution and its norm are refitted, under their old keys. ``"exact"``, ``"auto"`` or a size such as 3:
            all others become one convolution too: of the exact merge's size; of the smallest size whose held-out error
            is at most 1.1 times the least; or of that size (never larger than the exact merge's).
        ridge: How strongly the fit is pulled towards the converted model's own convolutions, relative to the inputs'
            mean square; ``"auto"`` chooses by the error on held-out images.
        holdout: The fraction of the images that is held out, evenly spaced.
        recalibrate: Re-estimate the norms' statistics at the end, if that brings the outputs closer to the reference's
            on held-out images.
        keep_norms: Where a unit becomes one convolution, keep its last batch norm after it, as the identity in eval
            mode, with the statistics of its new input: fine-tuning continues as it would have before. Otherwise a
            fitted convolution has no norm to train with. :func:`nmconv.merge` and :func:`nmconv.fold_norms` fold it.
        downstream: Also refit the convolutions after the first unit that belong to none, each from its input in the
            converted model to its output in the reference: they compensate for some of the units' remaining error.
            Keys and shapes stay.
        loss: Measures the divergence: a function of (output, the reference's output) of a batch that returns a number,
            or one for each image. By default the KL divergence for classifiers, else the relative squared error.
        key: Where batches are dicts: the key of the images.
        inplace: Change ``model`` itself instead of a copy.
        witness: Record the model's run on one image before and after, as :func:`nmconv.convert` does, and raise if the
            fitted model differs in more than its weights and the convolutions that were merged.

    Returns:
        The fitted model. :func:`get_fit` returns the report: what was fitted, and what was refused.

    Raises:
        OptionError: If an option is invalid, or the data has no images.
        FitError: If the model was not converted, was merged, or is gradual and not finished; if the reference belongs
            to another model; or if values are not finite. The model is unchanged then.
        WitnessError: If the fitted model would compute anything else; the model is unchanged then.
        ModelTypeError: If one of the models is not a module, or is wrapped, compiled or scripted.

    Example:
        >>> import torch, nmconv
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
        >>> images = torch.randn(64, 3, 12, 12)
        >>> converted = nmconv.convert(net, "2:1", keep="boundary", example_inputs=images[:1])
        >>> fitted = nmconv.fit(converted, images, reference=net)
        >>> (unit,) = nmconv.get_fit(fitted).units
        >>> unit.convs, unit.form, unit.held_after < unit.held_before
        (('0', '2'), 'factors', True)
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
    _check_reference(reference, model, plan)
    images = read_images(data, model, holdout=holdout, key=key)
    recorded = _witness(model, images) if witness else None
    work = WorkingCopy(model, inplace=inplace, changes_values=True)
    result = work.model
    with torch.no_grad(), eval_mode(result, reference):
        fitter = Fitter(result, reference, images, ridges, loss=loss, keep_norms=keep_norms, downstream=downstream)
        report = fitter.fit(default, recalibrating=recalibrate)
        if recorded is not None:
            recorded.check(result, None, merged_groups(*get_merges(result)))
    result.__dict__[FITTED] = report
    return work.finish()


def fit_units(model: nn.Module, reference: nn.Module, images: Images) -> tuple[UnitFit, ...]:
    """Fit a converted model in place, without recalibrating its norms; ridges are chosen on held-out images.

    Args:
        model: The converted model; it is changed even if the fit fails.
        reference: The model before it was converted.
        images: The images, some of them held out.
    """
    with torch.no_grad(), eval_mode(model, reference):
        return Fitter(model, reference, images, RIDGES).fit_units(None)


def get_fit(model: nn.Module) -> Fit | None:
    """Return the report of what :func:`fit` did to a model, or None.

    Raises:
        ModelTypeError: If ``model`` is not a module, or is wrapped or scripted.

    Example:
        >>> import nmconv
        >>> from torch import nn
        >>> nmconv.get_fit(nn.Conv2d(3, 8, 3)) is None
        True
    """
    report = check_plain(model, "ask", compiled=True).__dict__.get(FITTED)
    return report if isinstance(report, Fit) else None


def _ridges(ridge: str | float, holdout: float) -> tuple[float, ...]:
    if isinstance(holdout, bool) or not isinstance(holdout, (int, float)) or not 0 <= holdout < 1:
        raise OptionError(f"holdout={holdout!r}: give a fraction of the images, from 0 to less than 1")
    if ridge == "auto":
        if not holdout:
            raise OptionError('ridge="auto" chooses on held-out images: give holdout=0.25, or a ridge such as 1e-3')
        return RIDGES
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not ridge >= 0:
        raise OptionError(f'ridge={ridge!r}: give "auto" or a number, 0 or more')
    return (float(ridge),)


def _kernel(kernel: object) -> Kernel:
    if not is_kernel_size(str(kernel)):
        raise OptionError(f'kernel={kernel!r}: give "exact", "auto" or a size such as 3')
    return Kernel((), str(kernel))


def _check_reference(reference: nn.Module, model: nn.Module, plan: Plan) -> None:
    """Raise FitError unless the reference is the unconverted model, on the same device and in the same dtype."""
    if get_plan(reference) is not None or model is reference:
        raise FitError("the reference was itself converted: give the model as it was before nmconv.convert")
    try:
        recordings = record_model(reference, both_sizes=False, linear=plan.linear, call=plan.call)
        resolve_plan(reference, plan, recordings, "give that model as it was before nmconv.convert")
    except (PlanError, OptionError) as error:
        raise FitError(f"the reference is not the model that was converted: {error}") from error
    if device_and_dtype_of(reference) != device_and_dtype_of(model):
        reference_place, model_place = (" in ".join(map(str, device_and_dtype_of(each))) for each in (reference, model))
        raise FitError(
            f"the reference is on {reference_place}, and the model on {model_place}: move one to the other with .to()"
        )


def _witness(model: nn.Module, images: Images) -> Witness:
    first = images.first()
    try:
        return Witness(model, torch.cat([first, first]))  # in train mode, some norms do not accept a single image
    except OptionError as error:
        what = f"this {type(model).__name__} does not accept images of shape {tuple(first.shape[1:])}"
        advice = "give batches of images: is the batch axis missing?"
        if first.dim() > 3:
            advice = "give images that it does accept, and wrap a model of several inputs in a module that takes one"
        raise FitError(f"{what} ({error.__cause__}): {advice}") from error
