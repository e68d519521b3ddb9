"""Fitting converted models to the models they were made from: least squares on a few hundred images, no training."""

from nmconv.fitting.api import fit, fit_units, get_fit
from nmconv.fitting.capture import Capture
from nmconv.fitting.data import (
    Images,
    check_finite,
    check_takes,
    device_and_dtype_of,
    input_errors_as_fit_errors,
    read_batches,
    read_images,
)
from nmconv.fitting.forward_tracker import ForwardTracker, Hook
from nmconv.fitting.merged_form import MergedForm, kernel_sizes
from nmconv.fitting.norm_recalibration import eval_mode, recalibrate_norms
from nmconv.fitting.normal_equations import Moments
from nmconv.fitting.output_divergence import Loss, NotFiniteError, check_loss, divergence, outputs_of
from nmconv.fitting.report import Divergence, Fit, UnitFit
from nmconv.fitting.ridge_regression import RIDGES, RidgeSolution, select_ridge
from nmconv.fitting.samples import is_direct
from nmconv.fitting.tasks import FitTask

__all__ = [
    "RIDGES",
    "Capture",
    "Divergence",
    "Fit",
    "FitTask",
    "ForwardTracker",
    "Hook",
    "Images",
    "Loss",
    "MergedForm",
    "Moments",
    "NotFiniteError",
    "RidgeSolution",
    "UnitFit",
    "check_finite",
    "check_loss",
    "check_takes",
    "device_and_dtype_of",
    "divergence",
    "eval_mode",
    "fit",
    "fit_units",
    "get_fit",
    "input_errors_as_fit_errors",
    "is_direct",
    "kernel_sizes",
    "outputs_of",
    "read_batches",
    "read_images",
    "recalibrate_norms",
    "select_ridge",
]
