"""Gradual training: schedules for the slopes of gradual models."""

from nmconv.training.gradual import Gradual

__all__ = ["Gradual"]
