"""Recording a model in all the ways that matter: both modes, two sizes, and each context that its code asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from nmconv.copying import meta_copy
from nmconv.errors import OptionError
from nmconv.recording.answers import Answers, ModelRaised, NeedsData
from nmconv.recording.context import asks_for, context_kept, noted
from nmconv.recording.data_run import real_run
from nmconv.recording.inputs import Inputs, other_choices, other_sizes
from nmconv.recording.leaf_outcomes import Outcomes, remembered
from nmconv.recording.methods import uncompiled
from nmconv.recording.nodes import TENSOR
from nmconv.recording.recorder import Recorder
from nmconv.recording.recording import Call, Frame, Recording, Spec
from nmconv.recording.rng_state import rng_seeded

__all__ = ["ENTRY_POINTS", "Failure", "Recordings", "record", "record_again", "record_call"]

# Methods besides forward by which timm's models are called.
ENTRY_POINTS = ("forward_features", "forward_head", "forward_intermediates")
_OTHER = ("other size", "other batch")
IsLeaf = Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Failure:
    """A part of a model that does not run in one mode.

    Attributes:
        path: Qualified name of the part; "" is the model itself.
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
        runs: In the order they were made.
        lost: How many nodes there were in eval mode each time that a size became a plain number or a text: what these
            decide is not seen.
        failures: Parts that do not run in one of the modes, and neither do their own parts in its place.
    """

    runs: list[Recording] = field(default_factory=list)
    lost: tuple[int, ...] = ()
    failures: list[Failure] = field(default_factory=list)

    def of_mode(self, *, training: bool) -> list[Recording]:
        """The model's run in one mode, or, where it does not run in it, those of its parts."""
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
    """Record a model in eval and train mode, at two sizes, and in each context that its code asks for.

    The model is not entered: a copy on the meta device runs. Where data decide what happens, a real copy runs once to
    tell. Other threads see nothing of it.

    Args:
        model: Read only.
        inputs: What it is called with.
        is_leaf: Whether a module is one node.
        both_sizes: Whether to record it at another size and in the contexts, too.
        choices: Whether to record it with each truth value among its arguments the other way, too, and with the other
            members of enums; and its entry points besides forward that are known by name.
        methods: Further methods, and what they are called with.

    Raises:
        OptionError: If it cannot be called with ``inputs`` in either mode, or one of ``methods`` with what is given.
        ModelTypeError: If it cannot be copied, or its copy reaches the model itself.
        InternalError: If the recorder fails.
    """
    found = Recordings()
    errors: dict[bool, Exception] = {}
    for training in (False, True):
        call = Call("train" if training else "eval", training, inputs.args, inputs.kwargs)
        if not _try_to_add(found, model, call, inputs, is_leaf, errors):
            without = replace(call, name=f"{call.name}, no_grad", grad=False)
            if _try_to_add(found, model, without, inputs, is_leaf):
                del errors[training]
    if len(errors) == 2 or not found.runs:
        raise _cannot_be_called(model, inputs, errors[False]) from errors[False]
    whole = {run.call.training: run for run in found.runs}
    for training, error in errors.items():
        _record_parts(found, model, whole[not training], "", training, error, is_leaf)
    for run in whole.values() if both_sizes else ():
        if not run.asked:
            _record_other_size(found, model, run.call, inputs, is_leaf)
    for run in whole.values() if both_sizes else ():
        for call in _contexts(run, model):
            _try_to_add(found, model, call, inputs, is_leaf)
    for name, given in (methods or {}).items():
        call = Call(f"eval, {name}", False, given.args, given.kwargs, name)
        errors = {}
        if not _try_to_add(found, model, call, given, is_leaf, errors):
            raise _cannot_be_called(model, given, errors[False], name) from errors[False]
    if choices and False in whole:
        _record_other_ways(found, whole[False], model, is_leaf)
        for call in _choices(found, whole[False], model, inputs, set(methods or ())):
            _try_to_add(found, model, call, replace(inputs, real=None), is_leaf)
    return found


