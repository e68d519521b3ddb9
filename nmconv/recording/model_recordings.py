"""All recordings of a model: both modes, two input sizes, and each context that its code queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import nn

from nmconv.errors import OptionError
from nmconv.recording.answers import Answers, ModelRaised, NeedsData
from nmconv.recording.call_recording import IsLeaf, RealArguments, record_call, record_with_data
from nmconv.recording.context import context_queries
from nmconv.recording.inputs import Inputs, other_choices, other_sizes
from nmconv.recording.nodes import TENSOR
from nmconv.recording.recording import Call, Frame, Recording
from nmconv.recording.tensors import Spec, device_of

__all__ = ["ENTRY_POINTS", "Failure", "Recordings", "record"]

# Methods of timm's models that users call besides forward.
ENTRY_POINTS = ("forward_features", "forward_head", "forward_intermediates")


@dataclass(frozen=True)
class Failure:
    """A part of a model that does not run in one mode.

    Attributes:
        path: The qualified name of the part; "" is the model itself.
        mode: ``eval`` or ``train``.
        reason: What it raised.
    """

    path: str
    mode: str
    reason: str


@dataclass(eq=False)
class Recordings:
    """All recordings of one model.

    Attributes:
        runs: In the order in which they were made.
        lost_sizes: The number of nodes in eval mode each time that a size became a plain number or a string, after
            which it is unknown what depends on the size.
        failures: Parts that do not run in one of the modes, and have no parts that could be recorded instead.
    """

    runs: list[Recording] = field(default_factory=list)
    lost_sizes: tuple[int, ...] = ()
    failures: list[Failure] = field(default_factory=list)

    def of_mode(self, *, training: bool) -> list[Recording]:
        """Return the model's run in one mode, or, if it does not run in that mode, the runs of its parts."""
        runs = [run for run in self.runs if run.call.training is training and run.call.method == "forward"]
        whole = [run for run in runs if run.path == ""]
        return whole[:1] or runs


def record(
    model: nn.Module,
    inputs: Inputs,
    is_leaf: IsLeaf,
    *,
    both_sizes: bool = True,
    choices: bool = False,
    methods: Mapping[str, Inputs] | None = None,
) -> Recordings:
    """Record a model in eval and train mode, at two sizes, and in each context that its code queries.

    A copy on the meta device runs, not the model. Where results depend on data, a real copy runs once. Other threads
    are not affected.

    Args:
        model: Read only.
        inputs: The arguments.
        is_leaf: Whether a module is one node.
        both_sizes: Whether to record another input size and the contexts, too.
        choices: Whether to record, too, calls with one bool inverted or another enum member among the arguments, other
            entry points than forward, and the paths that other sizes may take.
        methods: Further methods to record, and their arguments.

    Raises:
        OptionError: If neither mode runs with ``inputs``, or one of ``methods`` does not run with its arguments.
        ModelTypeError: If the model cannot be copied, or its copy uses the model itself.
        InternalError: If the recorder fails.
    """
    recordings = Recordings()
    errors: dict[bool, Exception] = {}
    for training in (False, True):
        call = Call("train" if training else "eval", training, inputs.args, inputs.kwargs)
        error = _add(recordings, model, call, is_leaf, inputs.real)
        if error is not None and _add(recordings, model, _without_grad(call), is_leaf, inputs.real) is not None:
            errors[training] = error
    if len(errors) == 2 or not recordings.runs:
        raise _cannot_be_called(model, inputs, errors[False]) from errors[False]
    whole = {run.call.training: run for run in recordings.runs}
    for training, error in errors.items():
        _record_parts(recordings, model, whole[not training], "", error, is_leaf)
    if both_sizes:
        for run in whole.values():
            if not run.data_dependent_calls:
                _record_other_size(recordings, model, run.call, inputs, is_leaf)
        for run in whole.values():
            for call in _contexts(run, model):
                _add(recordings, model, call, is_leaf, inputs.real)
    for name, arguments in (methods or {}).items():
        call = Call(f"eval, {name}", False, arguments.args, arguments.kwargs, name)
        error = _add(recordings, model, call, is_leaf, arguments.real)
        if error is not None:
            raise _cannot_be_called(model, arguments, error, name) from error
    if choices and False in whole:
        _record_flipped_comparisons(recordings, model, whole[False], is_leaf)
        for call in _choices(recordings, model, whole[False], inputs, set(methods or ())):
            _add(recordings, model, call, is_leaf)
    return recordings


def _add(
    recordings: Recordings,
    model: nn.Module,
    call: Call,
    is_leaf: IsLeaf,
    real: RealArguments | None = None,
    path: str = "",
) -> Exception | None:
    """Add the recording of a call; if the model's code raises, return the error instead."""
    try:
        recordings.runs.append(record_with_data(model, call, path, is_leaf, real))
    except ModelRaised as raised:
        return raised.error
    return None


def _without_grad(call: Call) -> Call:
    return replace(call, name=f"{call.name}, no_grad", grad=False)


