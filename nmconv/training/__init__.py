"""Training by degrees: schedules for the slopes of gradual models."""

from nmconv.training._schedule import Gradual

__all__ = ["Gradual"]