def _record_other_ways(found: Recordings, run: Recording, model: nn.Module, is_leaf: IsLeaf) -> None:
    """Record what happens where a question about sizes is answered the other way; and questions that only come then."""
    others = [each for each in found.runs if each.call.name in (f"{run.call.name}, {name}" for name in _OTHER)]
    found.lost = (0,) if run.asked else ()
    if run.asked or not others:  # it takes no other sizes
        return
    asking = replace(run.call, asks=True)
    one, two = (record_call(model, replace(each.call, asks=True), "", is_leaf, Answers()) for each in (run, others[0]))
    known = dict.fromkeys((*one.questions, *two.questions))
    same = one.lost == two.lost
    found.lost = tuple(position for position, roots in one.lost if not same or not roots)
    todo = [
        frozenset([site]) for site in known if one.questions.get(site) != two.questions.get(site)
    ]  # others are not up to sizes
    while todo:
        sites = todo.pop(0)
        place = ", ".join(sorted({code.co_name for code, _ in sites}))
        call = replace(asking, name=f"{asking.name}, other sizes in {place}", other_way=sites)
        with suppress(ModelRaised, NeedsData):
            found.runs.append(record_call(model, call, "", is_leaf, Answers()))
            new = [site for site in found.runs[-1].questions if site not in known]
            known |= dict.fromkeys(new)
            todo += [sites | {site} for site in new]


def _choices(found: Recordings, run: Recording, model: nn.Module, inputs: Inputs, given: set[str]) -> Iterator[Call]:
    """Further calls of a model: other choices among its arguments, and its other entry points."""
    for name, other in other_choices(model, inputs):
        yield replace(run.call, name=f"eval, {name}", args=other.args, kwargs=other.kwargs, optional=True)
    for name in ENTRY_POINTS:
        if name in given or not callable(getattr(model, name, None)):
            continue
        args, kwargs = inputs.args, inputs.kwargs
        if name == "forward_head":
            features = found.runs[-1]
            if features.call.method != "forward_features" or features.output[0] != TENSOR:
                continue
            read = features.output[1][0][0]
            args, kwargs = (Spec(features.facts[read].shapes[0], args[0].dtype),), {}
        closable = name == "forward_intermediates"
        yield replace(
            run.call, name=f"eval, {name}", args=args, kwargs=kwargs, method=name, optional=True, closable=closable
        )


def record_again(model: nn.Module, run: Recording, is_leaf: IsLeaf) -> Recording:
    """Record a model in the way that one run of another was recorded.

    Args:
        model: Read only.
        run: Of the other one.
        is_leaf: Whether a module is one node.

    Raises:
        NeedsData: If it asks for other numbers than the other model did, whose answers it gets.
        ModelRaised: If the model's code raises.
    """
    return record_call(model, run.call, run.path, is_leaf, run.answers)


def record_call(model: nn.Module, call: Call, path: str, is_leaf: IsLeaf, answers: Answers) -> Recording:
    """Record one call of a model, or of a part of it.

    Raises:
        NeedsData: If it asks for numbers that ``answers`` does not have.
        ModelRaised: If the model's code raises.
    """
    while True:
        try:
            return _recorded(model, call, path, is_leaf, answers, remembered())
        except ModelRaised as raised:
            if not _is_traced_elsewhere(raised.error):
                break
        time.sleep(0.01)
    return _recorded(model, call, path, is_leaf, answers, {})  # it may have asked for autograd's graph


def _is_traced_elsewhere(error: Exception) -> bool:
    """Whether a module was called while another thread traced with fx, which patches ``nn.Module`` for all of them."""
    return isinstance(error, NameError) and "is not installed as a submodule" in str(error)


def _recorded(
    model: nn.Module, call: Call, path: str, is_leaf: IsLeaf, answers: Answers, outcomes: Outcomes
) -> Recording:
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    told = torch.device("cpu") if device.type == "meta" else device
    copy = meta_copy(model)
    with noted():
        copy.model.train(call.training)
    recorder = Recorder(copy, call, path, is_leaf, told, answers, outcomes)
    autocast = torch.autocast(call.autocast) if call.autocast else nullcontext()
    with rng_seeded(), uncompiled(), context_kept(), torch.inference_mode(False), autocast:
        return recorder.run()


