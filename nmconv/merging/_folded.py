"""What stands where a folded norm was, and says so when the model is trained on."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from nmconv.errors import FoldedNormWarning

__all__ = ["FOLDED", "AfterNorm", "FoldedNorm", "after_norm", "tell"]

FOLDED = "_nmconv_folded"  # a list shared by all folded norms of a model: empty until one has spoken


def tell(module: nn.Module, mode: bool) -> None:
    """Warn, once a model, that folded norms stay as they are in train mode."""
    told: Any = module.__dict__.get(FOLDED)
    if mode and told is not None and not told:
        told.append(True)
        warnings.warn(
            "norms of this model were folded into convolutions: in train mode they keep the statistics they had, and "
            "are not updated",
            FoldedNormWarning,
            stacklevel=3,
        )


def after_norm(module: Any, input: Any) -> Any:
    """What is left of timm's norm + act without its norm: ``drop``, where there is one, then ``act``."""
    drop = getattr(module, "drop", None)
    return module.act(input if drop is None else drop(input))


class FoldedNorm(nn.Identity):
    """The place of a norm that is part of a convolution now. Any shape in, the same out.

    Args:
        told: Shared by all folded norms of the model.
    """

    def __init__(self, told: list[bool]) -> None:
        super().__init__()
        self.__dict__[FOLDED] = told

    def train(self, mode: bool = True) -> FoldedNorm:
        """As any module's, and says, once a model, that there is no norm to train."""
        tell(self, mode)
        super().train(mode)
        return self


class AfterNorm(FoldedNorm):
    """What is left of timm's norm + act when the norm is folded away: ``drop``, then ``act``.

    Args:
        norm_act: The module.
        told: Shared by all folded norms of the model.
    """

    def __init__(self, norm_act: Any, told: list[bool]) -> None:
        super().__init__(told)
        self.drop = norm_act.drop if isinstance(getattr(norm_act, "drop", None), nn.Module) else nn.Identity()
        self.act = norm_act.act

    def forward(self, input: Any) -> Any:
        """The activation of ``input``, any shape."""
        return after_norm(self, input)
