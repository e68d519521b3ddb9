"""What remains in place of folded norms and dropout, with a warning when the model is trained afterwards."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from nmconv.errors import FoldedNormWarning, warn_user
from nmconv.flow import Op, leaf_op
from nmconv.recording import is_recording

__all__ = [
    "AfterNorm",
    "FoldedDropout",
    "FoldedNorm",
    "WarnedKinds",
    "drop_and_act",
    "folded_kind",
    "mark",
    "warn_once",
    "warned_kinds",
]

FOLDED = "_nmconv_folded"  # on what was folded: its kind, and the model's WarnedKinds
WARNED = "_nmconv_told"  # on a model: its WarnedKinds

_WARNINGS = {
    "norm": "norms of this model were folded into convolutions: in train mode they keep the statistics they had, and "
    "are not updated",
    "dropout": "dropout of this model lay between convolutions that are one now: in train mode too, nothing is dropped "
    "there",
}


class WarnedKinds(dict[str, bool]):
    """For each kind folded in a model, whether a warning was given; shared by the model and its copies."""

    def __deepcopy__(self, memo: object) -> WarnedKinds:
        return self


def warned_kinds(model: nn.Module) -> WarnedKinds:
    """Return the model's WarnedKinds, which all modules folded in it share."""
    warned: WarnedKinds = model.__dict__.setdefault(WARNED, WarnedKinds())
    return warned


def folded_kind(module: nn.Module) -> str:
    """Return what training loses when the module is folded away: ``"norm"``, ``"dropout"``, or ""."""
    if FOLDED in module.__dict__:
        return str(module.__dict__[FOLDED][0])
    if getattr(module, "running_mean", None) is not None:
        return "norm"
    probabilities = (getattr(module, name, None) for name in ("p", "drop_prob"))
    return "dropout" if leaf_op(module) is Op.DROP and any(probabilities) else ""


def mark(module: nn.Module, kind: str, warned: WarnedKinds) -> None:
    """Mark the module as folded."""
    module.__dict__[FOLDED] = (kind, warned)
    warned.setdefault(kind, False)


def warn_once(module: nn.Module, mode: bool) -> None:
    """Warn, once per model, when a folded module is set to train mode."""
    kind, warned = module.__dict__.get(FOLDED, ("", {}))
    if is_recording():
        return
    if mode and not warned.get(kind, True):
        kinds = [each for each in _WARNINGS if not warned.get(each, True)]
        warned.update(dict.fromkeys(kinds, True))
        warn_user("; ".join(_WARNINGS[each] for each in kinds), FoldedNormWarning)


def drop_and_act(module: Any, input: Any) -> Any:
    """Compute timm's norm + act without its norm: ``drop``, if there is one, then ``act``."""
    drop = getattr(module, "drop", None)
    return module.act(input if drop is None else drop(input))


class Folded(nn.Identity):
    """An identity in place of a module that is now part of a convolution.

    Args:
        warned: The model's WarnedKinds.
    """

    kind: ClassVar[str]

    def __init__(self, warned: WarnedKinds) -> None:
        super().__init__()
        mark(self, self.kind, warned)

    def train(self, mode: bool = True) -> Folded:
        """Set the mode, and warn once per model about what training lacks."""
        warn_once(self, mode)
        super().train(mode)
        return self


class FoldedNorm(Folded):
    """An identity in place of a norm."""

    kind = "norm"


class FoldedDropout(Folded):
    """An identity in place of a dropout between two convolutions."""

    kind = "dropout"


class AfterNorm(FoldedNorm):
    """The remainder of timm's norm + act after its norm was folded: ``drop``, then ``act``.

    Args:
        norm_act: The module.
        warned: The model's WarnedKinds.
    """

    def __init__(self, norm_act: Any, warned: WarnedKinds) -> None:
        super().__init__(warned)
        self.drop = norm_act.drop if isinstance(getattr(norm_act, "drop", None), nn.Module) else nn.Identity()
        self.act = norm_act.act

    def forward(self, input: Any) -> Any:
        """Apply ``drop`` and ``act`` to a tensor of any shape."""
        return drop_and_act(self, input)