def _add(found: Recordings, model: nn.Module, call: Call, inputs: Inputs, is_leaf: IsLeaf, path: str = "") -> Recording:
    try:
        made = record_call(model, call, path, is_leaf, Answers())
    except NeedsData as asked:
        if any(value.is_meta for value in model.parameters()):
            text = f"{asked} decides what it does, and a model on the meta device has no data"
            raise ModelRaised(RuntimeError(text)) from None
        with rng_seeded(), uncompiled():
            answers = real_run(model, call, path, inputs.real, is_leaf)
        try:
            made = record_call(model, call, path, is_leaf, answers)
        except NeedsData as still:
            raise ModelRaised(RuntimeError(f"{still} asks for data otherwise each time it is called")) from None
    found.runs.append(made)
    return made


def _try_to_add(
    found: Recordings,
    model: nn.Module,
    call: Call,
    inputs: Inputs,
    is_leaf: IsLeaf,
    errors: dict[bool, Exception] | None = None,
) -> bool:
    """Whether the model takes the call; what its own code raises otherwise goes to ``errors``."""
    try:
        _add(found, model, call, inputs, is_leaf)
    except ModelRaised as raised:
        if errors is not None:
            errors[call.training] = raised.error
        return False
    return True


def _record_other_size(found: Recordings, model: nn.Module, like: Call, inputs: Inputs, is_leaf: IsLeaf) -> None:
    for name, other in other_sizes(inputs):
        call = replace(like, name=f"{like.name}, {name}", args=other.args, kwargs=other.kwargs)
        if _try_to_add(found, model, call, replace(inputs, real=None), is_leaf):
            return


def _record_parts(
    found: Recordings, model: nn.Module, other: Recording, path: str, training: bool, error: Exception, is_leaf: IsLeaf
) -> None:
    """Record the parts that a module calls, on inputs like those that they were given in the other mode."""
    mode = "train" if training else "eval"
    parts: dict[str, Frame] = {}
    for frame in other.frames:
        above = frame.parent
        if above is not None and above.path == path != frame.path and frame.path not in parts:
            parts[frame.path] = frame
    if not parts:
        text = str(error).strip().split("\n")[0][:200]
        found.failures.append(Failure(path, mode, f"{type(error).__name__}: {text}"))
    for name, frame in parts.items():
        call = Call(f"{mode}, {name} alone", training, frame.args, frame.kwargs)
        try:
            _add(found, model, call, Inputs(frame.args, frame.kwargs), is_leaf, name)
        except ModelRaised as raised:
            _record_parts(found, model, other, name, training, raised.error, is_leaf)


def _contexts(run: Recording, model: nn.Module) -> Iterator[Call]:
    """The same call without gradients and under autocast, where its code asks for them."""
    asked = asks_for(run.codes, model)
    device = next((value.device.type for value in model.parameters()), "cpu")
    if "grad" in asked and run.call.grad:
        yield replace(run.call, name=f"{run.call.name}, no_grad", grad=False)
    if "autocast" in asked:
        yield replace(run.call, name=f"{run.call.name}, autocast", autocast="cpu" if device == "meta" else device)


def _cannot_be_called(model: nn.Module, inputs: Inputs, error: Exception, method: str = "") -> OptionError:
    shapes = [tuple(leaf.shape) if isinstance(leaf, Spec) else leaf for leaf in (*inputs.args, *inputs.kwargs.values())]
    text = str(error).strip().split("\n")[0][:300]
    given = f"example_inputs of {shapes!r:.80}" if inputs.real is not None else f"a guessed input of {shapes!r:.80}"
    way = "give others" if inputs.real is not None else "pass example_inputs that it can be called with"
    name = f"{method} of this {type(model).__name__}" if method else f"this {type(model).__name__}"
    return OptionError(f"{name} cannot be called with {given} ({type(error).__name__}: {text}): {way}")