def _record_parts(
    recordings: Recordings, model: nn.Module, other: Recording, path: str, error: Exception, is_leaf: IsLeaf
) -> None:
    """Record the modules that a failing module calls, on inputs like those they get in the other mode.

    Args:
        recordings: Where runs and failures are added.
        model: Read only.
        other: The run in the other mode.
        path: The qualified name of the failing module.
        error: What it raised.
        is_leaf: Whether a module is one node.
    """
    training = not other.call.training
    mode = "train" if training else "eval"
    parts: dict[str, Frame] = {}
    for frame in other.frames:
        if frame.parent is not None and frame.parent.path == path != frame.path:
            parts.setdefault(frame.path, frame)
    if not parts:
        recordings.failures.append(Failure(path, mode, f"{type(error).__name__}: {_first_line(error, 200)}"))
    for name, frame in parts.items():
        call = Call(f"{mode}, {name} alone", training, frame.args, frame.kwargs)
        part_error = _add(recordings, model, call, is_leaf, path=name)
        if part_error is not None:
            _record_parts(recordings, model, other, name, part_error, is_leaf)


def _record_other_size(recordings: Recordings, model: nn.Module, call: Call, inputs: Inputs, is_leaf: IsLeaf) -> None:
    for name, other in other_sizes(inputs):
        resized = replace(call, name=f"{call.name}, {name}", args=other.args, kwargs=other.kwargs)
        if _add(recordings, model, resized, is_leaf) is None:
            return


def _contexts(run: Recording, model: nn.Module) -> Iterator[Call]:
    """Yield the call without gradients and under autocast, where the code that ran queries them."""
    queries = context_queries(run.codes, model)
    if "grad" in queries and run.call.grad:
        yield _without_grad(run.call)
    if "autocast" in queries:
        device_type = device_of(model).type
        autocast = "cpu" if device_type == "meta" else device_type
        yield replace(run.call, name=f"{run.call.name}, autocast", autocast=autocast)


def _record_flipped_comparisons(recordings: Recordings, model: nn.Module, run: Recording, is_leaf: IsLeaf) -> None:
    """Record the paths that the code takes if comparisons that depend on the input's size give the opposite result.

    Comparisons that only such a path makes are flipped in turn.
    """
    names = [f"{run.call.name}, {name}" for name in ("other size", "other batch")]
    resized = next((each for each in recordings.runs if each.call.name in names), None)
    recordings.lost_sizes = (0,) if run.data_dependent_calls else ()
    if run.data_dependent_calls or resized is None:
        return
    tracking = replace(run.call, track_sizes=True)
    one, two = (
        record_call(model, replace(each.call, track_sizes=True), "", is_leaf, Answers()) for each in (run, resized)
    )
    is_same = (
        one.lost_sizes == two.lost_sizes
    )  # then a lost size with known sources does not depend on the input's size
    recordings.lost_sizes = tuple(position for position, sources in one.lost_sizes if not is_same or not sources)
    known = dict.fromkeys((*one.comparisons, *two.comparisons))
    todo = [frozenset([place]) for place in known if one.comparisons.get(place) != two.comparisons.get(place)]
    while todo:
        flipped = todo.pop(0)
        functions = ", ".join(sorted({code.co_name for code, _ in flipped}))
        call = replace(tracking, name=f"{tracking.name}, other sizes in {functions}", flipped=flipped)
        with suppress(ModelRaised, NeedsData):
            recordings.runs.append(record_call(model, call, "", is_leaf, Answers()))
            new = [place for place in recordings.runs[-1].comparisons if place not in known]
            known |= dict.fromkeys(new)
            todo += [flipped | {place} for place in new]


def _choices(
    recordings: Recordings, model: nn.Module, run: Recording, inputs: Inputs, recorded: set[str]
) -> Iterator[Call]:
    """Yield calls with other choices among the arguments, and calls of the other entry points.

    ``forward_head`` gets what ``forward_features`` returned, so each call must be recorded before the next is drawn.
    """
    for name, other in other_choices(model, inputs):
        yield replace(run.call, name=f"eval, {name}", args=other.args, kwargs=other.kwargs, may_raise=True)
    for name in ENTRY_POINTS:
        if name in recorded or not callable(getattr(model, name, None)):
            continue
        args, kwargs = inputs.args, inputs.kwargs
        if name == "forward_head":
            features = recordings.runs[-1]
            if features.call.method != "forward_features" or features.output[0] != TENSOR:
                continue
            node = features.output[1][0][0]
            args, kwargs = (Spec(features.facts[node].shapes[0], args[0].dtype),), {}
        yield replace(
            run.call,
            name=f"eval, {name}",
            args=args,
            kwargs=kwargs,
            method=name,
            may_raise=True,
            closable=name == "forward_intermediates",
        )


def _cannot_be_called(model: nn.Module, inputs: Inputs, error: Exception, method: str = "") -> OptionError:
    is_guess = inputs.real is None
    shapes = [tuple(leaf.shape) if isinstance(leaf, Spec) else leaf for leaf in (*inputs.args, *inputs.kwargs.values())]
    name = f"{method} of this {type(model).__name__}" if method else f"this {type(model).__name__}"
    arguments = f"a guessed input of {shapes!r:.80}" if is_guess else f"example_inputs of {shapes!r:.80}"
    cause = f"{type(error).__name__}: {_first_line(error, 300)}"
    remedy = "pass example_inputs that it can be called with" if is_guess else "pass others"
    return OptionError(f"{name} cannot be called with {arguments} ({cause}): {remedy}")


def _first_line(error: Exception, length: int) -> str:
    return str(error).strip().split("\n")[0][:length]
