"""Record one call of a model, after a real run on a copy if its results depend on data."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nmconv.copying import copy_with_tensors, meta_copy
from nmconv.recording.answers import Answers, ModelRaised, NeedsData
from nmconv.recording.context import context_restored, recording_marked, uncompiled
from nmconv.recording.forwards import intercept_calls
from nmconv.recording.leaf_outcomes import Outcomes, cached_outcomes
from nmconv.recording.recorder import Recorder
from nmconv.recording.recording import Call, Recording
from nmconv.recording.rng_state import rng_seeded
from nmconv.recording.tensors import Spec, device_of, map_tensors
from nmconv.recording.torch_functions import is_metadata_query, label_of
from nmconv.recording.user_caches import caches_restored

__all__ = ["IsLeaf", "RealArguments", "record_again", "record_call", "record_with_data"]

IsLeaf = Callable[[nn.Module], bool]
RealArguments = tuple[tuple[Any, ...], dict[str, Any]]


def record_again(model: nn.Module, run: Recording, is_leaf: IsLeaf) -> Recording:
    """Record a model in the same call, and with the same answers, as another model's recording.

    Args:
        model: Read only.
        run: The other model's recording.
        is_leaf: Whether a module is one node.

    Raises:
        NeedsData: If a result depends on data that the other model's did not depend on.
        ModelRaised: If the model's code raises.
    """
    return record_call(model, run.call, run.path, is_leaf, run.answers)


def record_call(model: nn.Module, call: Call, path: str, is_leaf: IsLeaf, answers: Answers) -> Recording:
    """Record one call of a model or of a part of it.

    Args:
        model: Read only.
        call: How it is called.
        path: The qualified name of the part that is called.
        is_leaf: Whether a module is one node.
        answers: Results of calls that depend on data.

    Raises:
        NeedsData: If the run needs a result that ``answers`` does not have.
        ModelRaised: If the model's code raises.
    """
    while True:
        try:
            return _record(model, call, path, is_leaf, answers, cached_outcomes())
        except ModelRaised as raised:
            if not _is_patched_by_fx(raised.error):
                break
        time.sleep(0.01)
    # Outcomes from the cache lack the autograd graph, which the model's code may have used.
    return _record(model, call, path, is_leaf, answers, {})


def _is_patched_by_fx(error: Exception) -> bool:
    """Return whether an error arose because another thread was tracing with torch.fx, which patches ``nn.Module``."""
    return isinstance(error, NameError) and "is not installed as a submodule" in str(error)


def _record(
    model: nn.Module, call: Call, path: str, is_leaf: IsLeaf, answers: Answers, outcomes: Outcomes
) -> Recording:
    device = device_of(model)
    apparent_device = torch.device("cpu") if device.type == "meta" else device
    copy = meta_copy(model)
    with recording_marked():
        copy.model.train(call.training)
    recorder = Recorder(copy, call, path, is_leaf, apparent_device, answers, outcomes)
    autocast = torch.autocast(call.autocast) if call.autocast else nullcontext()
    with (
        caches_restored(copy.model),
        rng_seeded(),
        uncompiled(),
        context_restored(),
        torch.inference_mode(False),
        autocast,
    ):
        return recorder.run()


def record_with_data(model: nn.Module, call: Call, path: str, is_leaf: IsLeaf, real: RealArguments | None) -> Recording:
    """Record one call of a model or of a part of it; where results depend on data, take them from one real run.

    Args:
        model: Read only.
        call: How it is called.
        path: The qualified name of the part that is called.
        is_leaf: Whether a module is one node.
        real: Arguments of the real run with the user's tensors; None for random ones.

    Raises:
        ModelRaised: If the model's code raises, or if the results cannot be found.
    """
    try:
        return record_call(model, call, path, is_leaf, Answers())
    except NeedsData as error:
        if any(value.is_meta for value in model.parameters()):
            text = f"{error} depends on data, and a model on the meta device has none: load its weights first"
            raise ModelRaised(RuntimeError(text)) from None
        with rng_seeded(), uncompiled():
            answers = _run_for_answers(model, call, path, is_leaf, real)
        try:
            return record_call(model, call, path, is_leaf, answers)
        except NeedsData as again:
            raise ModelRaised(RuntimeError(f"{again} depends on data that differ from call to call")) from None


def _run_for_answers(model: nn.Module, call: Call, path: str, is_leaf: IsLeaf, real: RealArguments | None) -> Answers:
    """Run a copy of the model with real tensors and return what each call returned."""
    device = device_of(model)
    generator = torch.Generator().manual_seed(0)

    def new_tensor(value: Tensor | Spec) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if value.dtype.is_floating_point:
            return torch.rand(value.shape, generator=generator, dtype=value.dtype).to(device)
        return torch.zeros(value.shape, dtype=value.dtype, device=device)

    args, kwargs = map_tensors((call.args, call.kwargs) if real is None else real, new_tensor)
    model_copy = copy_with_tensors(model).model
    model_copy.train(call.training)
    recorder = _AnswerRecorder()
    intercept_calls(model_copy, is_leaf, recorder.on_call)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), recorder:
        torch.manual_seed(0)
        part = model_copy.get_submodule(path)
        function = part if call.method == "forward" else getattr(part, call.method)
        try:
            function(*args, **kwargs)
        except Exception as error:
            raise ModelRaised(error) from error
    return recorder.answers


class _AnswerRecorder(TorchFunctionMode):
    """Records the results of the calls that :class:`Recorder` makes nodes of, and counts the calls like it."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = Answers()
        self._paths = [""]
        self._call_counts: Counter[tuple[str, str]] = Counter()
        self._node_depth = 0
        self._thread = threading.get_ident()

    def on_call(self, module: nn.Module, path: str, is_leaf: bool, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run a module's forward."""
        if self._node_depth or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if is_leaf:
            return self._run_node(path, lambda: forward(*args, **kwargs))
        self._paths.append(path)
        try:
            return forward(*args, **kwargs)
        finally:
            self._paths.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._node_depth or is_metadata_query(func):
            return func(*args, **(kwargs or {}))
        return self._run_node(label_of(func), lambda: func(*args, **(kwargs or {})))

    def _run_node(self, label: str, function: Callable[[], Any]) -> Any:
        self._node_depth += 1
        try:
            returned = function()
        finally:
            self._node_depth -= 1
        key = (label, self._paths[-1])
        self._call_counts[key] += 1
        self.answers.add((*key, self._call_counts[key]), returned)
        return returned
