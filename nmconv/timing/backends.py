"""One forward of a module on one backend, as a callable."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.errors import OptionError

__all__ = ["BACKENDS", "require", "runner"]

BACKENDS = ("eager", "compile", "frozen", "onnxruntime")

_NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript")}
_numbers = count()


def require(backend: str) -> None:
    """Refuse a backend that does not exist or is not installed.

    Raises:
        OptionError: Naming the backend, and what to choose or install.
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r}: give one of {', '.join(BACKENDS)}")
    missing = [name for name in _NEEDS.get(backend, ()) if not _installed(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise OptionError(f"backend={backend!r}: {', '.join(missing)} {verb} not installed: pip install 'nmconv[onnx]'")


def runner(module: nn.Module, inputs: tuple[Tensor, ...], backend: str) -> Callable[[], object]:
    """A callable that runs one forward of a module, without gradients, and has run it before.

    Args:
        module: In the mode and on the device it is to be run on.
        inputs: Its arguments, on the same device; what is timed is this shape.
        backend: ``"eager"``; ``"compile"``: ``torch.compile(fullgraph=True)`` for this shape; ``"frozen"``: the same
            with TorchInductor's freezing (``TORCHINDUCTOR_FREEZING=1``), which takes weights for constants and lays
            them out once, where a CPU else does so in every call; or ``"onnxruntime"``: exported by
            ``torch.onnx.export(dynamo=True)`` for this shape, on the inputs' device, with as many threads
            as torch now has. Inputs and outputs are bound once: no copy is timed.

    Returns:
        The callable. It returns what the module returns; on ONNX Runtime the flat list of its tensors, which the next
        call overwrites.

    Raises:
        OptionError: For a backend that does not exist, is not installed, or cannot run this module.
    """
    require(backend)
    if backend == "eager":
        return _warm(module, inputs)
    try:
        if backend in ("compile", "frozen"):
            from torch._dynamo.eval_frame import reset_code  # type: ignore[attr-defined]
            from torch._inductor import config  # Dynamo reads it too: options={"freezing": True} would not do

            function = _own_code(module)
            with config.patch(freezing=backend == "frozen"):
                run = _warm(torch.compile(function, fullgraph=True, dynamic=False), inputs)
            # Dynamo keeps what it compiled, frozen weights and all, until it is told to let go.
            weakref.finalize(run, reset_code, function.__code__).atexit = False
            return run
        from nmconv.timing.onnx import session_runner

        return session_runner(module, inputs)
    except OptionError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = type(module).__name__
        raise OptionError(f"backend={backend!r} cannot run this {name}, choose another: {first}") from error


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: an entry of sys.modules that is None, or has no spec
        return False


def _warm(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    for _ in range(2):  # the first call compiles, allocates or chooses algorithms
        run()
    return run


def _own_code(module: nn.Module) -> FunctionType:
    """The module's forward behind a code object of its own.

    Dynamo keeps what it compiled, how often, and which sizes it saw, by code object and by its name: without this the
    ninth Sequential would hit the recompile limit, and the second would be compiled for any size.
    """

    def forward(*inputs: Tensor) -> Any:
        return module(*inputs)

    code = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    return FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
