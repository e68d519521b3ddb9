"""Fitting converted models to the models they were made from: least squares on a few hundred images, no training."""

from nmconv.fitting.api import fit, fit_units, get_fit
from nmconv.fitting.capture import Capture
from nmconv.fitting.data import Images, check_finite, check_takes, home_of, read_batches, read_images, taking
from nmconv.fitting.forward_tracker import ForwardTracker, Hook
from nmconv.fitting.merged_form import MergedForm, sizes_asked
from nmconv.fitting.norm_recalibration import eval_mode, recalibrate_norms
from nmconv.fitting.normal_equations import Moments
from nmconv.fitting.output_divergence import Loss, NotFiniteError, check_loss, divergence, outputs_of
from nmconv.fitting.report import Divergence, Fit, UnitFit
from nmconv.fitting.ridge_regression import RIDGES, RidgeSolution, solved
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
    "divergence",
    "eval_mode",
    "fit",
    "fit_units",
    "get_fit",
    "home_of",
    "is_direct",
    "outputs_of",
    "read_batches",
    "read_images",
    "recalibrate_norms",
    "sizes_asked",
    "solved",
    "taking",
]
