"""Changing models: doing what a plan says, and nothing else."""

from nmconv.surgery.api import apply_plan, change, convert, finish, get_plan, make_plan, restore
from nmconv.surgery.checks import FITTED, MERGED, check_examples, check_has_run, check_model, check_plain
from nmconv.surgery.codegen import shown_parameters
from nmconv.surgery.gradual import check_finished, check_gradual, check_slope, get_slopes, is_slope, set_slope
from nmconv.surgery.method_edits import Edit, rewrite
from nmconv.surgery.resolve import ResolvedPlan, resolve_plan
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten
from nmconv.surgery.unconvert import Readers
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
    "resolve_plan",
    "restore",
    "rewrite",
    "rewritten",
    "set_slope",
    "shown_parameters",
]
