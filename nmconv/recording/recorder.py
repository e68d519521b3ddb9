"""The function mode that records a copy's run."""

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
from nmconv.recording.answers import ASKS_DATA, Answers, ModelRaised, NeedsData
from nmconv.recording.context import noted
from nmconv.recording.frames import Frames
from nmconv.recording.functions import VIEWS, is_inside, label_of, not_recorded
from nmconv.recording.leaf_outcomes import Outcome, Outcomes, key_of_function, key_of_module, outcome_of_norm
from nmconv.recording.meta_device import ASKS_VALUE, OnMeta, makes_of_values
from nmconv.recording.nodes import Nodes, ReachesOutside, hook_sees
from nmconv.recording.recording import Call, Recording, map_tensors
from nmconv.recording.size_questions import SizeQuestions
from nmconv.recording.tensors import own_tensors, tensors_in
from nmconv.recording.wrapping import disguise, wrap

__all__ = ["Recorder"]

_SIZES = ("size", "stride", "numel", "nelement", "__len__")
_MEASURES = (Tensor.shape, Tensor.nbytes)


class Recorder(TorchFunctionMode):
    """Records one run of a copy.

    Args:
        copy: Of the model.
        call: How it is called.
        path: Which part of it is called.
        is_leaf: Whether a module is one node.
        device: What the model's tensors are asked for.
        answers: What data decide.
        outcomes: What leaves gave before; added to.
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
        first: dict[int, str] = {}
        for name, module in copy.model.named_modules(remove_duplicate=False):
            if first.setdefault(id(module), name) != name:
                self.recording.names[name] = first[id(module)]
        self._thread = threading.get_ident()
        self._depth = 0  # of calls that are one node, whatever they call
        self._frames = Frames(self.recording, copy.model, Recorder.run.__code__)
        self._nodes = Nodes(self.recording, copy, self._frames)
        self._meta = OnMeta(copy, device)
        self._questions: SizeQuestions | None = None
        if call.asks:
            self._questions = SizeQuestions(
                call.other_way, lambda: None if self._depth else self._frames.now, lambda: len(self._facts)
            )
            self.recording.questions, self.recording.lost = self._questions.asked, self._questions.lost
        self._times: Counter[tuple[str, str]] = Counter()
        self._fault: BaseException | None = None
        self._outside: ReachesOutside | None = None
        self._needs = ""
        wrap(copy.model, is_leaf, self._forwarded)
        disguise(copy.model, call.disguised)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self) -> Recording:
        """Call the copy and note all that happens.

        Raises:
            ModelRaised: If the model's code raises.
            NeedsData: If the run asks for numbers that ``answers`` does not have.
            ModelTypeError: If the copy reaches a tensor of the model itself.
            InternalError: If the recorder fails.
        """
        call = self.recording.call
        model = self._model.get_submodule(self.recording.path)
        args, kwargs = map_tensors(call.args, self._nodes.input), map_tensors(call.kwargs, self._nodes.input)
        function = model if call.method == "forward" else getattr(model, call.method)
        try:
            with noted(), torch.set_grad_enabled(call.grad), self:
                returned = function(*args, **kwargs)
            with self._ours():
                self._nodes.finish(returned)
        except Exception as error:
            if self._fault is None and self._outside is None and not self._needs:
                raise ModelRaised(error) from error
        if self._outside is not None:
            raise ModelTypeError(str(self._outside))
        if self._fault is not None:
            text = f"{type(self._fault).__name__}: {self._fault}"
            raise InternalError(f"a bug in nmconv, please report: recording failed with {text}") from self._fault
        if self._needs:
            raise NeedsData(self._needs)
        return self.recording

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """Whatever goes wrong inside is a fault of this library, not of the model's."""
        try:
            with torch._C.DisableTorchFunction():
                yield
        except ReachesOutside as error:
            self._outside = error
            raise
        except Exception as error:
            self._fault = self._fault or error
            raise

    # -- modules ------------------------------------------------------------------------------------------------------

    def _forwarded(self, module: nn.Module, path: str, leaf: bool, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._depth or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if not leaf:
            with self._ours():
                frame = self._frames.enter(module, path, args, kwargs)
            try:
                returned = forward(*args, **kwargs)
            finally:
                self._frames.leave()
            if isinstance(returned, Tensor):
                with self._ours():
                    frame.result = self._nodes.of(returned)
        else:
            returned = self._leaf(module, path, forward, args, kwargs)
        if any(not isinstance(hook, (WeightNorm, SpectralNorm)) for hook in _hooks_of(module)):
            with self._ours():
                shown = self._nodes.function(hook_sees, f"a hook on {path}", (args, kwargs, returned), {})
                self.recording.seen.append(shown)
        return returned

    def _leaf(self, module: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self._ours():
            node = self._nodes.module(module, path, args, kwargs)
            tensors = tensors_in((args, kwargs))
            if module.training:
                tensors += [value for _, value in own_tensors(module)]
            key = key_of_module(module, self._facts[node], tensors)
            if key is not None and isinstance(module, nn.modules.batchnorm._BatchNorm) and len(args) == 1:
                counter = module.num_batches_tracked if module.training else None
                self._outcomes.setdefault(key, outcome_of_norm(args[0], tensors, counter))
        return self._called(node, key, tensors, lambda: forward(*args, **kwargs))

    # -- functions ----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._depth or is_inside():
            return self._meta.inside(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args)
        if not_recorded(func):
            if name in _SIZES and args and isinstance(args[0], Tensor):
                self._note_sized(args[0])
                value = func(*args, **kwargs)
                if name == "__len__" and self._questions is not None:  # which must be a plain number
                    return self._questions.number(value)
                return self._sizes(value)
            return func(*args, **kwargs)
        with self._ours():
            label = label_of(func)
            known = self._known_value(name, args)
            if known is not None:
                if self._questions is not None and self._meta.is_of_values(args[0]):  # sizes may be in it
                    self._questions.lose(None)
                self._times[label, self._frames.now.path] += 1
                return known[0]
            node = self._nodes.function(func, label, args, kwargs)
            target, given, named = self._meta.call(func, name, args, kwargs)
            tensors = tensors_in((given, named))
            key = None if makes_of_values(func) else key_of_function(func, self._facts[node], tensors)
            if func is F.batch_norm and key is not None:
                self._outcomes.setdefault(key, outcome_of_norm(given[0], tensors))
        returned = self._called(node, key, tensors, lambda: self._meta.returned(target, target(*given, **named)))
        if name == "__set__":  # x.data = y
            self._nodes.let_be(args[0], node)
        return returned

    def _property(self, func: Any, args: Any) -> Any:
        answer = self._meta.about_device(func)
        if answer is not None:
            return answer
        owner = getattr(func, "__self__", None)
        if owner not in VIEWS:
            if owner not in _MEASURES:
                return func(*args)
            self._note_sized(args[0])
            return self._sizes(func(*args))
        with self._ours():
            node = self._nodes.function(func, getattr(owner, "__name__", "?"), args, {})
            returned = func(*args)
            self._nodes.bind(node, returned, [])
        return returned

    def _note_sized(self, value: Tensor) -> None:
        with self._ours():
            self.recording.sized.add(self._nodes.of(value))

    def _sizes(self, value: Any) -> Any:
        return value if self._questions is None else self._questions.hand_out(value)

    def _known_value(self, name: str, args: Any) -> tuple[Any] | None:
        """The value of a tensor that nothing has written to, where it is known: a buffer's, a constant's."""
        if name not in ASKS_VALUE or not args or self._nodes.is_written(args[0]):
            return None
        return self._meta.known_value(name, args[0])

    # -- what calls give ----------------------------------------------------------------------------------------------

    def _called(self, node: Node, key: Any, tensors: list[Tensor], do: Callable[[], Any]) -> Any:
        """What a call gives: what it gave before on tensors of the same kinds, or what it gives now."""
        outcome = self._outcomes.get(key)
        if outcome is not None:
            with self._ours():
                returned = outcome.returned()
                self._times[self._facts[node].label, self._facts[node].frame.path] += 1
                self._nodes.bind(node, returned, [tensors[at] for at in outcome.written])
            return returned
        before = [_version(value) for value in tensors]
        self._depth += 1
        try:
            returned = self._tried(node, do)
        finally:
            self._depth -= 1
        with self._ours():
            written = [value for value, version in zip(tensors, before, strict=True) if _version(value) != version]
            self._nodes.bind(node, returned, written)
            if key is not None:
                self._outcomes[key] = Outcome.of(returned, tensors, written)
        return returned

    def _tried(self, node: Node, do: Callable[[], Any]) -> Any:
        """What a call gives; where only data can tell, what they told a real run."""
        fact = self._facts[node]
        asks = fact.label in ASKS_DATA
        key = (fact.label, fact.frame.path)
        if not asks:
            try:
                returned = do()
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
                if not self._answers.may_know(error):
                    raise
            else:
                self._times[key] += 1
                return returned
        self._times[key] += 1
        with self._ours():
            found = self._answers.get((*key, self._times[key]))
            self.recording.asked.append(key)
            if found is None:
                self._needs = f"{fact.label} in {fact.frame.path or 'the model'}"
        if found is None:
            raise NeedsData(self._needs)
        return found[0]


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
