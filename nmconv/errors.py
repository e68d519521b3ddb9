"""The library's own errors: one base, a few subclasses, the warnings. Each message names the value and the way out."""

__all__ = [
    "AlreadyConvertedError",
    "FileError",
    "FitError",
    "FoldedNormWarning",
    "InternalError",
    "MergeError",
    "ModelTypeError",
    "NmconvError",
    "NoEffectWarning",
    "NoSitesError",
    "OptionError",
    "PatternError",
    "PlanError",
    "RatioError",
    "RemovedParametersWarning",
    "RestoredParametersWarning",
    "RewriteError",
    "SlopeWarning",
    "WitnessError",
]


class NmconvError(Exception):
    """Base of everything nmconv raises on purpose."""


class RatioError(NmconvError, ValueError):
    """A ratio that is not ``N:M`` with N >= M >= 1."""


class OptionError(NmconvError, ValueError):
    """An option with a value it cannot take (an unknown ``keep``, a keep function that keeps too many, ...)."""


class PatternError(NmconvError, ValueError):
    """A name pattern that is malformed or matches nothing in the model."""


class PlanError(NmconvError, ValueError):
    """A plan that does not fit: another model's, another version's, or an edit that cannot be done."""


class NoSitesError(NmconvError, ValueError):
    """A model in which no activation belongs to a convolution."""


class ModelTypeError(NmconvError, TypeError):
    """Something that is no plain ``nn.Module``: another type, or a wrapped, compiled or scripted model."""


class AlreadyConvertedError(NmconvError, ValueError):
    """A model, or a part of one, that was converted before."""


class RewriteError(NmconvError, RuntimeError):
    """A module whose forward cannot be rewritten faithfully, or a rewritten one called in a way it was not made for."""


class MergeError(NmconvError, RuntimeError):
    """A model that cannot be merged: in train mode, or with a run whose merged form differs from it."""


class FitError(NmconvError, RuntimeError):
    """A fit that cannot be made: another reference, values that are not finite, a forward that goes another way."""


class FileError(NmconvError, ValueError):
    """A file that :func:`nmconv.load` cannot read (damaged, foreign, another model's), or `nmconv.save` not write."""


class WitnessError(NmconvError, RuntimeError):
    """A result that does something else than the plan or the merges say; the model is as it was.

    Args:
        text: What differs.
        module: Qualified name of the module whose forward made the first difference.
        first: The first step of the original that has no counterpart, or "".
        second: The first step of the result that has none, or "".
    """

    def __init__(self, text: str, module: str = "", first: str = "", second: str = "") -> None:
        super().__init__(text)
        self.module = module
        self.first = first
        self.second = second

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.module, self.first, self.second)


class InternalError(NmconvError, RuntimeError):
    """A bug in nmconv itself: please report it."""


class NoEffectWarning(UserWarning):
    """A conversion that changes nothing."""


class FoldedNormWarning(UserWarning):
    """A merged model that is trained on: folded norms keep the statistics they had, folded dropout drops nothing."""


class RemovedParametersWarning(UserWarning):
    """A model changed in place has lost parameters, which an optimizer that was made before still holds."""


class RestoredParametersWarning(UserWarning):
    """Parameters of a converted model are read again, which an optimizer that was made meanwhile may not have."""


class SlopeWarning(UserWarning):
    """A gradual model whose slopes reach 1 too late for its norms' statistics, or that is finished before they do."""
