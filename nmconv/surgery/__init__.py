"""Surgery: carrying out plans on models, checking the results, and undoing conversions."""

from nmconv.surgery.api import apply_plan, change, convert, make_plan, plan_to_keep_all
from nmconv.surgery.checks import FITTED, MERGED, check_examples, check_has_run, check_model, check_plain, get_plan
from nmconv.surgery.codegen import shown_parameters
from nmconv.surgery.finishing import finish
from nmconv.surgery.method_edits import Edit, rewrite
from nmconv.surgery.plans import ResolvedPlan, resolve_plan
from nmconv.surgery.restoring import restore
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten
from nmconv.surgery.slopes import check_finished, check_gradual, check_slope, get_slopes, is_slope, set_slope
from nmconv.surgery.unread_parameters import Readers
from nmconv.surgery.witness import Witness
from nmconv.surgery.working_copy import WorkingCopy, outline_of

__all__ = [
    "FITTED",
    "MERGED",
    "Edit",
    "Readers",
    "ResolvedPlan",
    "RewrittenMethod",
    "Witness",
    "WorkingCopy",
    "apply_plan",
    "change",
    "check_examples",
    "check_finished",
    "check_gradual",
    "check_has_run",
    "check_model",
    "check_plain",
    "check_slope",
    "convert",
    "finish",
    "get_plan",
    "get_slopes",
    "is_slope",
    "make_plan",
    "outline_of",
    "plan_to_keep_all",
    "resolve_plan",
    "restore",
    "rewrite",
    "rewritten",
    "set_slope",
    "shown_parameters",
]
