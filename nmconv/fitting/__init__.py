"""Fitting converted models to the models they were made from: least squares on a few hundred images, no training."""

from nmconv.fitting.api import fit, fit_units, get_fit
from nmconv.fitting.merged_form import MergedForm, kernel_sizes
from nmconv.fitting.norm_recalibration import recalibrate_norms
from nmconv.fitting.normal_equations import Moments
from nmconv.fitting.output_divergence import Loss, NotFiniteError, check_loss, divergence, outputs_by_batch
from nmconv.fitting.report import Divergence, Fit, UnitFit
from nmconv.fitting.ridge_regression import RIDGES, select_ridge
from nmconv.fitting.samples import has_small_moments
from nmconv.fitting.tasks import FitTask

__all__ = [
    "RIDGES",
    "Divergence",
    "Fit",
    "FitTask",
    "Loss",
    "MergedForm",
    "Moments",
    "NotFiniteError",
    "UnitFit",
    "check_loss",
    "divergence",
    "fit",
    "fit_units",
    "get_fit",
    "has_small_moments",
    "kernel_sizes",
    "outputs_by_batch",
    "recalibrate_norms",
    "select_ridge",
]
