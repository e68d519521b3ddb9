"""The fit of one model: all units in the order of execution, then the norms' statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from nmconv.errors import FitError
from nmconv.fitting.norm_recalibration import recalibrate, restore_statistics
from nmconv.fitting.output_divergence import Loss, NotFiniteError, Outputs, divergence, outputs_by_batch
from nmconv.fitting.report import Divergence, Fit, UnitFit
from nmconv.fitting.tasks import FitTask, FitTasks, lost_sites
from nmconv.fitting.unit_fit import fit_unit, refused
from nmconv.merging import get_merges
from nmconv.observing import Images
from nmconv.planning import Kernel
from nmconv.surgery import get_plan

__all__ = ["Fitter"]

_NO_RUN = (
    "it is in no linear run that a fit could change (transposed convolutions and norms without running statistics end "
    "runs)"
)
_UNKNOWN = Divergence(math.nan, math.nan)


class Fitter:
    """Fit a converted model to its reference, in place.

    Args:
        model: The converted model, in eval mode.
        reference: The model before it was converted, in eval mode.
        images: The images, some of them possibly held out.
        ridges: The ridges to choose from.
        loss: As for :func:`nmconv.fit`.
        keep_norms: As for :func:`nmconv.fit`.
        downstream: As for :func:`nmconv.fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        images: Images,
        ridges: Sequence[float],
        *,
        loss: Loss | None = None,
        keep_norms: bool = False,
        downstream: bool = False,
    ) -> None:
        self._model = model
        self._reference = reference
        self._images = images
        self._ridges = ridges
        self._loss = loss
        self._keep_norms = keep_norms
        self._downstream = downstream
        self._held = True if images.held else None  # on which images divergences are measured
        self._reference_outputs: Outputs = []
        self._flags: tuple[tuple[str, str], ...] = ()

    def fit(self, default: Kernel | None, *, recalibrating: bool) -> Fit:
        """Fit all units, measure the divergence before and after, and recalibrate the norms if that helps.

        Args:
            default: The kernel of units for which the plan names none, or None.
            recalibrating: Whether to re-estimate the norms' statistics if that reduces the loss.
        """
        self._reference_outputs = outputs_by_batch(self._reference, self._images, self._held)
        try:
            converted = self._divergence()
        except NotFiniteError:  # before the fit, a network in float16 may overflow
            converted = _UNKNOWN
        recalibrated, _ = self._recalibrated(keep_below=-math.inf)
        units = self.fit_units(default)
        fitted = returned = self._divergence()
        kept = False
        if recalibrating:
            again, kept = self._recalibrated(keep_below=fitted.loss)
            returned = again if kept else fitted
        return Fit(
            units=units,
            images=self._images.count,
            held=self._images.held,
            converted=converted,
            recalibrated=recalibrated,
            fitted=fitted,
            returned=returned,
            norms_recalibrated=kept,
        )

    def fit_units(self, default: Kernel | None) -> tuple[UnitFit, ...]:
        """Fit all units in the order of execution, each on the output of those before it."""
        plan = get_plan(self._model)
        assert plan is not None
        first = self._images.first()
        fit_tasks = FitTasks(self._model, self._reference, plan, default, first, downstream=self._downstream)
        self._flags = fit_tasks.flags
        fits: list[UnitFit] = []
        remaining = list(fit_tasks.tasks)
        while remaining:
            earlier = len(get_merges(self._model))
            fits.append(self._fit_unit(remaining.pop(0)))
            merges = [merge for merges in get_merges(self._model)[earlier:] for merge in merges]
            remaining = fit_tasks.renumbered(remaining, [addition for merge in merges for addition in merge.sums])
        for site in lost_sites(plan, fit_tasks.tasks):
            fits.append(refused(site.convs, f"{site.id} was dropped, and {_NO_RUN}", self._images))
        return tuple(fits)

    def _fit_unit(self, task: FitTask) -> UnitFit:
        return fit_unit(
            self._model, self._reference, self._images, task, self._ridges,
            keep_norm=self._keep_norms, flags=self._flags,
        )  # fmt: skip

    def _divergence(self) -> Divergence:
        outputs = outputs_by_batch(self._model, self._images, self._held)
        return divergence(outputs, self._reference_outputs, self._loss)

    def _recalibrated(self, *, keep_below: float) -> tuple[Divergence, bool]:
        """Re-estimate the norms' statistics, and restore them unless the loss is then below ``keep_below``.

        Returns:
            The divergence with new statistics (NaN if the images do not determine them), and whether they were kept.
        """
        try:
            before = recalibrate(self._model, self._images)
        except FitError:
            return _UNKNOWN, False
        try:
            result = self._divergence()
        except FitError:
            result = _UNKNOWN
        kept = result.loss < keep_below
        if not kept:
            restore_statistics(before)
        return result, kept
