"""Every candidate measured alone: what it costs in accuracy, and what it saves."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra import Refusal
from nmconv.deprecation import renamed_arguments
from nmconv.errors import FileError, OptionError
from nmconv.fitting import Images, Loss, NotFiniteError, check_loss, check_takes, eval_mode, is_direct, read_images
from nmconv.searching.ablation import Ablation, MeasuredSegment
from nmconv.searching.candidates import CandidateSegment, SearchSpace
from nmconv.searching.cost import Stopwatch, multiply_adds_of
from nmconv.searching.progress_bar import progress
from nmconv.searching.table import Candidate, Sensitivity
from nmconv.surgery import check_model
from nmconv.timing import BACKENDS, require

__all__ = ["check_options", "check_setting", "measured", "sensitivity", "setting_of"]

_FORMS = ("merged", "factors")
_WORTH = 1.05  # multiply-adds before over after: where the measured law breaks even (docs/merging.md)
_HOPEFUL = 0.7  # the same where time decides


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
    """Measure what each part of a network loses when it is made linear, alone, and what that saves.

    A candidate is a segment of a linear run that dropping all activations would leave, also across units and modules,
    with each kernel that saves something; or a residual branch that goes altogether. Each is fitted (see
    :func:`nmconv.fit`), put into the network as it is, and judged by the network's output on held-out images. Kernels
    of more than 6144 inputs to one output are left out: their fit would take long, and they hardly ever pay.

    Args:
        model: Not converted; it is not changed.
        data: A tensor ``[images, ...]``, or a loader or iterable of tensors, of (x, y) pairs or of dicts. A few
            dozen will do; no labels.
        form: ``"merged"``: one convolution in a segment's place; ``"factors"``: the convolutions stay, the last one
            is refitted.
        backend: Time segments too, on ``"eager"``, ``"compile"``, ``"frozen"`` or ``"onnxruntime"``; None does not.
        max_convs: Longest segment, in convolutions.
        holdout: Which part of the images is held out, spread evenly over them.
        loss: A function of (output, output of the original) of a batch that gives a number, or one for each image;
            by default the KL divergence for classifiers, else the relative squared error.
        key: Where batches are dicts: under which key the images are.
        path: A file that the table is kept in while it grows; where it is there already, measuring goes on.
        quiet: Whether to show no progress bar.

    Returns:
        The table.

    Raises:
        OptionError: For an option that is none, or too few images.
        FitError: If the network does not take the images, or gives what cannot be compared.
        FileError: If ``path`` holds the table of something else, or its folder is not there.
        NoSitesError: If nothing of the network can become linear.
    """
    check_model(model)
    check_options(form, backend, max_convs, holdout, loss)
    pictures = read_images(data, model, holdout=holdout, key=key)
    with eval_mode(model):
        check_takes(model, pictures)
        network = SearchSpace(model, pictures.first(), max_convs)
        return measured(network, pictures, form, backend, loss, path, quiet)


def check_options(form: str, backend: str | None, max_convs: int, holdout: float, loss: Loss | None) -> None:
    """Refuse what is none, with OptionError."""
    if form not in _FORMS:
        raise OptionError(f"form={form!r}: give one of {', '.join(_FORMS)}")
    if backend is not None:
        if backend not in BACKENDS:
            raise OptionError(f"backend={backend!r}: give one of {', '.join(BACKENDS)}, or None")
        require(backend)
    if isinstance(max_convs, bool) or not isinstance(max_convs, int) or max_convs < 1:
        raise OptionError(f"max_convs={max_convs!r}: give a number of convolutions, such as 6")
    if isinstance(holdout, bool) or not isinstance(holdout, (int, float)) or not 0 < holdout < 1:
        raise OptionError(f"holdout={holdout!r}: give a part of the images, more than 0 and less than 1")
    check_loss(loss)


def measured(
    network: SearchSpace,
    images: Images,
    form: str,
    backend: str | None,
    loss: Loss | None,
    path: str | os.PathLike[str] | None,
    quiet: bool,
) -> Sensitivity:
    """The table of a network in eval mode; see :func:`sensitivity`."""
    image = images.first()
    setting = setting_of(network, image, form, backend, loss)
    setting["max_convs"] = str(network.max_convs)
    setting["images"] = f"{images.count} + {images.held}, {_digest(images)}"
    table = _table(network, setting, path)
    if table.complete:
        return table
    alone = Ablation(network, images, loss)
    watch = None if backend is None else Stopwatch(network, image, backend)
    if not table.totals:
        plan = network.plan
        table.totals = {
            "latency": math.nan if watch is None else watch.whole(network.model),
            "multiply_adds": float(multiply_adds_of(network.model, image)),
            "activations": float(plan.counts.activations_before),
            "activation_elements": float(network.elements),
            "loss": alone.floor,
        }
    done = {(one.convs, one.size == "none") for one in table.candidates}
    todo = [part for part in network.segments if (part.convs, part.residual is not None) not in done]
    with progress(len(todo), "measuring", quiet) as advance:
        for segment in todo:
            rows = list(_rows(segment, alone, watch, form))
            table.candidates += rows
            if path is not None and rows:
                table.save(path)
            advance()
    table.complete = True
    if path is not None:
        table.save(path)
    return table


def setting_of(
    network: SearchSpace, image: Tensor, form: str, backend: str | None, loss: Loss | None
) -> dict[str, str]:
    """What the numbers of a table depend on, whichever images they are from."""
    return {
        "form": form,
        "backend": str(backend),
        "loss": _name(loss),
        "weights": _weights(network.model),
        "image": "x".join(map(str, image.shape[1:])),
    }


def check_setting(table: Sensitivity, asked: dict[str, str], what: str, way_out: str) -> None:
    """Refuse a table that was measured with something else than what is asked, with FileError."""
    for name, value in asked.items():
        if table.setting.get(name) != value:
            raise FileError(f"{what} was measured with {name} {table.setting.get(name)!r}, not {value!r}: {way_out}")


def _name(loss: Loss | None) -> str:
    """Tells functions apart by their code and by what it is given: defaults, closures, attributes, globals."""
    if loss is None:
        return "default"
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    return f"{name} {hashlib.sha256(repr(_described(loss, 5)).encode()).hexdigest()[:8]}"


def _described(value: Any, depth: int) -> Any:
    """The value in words that are the same in every process."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(_bytes(value)).hexdigest()]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    parts: list[Any] = []
    if isinstance(value, CodeType):
        parts = [value.co_code, value.co_names, value.co_consts]
    elif isinstance(value, FunctionType):
        names = value.__code__.co_names
        parts = [
            value.__code__,
            value.__defaults__,
            value.__kwdefaults__,
            [cell.cell_contents for cell in value.__closure__ or ()],
        ]
        parts.append([value.__globals__[name] for name in names if name in value.__globals__])
    elif isinstance(value, MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, Mapping):
        parts = [part for pair in value.items() for part in pair]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif isinstance(value, (ModuleType, BuiltinFunctionType, type)):
        return getattr(value, "__name__", kind)
    else:
        parts = [vars(value)] if hasattr(value, "__dict__") else []
    return [kind, *(_described(part, depth - 1) for part in parts)] if depth else kind


