"""Saving and loading converted and merged models: one safetensors file with weights, plan and merges."""

from nmconv.io.loading import load
from nmconv.io.saving import save

__all__ = ["load", "save"]
