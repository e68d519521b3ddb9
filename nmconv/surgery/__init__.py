"""Changing models: doing what a plan says, and nothing else."""

from nmconv.surgery._apply import copy_of, outline_of
from nmconv.surgery._classes import Method, rewritten
from nmconv.surgery._convert import apply_plan, check_flow, convert, get_plan, make_plan
from nmconv.surgery._guard import MERGED, check_examples, check_has_run, check_model, check_plain
from nmconv.surgery._hoist import is_known, pad
from nmconv.surgery._rewrite import Edit, rewrite
from nmconv.surgery._source import shown_parameters
from nmconv.surgery._undo import (
    Undo,
    restoring,
    restoring_children,
    restoring_class,
    restoring_tensor,
    undone,
    undone_on_failure,
)
from nmconv.surgery._witness import Witness

__all__ = [
    "MERGED",
    "Edit",
    "Method",
    "Undo",
    "Witness",
    "apply_plan",
    "check_examples",
    "check_flow",
    "check_has_run",
    "check_model",
    "check_plain",
    "convert",
    "copy_of",
    "get_plan",
    "is_known",
    "make_plan",
    "outline_of",
    "pad",
    "restoring",
    "restoring_children",
    "restoring_class",
    "restoring_tensor",
    "rewrite",
    "rewritten",
    "shown_parameters",
    "undone",
    "undone_on_failure",
]
