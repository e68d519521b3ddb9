"""Surgery: carrying out plans on models, checking the results, and undoing conversions."""

from nmconv.surgery.api import apply_plan, convert, make_changes, make_plan, plan_to_keep_all
from nmconv.surgery.checks import FITTED, MERGED, check_examples, check_initialized, check_model, check_plain, get_plan
from nmconv.surgery.codegen import format_parameters
from nmconv.surgery.finishing import finish
from nmconv.surgery.method_edits import Edit, rewrite_methods
from nmconv.surgery.plans import ResolvedPlan, resolve_plan
from nmconv.surgery.restoring import restore
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten_class
from nmconv.surgery.slopes import check_finished, check_gradual, check_slope, get_slopes, is_slope, set_slope
from nmconv.surgery.unused_parameters import UsedParameters
from nmconv.surgery.witness import Witness
from nmconv.surgery.working_copy import WorkingCopy, structure_only_copy

__all__ = [
    "FITTED",
    "MERGED",
    "Edit",
    "ResolvedPlan",
    "RewrittenMethod",
    "UsedParameters",
    "Witness",
    "WorkingCopy",
    "apply_plan",
    "check_examples",
    "check_finished",
    "check_gradual",
    "check_initialized",
    "check_model",
    "check_plain",
    "check_slope",
    "convert",
    "finish",
    "format_parameters",
    "get_plan",
    "get_slopes",
    "is_slope",
    "make_changes",
    "make_plan",
    "plan_to_keep_all",
    "resolve_plan",
    "restore",
    "rewrite_methods",
    "rewritten_class",
    "set_slope",
    "structure_only_copy",
]
