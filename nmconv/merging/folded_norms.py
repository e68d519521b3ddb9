"""What stands where a folded norm was, and says so when the model is trained on."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from torch import nn

from nmconv.errors import FoldedNormWarning
from nmconv.flow import Op, leaf_op
from nmconv.recording import is_recording

__all__ = [
    "AfterNorm",
    "FoldedDropout",
    "FoldedNorm",
    "Told",
    "after_norm",
    "folded_kind",
    "mark",
    "tell",
    "told_of",
]

FOLDED = "_nmconv_folded"  # on what was folded: its kind, and what follows
TOLD = "_nmconv_told"  # on a model: a Told, which all that is folded in it shares


class Told(dict[str, bool]):
    """Of each kind that was folded in a model, whether that was said; one for the model and its copies."""

    def __deepcopy__(self, memo: object) -> Told:
        return self


_SAYS = {
    "norm": "norms of this model were folded into convolutions: in train mode they keep the statistics they had, and "
    "are not updated",
    "dropout": "dropout of this model lay between convolutions that are one now: in train mode too, nothing is dropped "
    "there",
}


def folded_kind(module: nn.Module) -> str:
    """What is lost for training when the module is folded away: ``"norm"``, ``"dropout"``, or ""."""
    if FOLDED in module.__dict__:
        return str(module.__dict__[FOLDED][0])
    if getattr(module, "running_mean", None) is not None:
        return "norm"
    chances = (getattr(module, name, None) for name in ("p", "drop_prob"))
    return "dropout" if leaf_op(module) is Op.DROP and any(chances) else ""


def told_of(model: nn.Module) -> Told:
    """What was said of the model's folded modules."""
    told: Told = model.__dict__.setdefault(TOLD, Told())
    return told


def mark(module: nn.Module, kind: str, told: Told) -> None:
    """Note that the module was folded."""
    module.__dict__[FOLDED] = (kind, told)
    told.setdefault(kind, False)


def tell(module: nn.Module, mode: bool) -> None:
    """Warn, once a model, about what folding has taken from training."""
    kind, told = module.__dict__.get(FOLDED, ("", {}))
    if is_recording():
        return
    if mode and not told.get(kind, True):
        missing = [said for said in _SAYS if not told.get(said, True)]
        told.update(dict.fromkeys(missing, True))
        warnings.warn("; ".join(_SAYS[one] for one in missing), FoldedNormWarning, stacklevel=3)


def after_norm(module: Any, input: Any) -> Any:
    """What is left of timm's norm + act without its norm: ``drop``, where there is one, then ``act``."""
    drop = getattr(module, "drop", None)
    return module.act(input if drop is None else drop(input))


class Folded(nn.Identity):
    """The place of a module that is part of a convolution now. Any shape in, the same out.

    Args:
        told: Shared by all that is folded in the model.
    """

    kind: ClassVar[str]

    def __init__(self, told: Told) -> None:
        super().__init__()
        mark(self, self.kind, told)

    def train(self, mode: bool = True) -> Folded:
        """As any module's, and says, once a model, what there is not to train with."""
        tell(self, mode)
        super().train(mode)
        return self


class FoldedNorm(Folded):
    """The place of a norm."""

    kind = "norm"


class FoldedDropout(Folded):
    """The place of a dropout between two convolutions."""

    kind = "dropout"


class AfterNorm(FoldedNorm):
    """What is left of timm's norm + act when the norm is folded away: ``drop``, then ``act``.

    Args:
        norm_act: The module.
        told: As of :class:`Folded`.
    """

    def __init__(self, norm_act: Any, told: Told) -> None:
        super().__init__(told)
        self.drop = norm_act.drop if isinstance(getattr(norm_act, "drop", None), nn.Module) else nn.Identity()
        self.act = norm_act.act

    def forward(self, input: Any) -> Any:
        """The activation of ``input``, any shape."""
        return after_norm(self, input)
