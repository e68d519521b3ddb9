"""Changing models: doing what a plan says, and nothing else."""

from nmconv.surgery._convert import apply_plan, convert, get_plan, make_plan

__all__ = ["apply_plan", "convert", "get_plan", "make_plan"]
