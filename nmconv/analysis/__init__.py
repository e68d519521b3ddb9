"""Looking into networks: statistics of their activations, and how alike their layers are."""

from nmconv.analysis._alike import CKA
from nmconv.analysis._cka import cka
from nmconv.analysis._recorder import ActivationRecorder
from nmconv.analysis._records import ActivationStats, SiteStats
from nmconv.analysis._stats import activation_stats

__all__ = ["CKA", "ActivationRecorder", "ActivationStats", "SiteStats", "activation_stats", "cka"]
