"""Fitting converted models to what they were made from: least squares on a few hundred images, no training."""

from nmconv.fitting._fit import fit, get_fit
from nmconv.fitting._recalibrate import recalibrate_norms
from nmconv.fitting._records import Divergence, Fit, UnitFit

__all__ = ["Divergence", "Fit", "UnitFit", "fit", "get_fit", "recalibrate_norms"]
