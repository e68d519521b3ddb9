"""Turn any CNN into N:M proportional units (arXiv 1709.06247) in one call, without a change to its source."""

from nmconv import ensemble
from nmconv.analysis import CKA, ActivationRecorder, ActivationStats, SiteStats, activation_stats, cka
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
    RestoredParametersWarning,
    RewriteError,
    SlopeWarning,
    WitnessError,
)
from nmconv.fitting import Fit, UnitFit, fit, get_fit, recalibrate_norms
from nmconv.flow import register
from nmconv.io import load, save
from nmconv.merging import Merge, Run, find_runs, fold_norms, get_merges, merge
from nmconv.planning import Counts, Kernel, Plan, Ratio, Site, Unit, Untraced
from nmconv.searching import Candidate, Sensitivity, search, sensitivity
from nmconv.surgery import apply_plan, convert, get_plan, get_slopes, make_plan, restore, set_slope
from nmconv.training import Gradual
from nmconv.verifying import verify

__version__ = "0.1.0"

__all__ = [
    "CKA",
    "ActivationRecorder",
    "ActivationStats",
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
    "RestoredParametersWarning",
    "RewriteError",
    "Run",
    "Sensitivity",
    "Site",
    "SiteStats",
    "SlopeWarning",
    "Unit",
    "UnitFit",
    "Untraced",
    "WitnessError",
    "activation_stats",
    "apply_plan",
    "cka",
    "convert",
    "ensemble",
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
    "restore",
    "save",
    "search",
    "sensitivity",
    "set_slope",
    "verify",
]
