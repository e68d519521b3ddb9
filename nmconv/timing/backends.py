"""Callables that run one forward of a module on a backend."""

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

__all__ = ["BACKENDS", "check_backend", "make_runner"]

BACKENDS = ("eager", "compile", "frozen", "onnxruntime")

_REQUIRED_PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript")}
_unique_numbers = count()


def check_backend(backend: str) -> None:
    """Raise OptionError if a backend does not exist or is not installed."""
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r}: give one of {', '.join(BACKENDS)}")
    missing = [name for name in _REQUIRED_PACKAGES.get(backend, ()) if not _installed(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise OptionError(f"backend={backend!r}: {', '.join(missing)} {verb} not installed: pip install 'nmconv[onnx]'")


def make_runner(module: nn.Module, inputs: tuple[Tensor, ...], backend: str) -> Callable[[], object]:
    """Return a warmed-up callable that runs one forward of a module without gradients.

    Args:
        module: A module in the mode and on the device to run in.
        inputs: Its positional arguments, on the same device. Compiled code is specific to their shapes.
        backend: ``"eager"``; ``"compile"``: ``torch.compile(fullgraph=True)``; ``"frozen"``: the same with
            TorchInductor's freezing (``TORCHINDUCTOR_FREEZING=1``), which treats weights as constants and changes their
            layout once, where a CPU would otherwise do so in every call; or ``"onnxruntime"``: exported by
            ``torch.onnx.export(dynamo=True)``, on the inputs' device, with torch's current number of threads. Inputs
            and outputs are bound once, so that no copy is timed.

    Returns:
        The callable. It returns the module's output, or on ONNX Runtime a flat list of its tensors, which the next call
        overwrites.

    Raises:
        OptionError: If the backend does not exist, is not installed, or cannot run this module.
    """
    check_backend(backend)
    if backend == "eager":
        return _warmed_up(module, inputs)
    try:
        if backend in ("compile", "frozen"):
            from torch._dynamo.eval_frame import reset_code  # type: ignore[attr-defined]
            from torch._inductor import config  # read by Dynamo, too, which ignores options={"freezing": True}

            function = _with_unique_code(module)
            with config.patch(freezing=backend == "frozen"):
                run = _warmed_up(torch.compile(function, fullgraph=True, dynamic=False), inputs)
            # Dynamo keeps compiled code and frozen weights until the code object is reset.
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
    except (ImportError, ValueError):  # ValueError: the entry of sys.modules is None or has no spec
        return False


def _warmed_up(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    for _ in range(2):  # the first call compiles, allocates or selects algorithms
        run()
    return run


def _with_unique_code(module: nn.Module) -> FunctionType:
    """Return the module's forward as a function with its own, uniquely named code object.

    Dynamo stores compiled code, recompile counts and observed sizes by code object and by its name. With a shared one,
    the ninth Sequential would hit the recompile limit, and the second would be compiled for dynamic sizes.
    """

    def forward(*inputs: Tensor) -> Any:
        return module(*inputs)

    code = forward.__code__.replace(co_name=f"forward_{next(_unique_numbers)}")
    return FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