def _bytes(value: Tensor) -> bytes:
    found: bytes = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return found


def _weights(model: nn.Module) -> str:
    found = hashlib.sha256()
    for value in model.state_dict().values():
        if isinstance(value, Tensor) and value.is_floating_point():
            found.update(_bytes(value))
    return found.hexdigest()[:8]


def _table(network: SearchSpace, setting: dict[str, str], path: str | os.PathLike[str] | None) -> Sensitivity:
    fresh = Sensitivity(network.plan.model, network.plan.fingerprint, setting, {})
    if path is None:
        return fresh
    if not Path(path).absolute().parent.is_dir():
        raise FileError(f"{os.fspath(path)}: there is no such folder: make it first")
    if not Path(path).exists():
        return fresh
    found = Sensitivity.load(path)
    if found.fingerprint != fresh.fingerprint:
        raise FileError(
            f"{os.fspath(path)} holds the table of a {found.model} with fingerprint {found.fingerprint}, not of this "
            f"{fresh.model} with {fresh.fingerprint}: give another path"
        )
    check_setting(found, setting, os.fspath(path), "give another path")
    return found


def _digest(images: Images) -> str:
    """Tells sets of images apart."""
    found = hashlib.sha256()
    for batch, held in images.batches():
        found.update(f"{held} {tuple(batch.shape[1:])} {batch.dtype}".encode())
        found.update(_bytes(batch))
    return found.hexdigest()[:8]


def _rows(segment: CandidateSegment, alone: Ablation, watch: Stopwatch | None, form: str) -> Iterator[Candidate]:
    """A segment's candidates, one for each size that may be worth it; none where it cannot be done."""
    if segment.residual is not None:
        before = math.nan if watch is None else watch.branch(segment)
        yield _row(segment, "none", alone.gone(segment), 0, 0, (before, 0.0))
        return
    try:
        if form == "factors":
            found = alone.refitted(segment)
            yield _row(segment, "", found, segment.multiply_adds, segment.parameters, (math.nan, math.nan))
            return
        floor = _WORTH if watch is None else _HOPEFUL
        sizes = [size for size in segment.sizes() if segment.multiply_adds >= floor * segment.multiply_adds_as(size)]
        sizes = [size for size in sizes if is_direct(segment.shape(size))]
        if not sizes:
            return
        times = [math.nan] * (len(sizes) + 1) if watch is None else watch.segment(segment, sizes)
        for at, found in enumerate(alone.merged(segment, sizes)):
            yield _row(
                segment, "x".join(map(str, found.size)), found, segment.multiply_adds_as(found.size),
                _parameters(segment, found.size), (times[0], times[at + 1]),
            )  # fmt: skip
    except (Refusal, NotFiniteError):
        return


def _parameters(segment: CandidateSegment, size: tuple[int, ...]) -> int:
    shape = segment.shape(size)
    return shape.weights + shape.out_channels


def _row(
    segment: CandidateSegment,
    size: str,
    found: MeasuredSegment,
    multiply_adds: int,
    parameters: int,
    latency: tuple[float, float],
) -> Candidate:
    return Candidate(
        convs=segment.convs,
        sites=segment.sites,
        size=size,
        loss=found.divergence.loss,
        agreement=found.divergence.agreement,
        error=found.error,
        activations=segment.activations,
        activation_elements=segment.elements,
        multiply_adds=(segment.multiply_adds, multiply_adds),
        parameters=(segment.parameters, parameters),
        latency=latency,
        first=segment.first,
        last=segment.last,
    )
