"""Run a script or module in this process as Python itself would."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
from types import ModuleType

__all__ = ["run_module", "run_script"]


def run_script(path: str, args: list[str]) -> None:
    """Run a file as ``python path args`` would.

    The script's module stays in place as ``__main__`` afterwards, with a file and without a spec, so that spawned
    worker processes and pickling find it there.

    Raises:
        OSError: If the file cannot be read.
    """
    file = os.path.abspath(path)
    with io.open_code(file) as opened:
        code = compile(opened.read(), file, "exec")
    module = ModuleType("__main__")
    vars(module).update(__file__=file, __builtins__=builtins)
    sys.modules["__main__"] = module
    sys.argv = [path, *args]
    if not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    exec(code, vars(module))


def run_module(name: str, args: list[str]) -> None:
    """Run a module as ``python -m name args`` would.

    Raises:
        ImportError: If there is no such module.
    """
    sys.argv = [name, *args]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
