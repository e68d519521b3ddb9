"""Measure each candidate alone: its loss, and what it saves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from nmconv.algebra import Refusal
from nmconv.deprecation import renamed_arguments
from nmconv.errors import OptionError
from nmconv.fitting import Loss, NotFiniteError, check_loss, has_small_moments
from nmconv.observing import Images, check_accepts, eval_mode, read_images
from nmconv.searching.ablation import Ablation, MeasuredSegment
from nmconv.searching.cost import Stopwatch, multiply_adds_of
from nmconv.searching.progress_bar import progress
from nmconv.searching.search_space import SearchSpace
from nmconv.searching.segments import CandidateSegment
from nmconv.searching.table import Candidate, Sensitivity
from nmconv.searching.table_settings import load_or_create, settings_with_images
from nmconv.surgery import check_model
from nmconv.timing import BACKENDS, check_backend

__all__ = ["check_options", "measure_table", "sensitivity"]

_FORMS = ("merged", "factors")
# Smallest ratio of multiply-adds, before over after, at which a kernel is tried.
_MIN_REDUCTION = 1.05  # where the measured speedup breaks even (docs/merging.md)
_MIN_REDUCTION_TIMED = 0.7  # where latency is measured


@renamed_arguments(net="model", images="data", most="max_convs")
def sensitivity(
    model: nn.Module,
    data: Any,
    *,
    form: str = "merged",
    backend: str | None = None,
    max_convs: int = 6,
    holdout: float = 0.25,
    loss: Loss | None = None,
    key: str | None = None,
    path: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Sensitivity:
    """Measure what each part of a model loses when it alone is made linear, and what that saves.

    A candidate is a segment of a linear run that dropping all activations would leave, also across units and modules,
    with each kernel that saves something; or a residual branch that is removed. Each is fitted as by
    :func:`nmconv.fit`, put into the original model, and judged by the model's output on held-out images. Kernels with
    more than 6144 inputs per output are left out: their fit would take long, and they rarely save anything.

    Args:
        model: A model that was not converted; it is not changed.
        data: A tensor ``[images, ...]``, or a loader or iterable of tensors, of (x, y) pairs or of dicts. A few dozen
            images are enough; labels are not used.
        form: ``"merged"``: one convolution replaces a segment; ``"factors"``: its convolutions stay, the last one is
            refitted.
        backend: Also time segments, on ``"eager"``, ``"compile"``, ``"frozen"`` or ``"onnxruntime"``; None does not.
        max_convs: Longest segment, in convolutions.
        holdout: The fraction of the images that is held out, evenly spaced.
        loss: A function of (output, the original's output) of a batch that returns a number, or one for each image; by
            default the KL divergence for classifiers, else the relative squared error.
        key: Where batches are dicts: the key of the images.
        path: A file that the table is saved to while it grows; an existing one is resumed.
        quiet: Whether to show no progress bar.

    Returns:
        The table of all candidates.

    Raises:
        OptionError: If an option is invalid, or there are too few images.
        FitError: If the model does not accept the images, or its outputs cannot be compared.
        FileError: If ``path`` is the table of something else, or its folder does not exist.
        NoSitesError: If no activation of the model can be dropped.
        ModelTypeError: If ``model`` is not a module, or is wrapped, compiled or scripted.

    Example:
        >>> import torch, nmconv
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
        >>> table = nmconv.sensitivity(net, torch.randn(16, 3, 12, 12), quiet=True)
        >>> [(one.convs, one.size, one.multiply_adds) for one in table.candidates][:2]
        [(('0', '2'), '1x1', (58464, 1536)), (('0', '2'), '3x3', (58464, 13824))]
    """
    check_model(model, "measure")
    check_options(form, backend, max_convs, holdout, loss)
    images = read_images(data, model, holdout=holdout, key=key)
    with eval_mode(model):
        check_accepts(model, images)
        space = SearchSpace(model, images.first(), max_convs)
        return measure_table(space, images, form, backend, loss, path, quiet)


def check_options(form: str, backend: str | None, max_convs: int, holdout: float, loss: Loss | None) -> None:
    """Raise OptionError if an option is invalid."""
    if form not in _FORMS:
        raise OptionError(f"form={form!r}: give one of {', '.join(_FORMS)}")
    if backend is not None:
        if backend not in BACKENDS:
            raise OptionError(f"backend={backend!r}: give one of {', '.join(BACKENDS)}, or None")
        check_backend(backend)
    if isinstance(max_convs, bool) or not isinstance(max_convs, int) or max_convs < 1:
        raise OptionError(f"max_convs={max_convs!r}: give a positive number of convolutions, such as 6")
    if isinstance(holdout, bool) or not isinstance(holdout, (int, float)) or not 0 < holdout < 1:
        raise OptionError(f"holdout={holdout!r}: give a fraction of the images, more than 0 and less than 1")
    check_loss(loss)


def measure_table(
    space: SearchSpace,
    images: Images,
    form: str,
    backend: str | None,
    loss: Loss | None,
    path: str | os.PathLike[str] | None,
    quiet: bool,
) -> Sensitivity:
    """Measure the table of a model in eval mode, or what is missing of it; see :func:`sensitivity`."""
    table = load_or_create(space, settings_with_images(space, images, form, backend, loss), path)
    if table.complete:
        return table
    ablation = Ablation(space, images, loss)
    watch = None if backend is None else Stopwatch(space, images.first(), backend)
    if not table.totals:
        table.totals = {
            "latency": math.nan if watch is None else watch.model_seconds(space.model),
            "multiply_adds": float(multiply_adds_of(space.model, images.first())),
            "activations": float(space.plan.counts.activations_before),
            "activation_elements": float(space.activation_elements),
            "loss": ablation.unchanged_loss,
        }
    measured = {(one.convs, one.size == "none") for one in table.candidates}
    missing = [one for one in space.segments if (one.convs, one.residual is not None) not in measured]
    with progress(len(missing), "measuring", quiet) as advance:
        for segment in missing:
            candidates = list(_candidates_of(segment, ablation, watch, form))
            table.candidates += candidates
            if path is not None and candidates:
                table.save(path)
            advance()
    table.complete = True
    if path is not None:
        table.save(path)
    return table


def _candidates_of(
    segment: CandidateSegment, ablation: Ablation, watch: Stopwatch | None, form: str
) -> Iterator[Candidate]:
    """Yield a segment's candidates, one for each size that may save something; none if the segment is refused."""
    nan = math.nan
    if segment.residual is not None:
        seconds = nan if watch is None else watch.branch_seconds(segment)
        yield _candidate(segment, "none", ablation.measure_removed(segment), 0, 0, (seconds, 0.0))
        return
    try:
        if form == "factors":
            measured = ablation.measure_refitted(segment)
            yield _candidate(segment, "", measured, segment.multiply_adds, segment.parameters, (nan, nan))
            return
        sizes = _promising_sizes(segment, _MIN_REDUCTION if watch is None else _MIN_REDUCTION_TIMED)
        if not sizes:
            return
        before, *after = [nan] * (len(sizes) + 1) if watch is None else watch.segment_seconds(segment, sizes)
        for measured, seconds in zip(ablation.measure_merged(segment, sizes), after, strict=True):
            yield _candidate(
                segment,
                "x".join(map(str, measured.size)),
                measured,
                segment.replacement_multiply_adds(measured.size),
                segment.replacement_parameters(measured.size),
                (before, seconds),
            )
    except (Refusal, NotFiniteError):
        return


def _promising_sizes(segment: CandidateSegment, min_reduction: float) -> list[tuple[int, ...]]:
    """Return the kernel sizes that reduce multiply-adds enough and are small enough to be fitted directly."""
    return [
        size
        for size in segment.sizes()
        if segment.multiply_adds >= min_reduction * segment.replacement_multiply_adds(size)
        and has_small_moments(segment.replacement(size))
    ]


def _candidate(
    segment: CandidateSegment,
    size: str,
    measured: MeasuredSegment,
    multiply_adds: int,
    parameters: int,
    latency: tuple[float, float],
) -> Candidate:
    return Candidate(
        convs=segment.convs,
        sites=segment.sites,
        size=size,
        loss=measured.divergence.loss,
        agreement=measured.divergence.agreement,
        error=measured.error,
        activations=segment.activations,
        activation_elements=segment.activation_elements,
        multiply_adds=(segment.multiply_adds, multiply_adds),
        parameters=(segment.parameters, parameters),
        latency=latency,
        first=segment.first,
        last=segment.last,
    )
