"""Calling a model on example inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nmconv.recording import chance_restored

__all__ = ["called", "outputs"]


def outputs(model: nn.Module, examples: Any) -> Any:
    """As :func:`called`; what the model draws at random, a second call draws too (dropout in train mode, say)."""
    with chance_restored(model):
        return called(model, examples)


def called(model: nn.Module, examples: Any) -> Any:
    """What a model returns for copies of example inputs, into which it may write; without gradients."""
    examples = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, examples)
    with torch.no_grad():
        if isinstance(examples, dict):
            return model(**examples)
        return model(*examples) if isinstance(examples, tuple) else model(examples)
