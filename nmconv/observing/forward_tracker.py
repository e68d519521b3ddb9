"""Track a running model: which forwards are active, and how often each has made each call so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from nmconv.recording import label_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ForwardTracker", "Hook"]


class Hook:
    """A temporary hook: copies and pickles of its module contain a hook that does nothing.

    Args:
        call: The hook's function; None, as in copies, for a hook that does nothing.
    """

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the function, if there is one."""
        if self._call is not None:
            self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class ForwardTracker:
    """Keep the stack of active forwards, and call a method for every function that is called on tensors.

    Hooks are on the model only between ``__enter__`` and ``__exit__``, and are active only within :meth:`running`.
    Subclasses override :meth:`calling` and :meth:`called`.

    Args:
        model: The model, in the mode to run it in.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks = ExitStack()  # removes all hooks, even if removing one of them fails
        self._is_running = False
        self._stack: list[str] = []
        self._counts: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        try:
            self._hook()
        except BaseException:
            self._hooks.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Track one forward."""
        self._stack, self._counts = [], {}
        self._is_running = True
        try:
            with _FunctionCalls(self):
                yield
        finally:
            self._is_running = False

    def calling(self, name: str, args: Any, kwargs: Any) -> None:
        """Handle the call of a function of this name in the active forward, before it runs."""

    def called(self, name: str, result: Any) -> Any:
        """Handle the result of a function of this name in the active forward; return what replaces the result."""
        return result

    def _hook(self) -> None:
        names = {id(module): name for name, module in reversed(list(self._model.named_modules()))}
        for module in dict.fromkeys(self._model.modules()):
            name = names[id(module)]
            self._add(module.register_forward_pre_hook(Hook(self._entering(name)), prepend=True))
            # Also called if the forward fails, so that the stack stays consistent.
            self._add(module.register_forward_hook(Hook(self._leaving), always_call=True))

    def _add(self, handle: RemovableHandle) -> None:
        self._hooks.callback(handle.remove)

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not self._is_running:
                return
            self._stack.append(name)
            for key in [key for key in self._counts if key[0] == name]:
                del self._counts[key]

        return hook

    def _leaving(self, *_: object) -> None:
        if self._stack:
            self._stack.pop()

    def _count(self, owner: str, label: str) -> int:
        """Count one more call of ``label`` in the owner's forward, and return its number, from 1."""
        key = (owner, label)
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key]


class _FunctionCalls(TorchFunctionMode):
    """Reports every function that is called on tensors to a tracker."""

    def __init__(self, tracker: ForwardTracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = label_of(function)
        self._tracker.calling(name, args, kwargs or {})
        result = function(*args, **(kwargs or {}))
        return self._tracker.called(name, result)
