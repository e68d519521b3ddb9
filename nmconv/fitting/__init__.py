"""Fitting converted models to what they were made from: least squares on a few hundred images, no training."""

from nmconv.fitting._data import Images, check_finite, check_takes, home_of, read_batches, read_images, taking
from nmconv.fitting._divergence import Loss, NotFiniteError, check_loss, divergence, outputs_of
from nmconv.fitting._fit import fit, fit_units, get_fit
from nmconv.fitting._kernels import Merged, sizes_asked
from nmconv.fitting._moments import Moments
from nmconv.fitting._patches import columns_of, patches
from nmconv.fitting._recalibrate import eval_mode, recalibrate_norms
from nmconv.fitting._records import Divergence, Fit, UnitFit
from nmconv.fitting._running import Hook, Running
from nmconv.fitting._samples import is_direct
from nmconv.fitting._solve import RIDGES, Answer, solved
from nmconv.fitting._units import Unit
from nmconv.fitting._watch import Watch

__all__ = [
    "RIDGES",
    "Answer",
    "Divergence",
    "Fit",
    "Hook",
    "Images",
    "Loss",
    "Merged",
    "Moments",
    "NotFiniteError",
    "Running",
    "Unit",
    "UnitFit",
    "Watch",
    "check_finite",
    "check_loss",
    "check_takes",
    "columns_of",
    "divergence",
    "eval_mode",
    "fit",
    "fit_units",
    "get_fit",
    "home_of",
    "is_direct",
    "outputs_of",
    "patches",
    "read_batches",
    "read_images",
    "recalibrate_norms",
    "sizes_asked",
    "solved",
    "taking",
]
