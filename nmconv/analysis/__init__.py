"""Observe models: statistics of activations, similarity of layers, and the members of an ensemble."""

from nmconv.analysis.activation_recorder import ActivationRecorder
from nmconv.analysis.ensemble import Ensemble
from nmconv.analysis.measure_activations import activation_stats
from nmconv.analysis.run_members import members
from nmconv.analysis.similarity import CKA, cka
from nmconv.analysis.statistics import ActivationStats, SiteStats

__all__ = [
    "CKA",
    "ActivationRecorder",
    "ActivationStats",
    "Ensemble",
    "SiteStats",
    "activation_stats",
    "cka",
    "members",
]
