"""The function mode that records one run of a copy."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from nmconv.copying import Copy
from nmconv.errors import InternalError, ModelTypeError
from nmconv.recording.answers import Answers, ModelRaised, NeedsData, may_need_data
from nmconv.recording.context import recording_marked
from nmconv.recording.forwards import FrameStack, disguise, intercept_calls
from nmconv.recording.leaf_outcomes import Outcome, Outcomes, batch_norm_outcome, function_key, module_key
from nmconv.recording.meta_device import MetaDevice
from nmconv.recording.nodes import NodeBuilder, ReachesModel, user_hook
from nmconv.recording.recording import Call, Recording
from nmconv.recording.tensors import leaf_tensors, map_tensors, tensors_in
from nmconv.recording.torch_functions import (
    FROM_VALUES,
    NEEDS_DATA,
    READS_VALUE,
    SIZE_METHODS,
    SIZE_PROPERTIES,
    VIEW_PROPERTIES,
    called_by_meta_kernel,
    is_metadata_query,
    label_of,
)
from nmconv.recording.tracked_sizes import SizeTracker

__all__ = ["Recorder"]


class Recorder(TorchFunctionMode):
    """Records one run of a copy on the meta device.

    Args:
        copy: The copy, changed in place.
        call: How it is called.
        path: The qualified name of the part that is called.
        is_leaf: Whether a module is one node.
        device: The device that the model's tensors seem to be on.
        answers: Results of calls that depend on data.
        outcomes: A cache of results of leaves; the run adds to it.
    """

    def __init__(
        self,
        copy: Copy,
        call: Call,
        path: str,
        is_leaf: Callable[[nn.Module], bool],
        device: torch.device,
        answers: Answers,
        outcomes: Outcomes,
    ) -> None:
        super().__init__()
        self._model = copy.model
        self._answers = answers
        self._outcomes = outcomes
        self.recording = Recording(call, path, Graph(), {}, answers=answers)
        self._facts = self.recording.facts
        first_names: dict[int, str] = {}
        for name, module in copy.model.named_modules(remove_duplicate=False):
            if first_names.setdefault(id(module), name) != name:
                self.recording.names[name] = first_names[id(module)]
        self._thread = threading.get_ident()
        self._node_depth = 0  # how many calls that are one node are running
        self._frames = FrameStack(self.recording, copy.model, Recorder.run.__code__)
        self._nodes = NodeBuilder(self.recording, copy, self._frames)
        self._meta = MetaDevice(copy, device)
        self._sizes: SizeTracker | None = None
        if call.track_sizes:
            self._sizes = SizeTracker(
                call.flipped, lambda: None if self._node_depth else self._frames.current, lambda: len(self._facts)
            )
            self.recording.comparisons, self.recording.lost_sizes = self._sizes.comparisons, self._sizes.lost_sizes
        self._call_counts: Counter[tuple[str, str]] = Counter()
        # Errors are kept, since the model's code may catch them.
        self._internal_error: BaseException | None = None
        self._reaches_model: ReachesModel | None = None
        self._needs_data = ""
        intercept_calls(copy.model, is_leaf, self._on_call)
        disguise(copy.model, call.disguised)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self) -> Recording:
        """Call the copy and return the recording.

        Raises:
            ModelRaised: If the model's code raises.
            NeedsData: If the run needs a result that ``answers`` does not have.
            ModelTypeError: If the copy uses a tensor of the model itself.
            InternalError: If the recorder fails.
        """
        call = self.recording.call
        model = self._model.get_submodule(self.recording.path)
        args, kwargs = map_tensors(call.args, self._nodes.add_input), map_tensors(call.kwargs, self._nodes.add_input)
        function = model if call.method == "forward" else getattr(model, call.method)
        try:
            with recording_marked(), torch.set_grad_enabled(call.grad), self:
                returned = function(*args, **kwargs)
            with self._internals():
                self._nodes.finish(returned)
        except Exception as error:
            if self._internal_error is None and self._reaches_model is None and not self._needs_data:
                raise ModelRaised(error) from error
        if self._reaches_model is not None:
            raise ModelTypeError(str(self._reaches_model))
        if self._internal_error is not None:
            text = f"{type(self._internal_error).__name__}: {self._internal_error}"
            raise InternalError(f"a bug in nmconv, please report: recording failed with {text}") from (
                self._internal_error
            )
        if self._needs_data:
            raise NeedsData(self._needs_data)
        return self.recording

    @contextmanager
    def _internals(self) -> Iterator[None]:
        """Run the recorder's own code: unrecorded, and its errors are not the model's."""
        try:
            with torch._C.DisableTorchFunction():
                yield
        except ReachesModel as error:
            self._reaches_model = error
            raise
        except Exception as error:
            self._internal_error = self._internal_error or error
            raise

    # -- modules ------------------------------------------------------------------------------------------------------

    def _on_call(self, module: nn.Module, path: str, is_leaf: bool, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._node_depth or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if is_leaf:
            returned = self._call_leaf(module, path, forward, args, kwargs)
        else:
            with self._internals():
                frame = self._frames.enter(module, path, args, kwargs)
            try:
                returned = forward(*args, **kwargs)
            finally:
                self._frames.leave()
            if isinstance(returned, Tensor):
                with self._internals():
                    frame.result = self._nodes.node_of(returned)
        if any(not isinstance(hook, (WeightNorm, SpectralNorm)) for hook in _hooks_of(module)):
            with self._internals():
                node = self._nodes.add_function(user_hook, f"a hook on {path}", (args, kwargs, returned), {})
                self.recording.hook_nodes.append(node)
        return returned

    def _call_leaf(self, module: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self._internals():
            node = self._nodes.add_module(module, path, args, kwargs)
            tensors = tensors_in((args, kwargs))
            if module.training:
                tensors += leaf_tensors(module)
            key = module_key(module, self._facts[node], tensors)
            if key is not None and isinstance(module, nn.modules.batchnorm._BatchNorm) and len(args) == 1:
                counter = module.num_batches_tracked if module.training else None
                self._outcomes.setdefault(key, batch_norm_outcome(args[0], tensors, counter))
        return self._run_node(node, key, tensors, lambda: forward(*args, **kwargs))

    # -- functions ----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._node_depth or called_by_meta_kernel():
            return self._meta.call_inside_node(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._get_property(func, args)
        if is_metadata_query(func):
            return self._query_metadata(func, name, args, kwargs)
        with self._internals():
            label = label_of(func)
            known = self._known_value(name, args)
            if known is not None:
                if self._sizes is not None and self._meta.is_constant(args[0]):  # it may be made of sizes
                    self._sizes.lose(None)
                self._call_counts[label, self._frames.current.path] += 1
                return known[0]
            node = self._nodes.add_function(func, label, args, kwargs)
            meta_func, meta_args, meta_kwargs = self._meta.redirect(func, name, args, kwargs)
            tensors = tensors_in((meta_args, meta_kwargs))
            key = None if func in FROM_VALUES else function_key(func, self._facts[node], tensors)
            if func is F.batch_norm and key is not None:
                self._outcomes.setdefault(key, batch_norm_outcome(meta_args[0], tensors))
        returned = self._run_node(
            node, key, tensors, lambda: self._meta.redirect_result(meta_func, meta_func(*meta_args, **meta_kwargs))
        )
        if name == "__set__":  # x.data = y
            self._nodes.set_node(args[0], node)
        return returned

    def _get_property(self, getter: Any, args: Any) -> Any:
        answer = self._meta.device_query(getter)
        if answer is not None:
            return answer
        owner = getattr(getter, "__self__", None)
        if owner in VIEW_PROPERTIES:
            with self._internals():
                node = self._nodes.add_function(getter, getattr(owner, "__name__", "?"), args, {})
                returned = getter(*args)
                self._nodes.set_result(node, returned, [])
            return returned
        if owner in SIZE_PROPERTIES:
            self._note_size_read(args[0])
            return self._track_sizes(getter(*args))
        return getter(*args)

    def _query_metadata(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name not in SIZE_METHODS or not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        self._note_size_read(args[0])
        value = func(*args, **kwargs)
        if name == "__len__" and self._sizes is not None:
            return self._sizes.read_length(value)
        return self._track_sizes(value)

    def _note_size_read(self, value: Tensor) -> None:
        with self._internals():
            self.recording.sizes_read.add(self._nodes.node_of(value))

    def _track_sizes(self, value: Any) -> Any:
        return value if self._sizes is None else self._sizes.track_queried(value)

    def _known_value(self, name: str, args: Any) -> tuple[Any] | None:
        """Return the number that is read from a buffer or a constant, in a tuple, unless it has been written to."""
        if name not in READS_VALUE or not args or self._nodes.is_written(args[0]):
            return None
        return self._meta.known_value(name, args[0])

    # -- results of calls ---------------------------------------------------------------------------------------------

    def _run_node(self, node: Node, key: Any, tensors: list[Tensor], function: Callable[[], Any]) -> Any:
        """Return the result of a call, from the cache of outcomes or by running it, and note it in the recording."""
        outcome = self._outcomes.get(key)
        if outcome is not None:
            with self._internals():
                returned = outcome.new_tensor()
                self._call_counts[self._facts[node].label, self._facts[node].frame.path] += 1
                self._nodes.set_result(node, returned, [tensors[at] for at in outcome.written])
            return returned
        before = [_version(value) for value in tensors]
        self._node_depth += 1
        try:
            returned = self._run_or_look_up(node, function)
        finally:
            self._node_depth -= 1
        with self._internals():
            written = [value for value, version in zip(tensors, before, strict=True) if _version(value) != version]
            self._nodes.set_result(node, returned, written)
            if key is not None:
                self._outcomes[key] = Outcome.of(returned, tensors, written)
        return returned

    def _run_or_look_up(self, node: Node, function: Callable[[], Any]) -> Any:
        """Run a call, or, where its result depends on data, return what it was in a real run."""
        fact = self._facts[node]
        key = (fact.label, fact.frame.path)
        if fact.label not in NEEDS_DATA:
            try:
                returned = function()
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
                if not may_need_data(error):
                    raise
            else:
                self._call_counts[key] += 1
                return returned
        self._call_counts[key] += 1
        with self._internals():
            answer = self._answers.get((*key, self._call_counts[key]))
            self.recording.data_dependent_calls.append(key)
            if answer is None:
                self._needs_data = f"{fact.label} in {fact.frame.path or 'the model'}"
        if answer is None:
            raise NeedsData(self._needs_data)
        return answer[0]


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
