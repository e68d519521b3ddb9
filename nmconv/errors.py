"""The errors and warnings that nmconv raises. Each message names the offending value and says what to do instead."""

import sys
import warnings

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
    """Base class of all errors that nmconv raises on purpose."""


class RatioError(NmconvError, ValueError):
    """A ratio is not ``N:M`` with N >= M >= 1."""


class OptionError(NmconvError, ValueError):
    """An option has an invalid value: an unknown ``keep``, a keep function that keeps too many activations, ..."""


class PatternError(NmconvError, ValueError):
    """A name pattern is malformed or matches nothing in the model."""


class PlanError(NmconvError, ValueError):
    """A plan does not fit: it is for another model, from another version, or contains an edit that cannot be done."""


class NoSitesError(NmconvError, ValueError):
    """No activation of the model belongs to a convolution."""


class ModelTypeError(NmconvError, TypeError):
    """The model is not a plain ``nn.Module``: it has another type, or is wrapped, compiled or scripted."""


class AlreadyConvertedError(NmconvError, ValueError):
    """The model, or a part of it, is already converted."""


class RewriteError(NmconvError, RuntimeError):
    """A forward cannot be rewritten faithfully, or a rewritten one is called differently from when it was traced."""


class MergeError(NmconvError, RuntimeError):
    """A model cannot be merged: it is in train mode, or a run differs from its merged form."""


class FitError(NmconvError, RuntimeError):
    """A fit is impossible: the reference does not match, values are not finite, or control flow depends on the data."""


class FileError(NmconvError, ValueError):
    """``nmconv.load`` cannot read a file (damaged, foreign, another model's), or ``nmconv.save`` cannot write it."""


class WitnessError(NmconvError, RuntimeError):
    """A result does not do what the plan or the merges say; the model is unchanged.

    Args:
        text: The difference, in words.
        module: Qualified name of the module whose forward makes the first difference.
        first: The first step of the original that has no counterpart, or "".
        second: The first step of the result that has no counterpart, or "".
    """

    def __init__(self, text: str, module: str = "", first: str = "", second: str = "") -> None:
        super().__init__(text)
        self.module = module
        self.first = first
        self.second = second

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.module, self.first, self.second)


class InternalError(NmconvError, RuntimeError):
    """nmconv itself has a bug: please report it."""


class NoEffectWarning(UserWarning):
    """A conversion changes nothing."""


class FoldedNormWarning(UserWarning):
    """A merged model is put in train mode: folded norms no longer update statistics, folded dropout drops nothing."""


class RemovedParametersWarning(UserWarning):
    """An in-place change removed parameters that an existing optimizer may still hold."""


class RestoredParametersWarning(UserWarning):
    """Parameters are used again and require gradients again; an existing optimizer may lack them."""


class SlopeWarning(UserWarning):
    """Slopes of a gradual model reach 1 too late for the norm statistics to adapt, or it is finished before they do."""


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the user's line: the innermost one outside of nmconv and of ``torch.nn.modules.module``.

    Args:
        message: What to know, and the way out.
        category: The warning's class.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inner(str(frame.f_globals.get("__name__"))):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_inner(module: str) -> bool:
    return module.split(".")[0] == "nmconv" or module == "torch.nn.modules.module"
