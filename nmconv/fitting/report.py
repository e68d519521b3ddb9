"""What a fit did, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Divergence", "Fit", "UnitFit"]


@dataclass(frozen=True)
class UnitFit:
    """One unit of a fit.

    Errors are squared errors of the unit's output against the reference's, relative to the target's variance.

    Attributes:
        convs: Qualified names of its convolutions, in order of execution.
        form: ``factors``, ``merged``, or "" where nothing was changed.
        kernel: Size of the fitted convolution.
        ridge: That was chosen; infinite where the composed kernel stayed.
        before: Error on the fitted images with the converted (or composed) convolution.
        after: With the fitted one.
        held_before: Error on the held-out images before; NaN without any.
        held_after: And after.
        images: How many were fitted.
        positions: How many output positions that makes: equations.
        unknowns: Weights per output channel.
        why: What should be known of it: why it was refused, or what the images did not decide (fewer equations than
            unknowns, inputs that never change or follow from others).
        sizes: With ``kernel="auto"``: every size tried and its held-out error.
        norm: In the merged form: qualified name of the norm that stays behind the convolution, or "".
    """

    convs: tuple[str, ...]
    form: str
    kernel: tuple[int, ...]
    ridge: float
    before: float
    after: float
    held_before: float
    held_after: float
    images: int
    positions: int
    unknowns: int
    why: str = ""
    sizes: tuple[tuple[tuple[int, ...], float], ...] = ()
    norm: str = ""


@dataclass(frozen=True)
class Divergence:
    """How far a network's outputs are from the reference's.

    Attributes:
        loss: Mean over images: KL divergence in nats for classifiers, else what the callable gave.
        agreement: Part of the images with the same top-1 class; NaN where the output is no classifier's.
    """

    loss: float
    agreement: float


@dataclass(frozen=True)
class Fit:
    """What :func:`nmconv.fit` did.

    Attributes:
        units: In order of execution.
        images: Fitted.
        held: Held out; divergences are measured on them, or on the fitted ones if there are none.
        converted: Divergence as the model came.
        recalibrated: With nothing but its norms' statistics re-estimated: the baseline; NaN where the images give none.
        fitted: With the units fitted.
        returned: As it was returned.
        norms_recalibrated: Whether its norms' statistics were re-estimated in the end.
    """

    units: tuple[UnitFit, ...]
    images: int
    held: int
    converted: Divergence
    recalibrated: Divergence
    fitted: Divergence
    returned: Divergence
    norms_recalibrated: bool

    def __deepcopy__(self, memo: object) -> Fit:
        return self  # nothing in it can change

    def __str__(self) -> str:
        held = f"{self.held} held out" if self.held else "none held out"
        done = sum(bool(unit.form) for unit in self.units)
        lines = [f"{done} of {len(self.units)} units fitted on {self.images} images, {held}"]
        for unit in self.units:
            size = "x".join(map(str, unit.kernel))
            what = f"{unit.form} {size}, ridge {unit.ridge:.0e}" if unit.form else "left as converted"
            errors = "" if not unit.form else f": error {unit.held_before:.3f} -> {unit.held_after:.3f}"
            lines.append(f"{unit.convs[0]} … {unit.convs[-1]}: {what}{errors}{'; ' + unit.why if unit.why else ''}")
        for name in ("converted", "recalibrated", "fitted", "returned"):
            found: Divergence = getattr(self, name)
            same = "" if math.isnan(found.agreement) else f", same top-1 class {found.agreement:.1%}"
            lines.append(f"{name}: divergence {found.loss:.4f}{same}")
        return "\n".join(lines)
