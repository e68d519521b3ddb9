"""nmconv: N:M proportional units (arXiv 1709.06247) for any CNN, one call, source untouched."""

from nmconv.errors import (
    AlreadyConvertedError,
    FileError,
    FitError,
    FoldedNormWarning,
    InternalError,
    MergeError,
    ModelTypeError,
    NmconvError,
    NoEffectWarning,
    NoSitesError,
    OptionError,
    PatternError,
    PlanError,
    RatioError,
    RemovedParametersWarning,
    RewriteError,
    SlopeWarning,
    WitnessError,
)
from nmconv.fitting import Fit, UnitFit, fit, get_fit, recalibrate_norms
from nmconv.graph import register
from nmconv.io import load, save
from nmconv.merging import Merge, Run, find_runs, fold_norms, get_merges, merge
from nmconv.planning import Counts, Kernel, Plan, Ratio, Site, Unit, Untraced
from nmconv.searching import Candidate, Sensitivity, search, sensitivity
from nmconv.surgery import apply_plan, convert, get_plan, get_slopes, make_plan, set_slope
from nmconv.training import Gradual
from nmconv.verifying import verify

__version__ = "0.1.0"

__all__ = [
    "AlreadyConvertedError",
    "Candidate",
    "Counts",
    "FileError",
    "Fit",
    "FitError",
    "FoldedNormWarning",
    "Gradual",
    "InternalError",
    "Kernel",
    "Merge",
    "MergeError",
    "ModelTypeError",
    "NmconvError",
    "NoEffectWarning",
    "NoSitesError",
    "OptionError",
    "PatternError",
    "Plan",
    "PlanError",
    "Ratio",
    "RatioError",
    "RemovedParametersWarning",
    "RewriteError",
    "Run",
    "Sensitivity",
    "Site",
    "SlopeWarning",
    "Unit",
    "UnitFit",
    "Untraced",
    "WitnessError",
    "apply_plan",
    "convert",
    "find_runs",
    "fit",
    "fold_norms",
    "get_fit",
    "get_merges",
    "get_plan",
    "get_slopes",
    "load",
    "make_plan",
    "merge",
    "recalibrate_norms",
    "register",
    "save",
    "search",
    "sensitivity",
    "set_slope",
    "verify",
]
