"""The report of a fit, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Divergence", "Fit", "UnitFit"]


@dataclass(frozen=True)
class UnitFit:
    """The fit of one unit.

    Errors are squared errors of the unit's output against the reference's, relative to the target's variance.

    Attributes:
        convs: Qualified names of its convolutions, in order of execution.
        form: ``factors``, ``merged``, or "" where nothing was changed.
        kernel: Kernel size of the fitted convolution.
        ridge: The ridge that was chosen; infinite where the composed kernel stayed.
        before: Error on the fitted images with the converted (or composed) convolution.
        after: Error on the fitted images with the fitted convolution.
        held_before: Error on the held-out images before the fit; NaN without held-out images.
        held_after: Error on the held-out images after the fit; NaN without held-out images.
        images: Number of fitted images.
        positions: Number of output positions in them: the equations.
        unknowns: Weights per output channel.
        why: Why the unit was refused, or what the images do not determine (fewer equations than unknowns, constant or
            linearly dependent inputs).
        sizes: With ``kernel="auto"``: every size tried, with its held-out error.
        norm: In the merged form: qualified name of the norm that stays after the convolution, or "".
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
    """How far a model's outputs are from the reference's.

    Attributes:
        loss: Mean over images: KL divergence in nats for classifiers, else the result of the loss function.
        agreement: Fraction of the images with the same top-1 class; NaN where the model is not a classifier.
    """

    loss: float
    agreement: float


@dataclass(frozen=True)
class Fit:
    """What :func:`nmconv.fit` did to a model.

    Attributes:
        units: The fits of the units, in order of execution.
        images: Number of fitted images.
        held: Number of held-out images; divergences are measured on them, or on the fitted ones if there are none.
        converted: Divergence of the converted model.
        recalibrated: Divergence with only the norms' statistics re-estimated, the baseline; NaN where the images do not
            determine them.
        fitted: Divergence with the units fitted.
        returned: Divergence of the returned model.
        norms_recalibrated: Whether the returned model's norms have re-estimated statistics.
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
        return self  # immutable

    def __str__(self) -> str:
        held = f"{self.held} held out" if self.held else "none held out"
        fitted = sum(bool(unit.form) for unit in self.units)
        lines = [f"{fitted} of {len(self.units)} units fitted on {self.images} images, {held}"]
        lines += map(_line_of, self.units)
        for name in ("converted", "recalibrated", "fitted", "returned"):
            result: Divergence = getattr(self, name)
            agreement = "" if math.isnan(result.agreement) else f", same top-1 class {result.agreement:.1%}"
            lines.append(f"{name}: divergence {result.loss:.4f}{agreement}")
        return "\n".join(lines)


def _line_of(unit: UnitFit) -> str:
    convs = " … ".join(dict.fromkeys((unit.convs[0], unit.convs[-1])))
    why = f"; {unit.why}" if unit.why else ""
    if not unit.form:
        return f"{convs}: left as converted{why}"
    size = "x".join(map(str, unit.kernel))
    errors = f"error {unit.held_before:.3f} -> {unit.held_after:.3f}"
    return f"{convs}: {unit.form} {size}, ridge {unit.ridge:.0e}: {errors}{why}"
