"""Saving and loading converted and merged models: one safetensors file with weights, plan and merges."""

from nmconv.io._load import load
from nmconv.io._save import save

__all__ = ["load", "save"]
