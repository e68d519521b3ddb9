"""Changing models: doing what a plan says, and nothing else."""

from nmconv.surgery._carried import Carried, carried_over
from nmconv.surgery._classes import Method, rewritten
from nmconv.surgery._convert import (
    apply_plan,
    change,
    convert,
    finish,
    get_plan,
    make_plan,
    restore,
)
from nmconv.surgery._gradual import check_finished, check_gradual, check_slope, get_slopes, is_slope, set_slope
from nmconv.surgery._guard import FITTED, MERGED, check_examples, check_has_run, check_model, check_plain
from nmconv.surgery._hoist import is_known, pad
from nmconv.surgery._restore import Readers
from nmconv.surgery._rewrite import Edit, rewrite
from nmconv.surgery._source import shown_parameters
from nmconv.surgery._witness import Witness
from nmconv.surgery._working import WorkingCopy, copy_of, outline_of

__all__ = [
    "FITTED",
    "MERGED",
    "Carried",
    "Edit",
    "Method",
    "Readers",
    "Witness",
    "WorkingCopy",
    "apply_plan",
    "carried_over",
    "change",
    "check_examples",
    "check_finished",
    "check_gradual",
    "check_has_run",
    "check_model",
    "check_plain",
    "check_slope",
    "convert",
    "copy_of",
    "finish",
    "get_plan",
    "get_slopes",
    "is_known",
    "is_slope",
    "make_plan",
    "outline_of",
    "pad",
    "restore",
    "rewrite",
    "rewritten",
    "set_slope",
    "shown_parameters",
]
