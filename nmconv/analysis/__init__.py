"""Looking into networks: statistics of their activations, how alike their layers are, and their members."""

from nmconv.analysis._alike import CKA
from nmconv.analysis._cka import cka
from nmconv.analysis._ensemble import Ensemble
from nmconv.analysis._members import members
from nmconv.analysis._recorder import ActivationRecorder
from nmconv.analysis._records import ActivationStats, SiteStats
from nmconv.analysis._stats import activation_stats

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
