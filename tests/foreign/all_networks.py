"""All networks, and parameters of tests from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import (  # noqa: F401  each declares its own
    nets_detectors,
    nets_generative,
    nets_leaves,
    nets_memory,
    nets_questions,
    nets_recognition,
    nets_segmentation,
    nets_settings,
    nets_sound_video,
)
from .networks import NETS, Network

__all__ = ["NETS", "Network", "params"]


def params(which: Callable[[Network], bool] = lambda net: True) -> list[Any]:
    """Those networks, by name; what takes long runs with the slow tests."""
    slow = [pytest.mark.slow]
    return [pytest.param(net, id=net.name, marks=slow if net.slow else []) for net in NETS if which(net)]
