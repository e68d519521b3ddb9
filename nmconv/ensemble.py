"""Models with Leaky ReLUs, read as ensembles of models of different ratios."""

from nmconv.analysis import Ensemble, members

__all__ = ["Ensemble", "members"]
