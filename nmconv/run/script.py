"""Somebody's script, run as Python itself would run it."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
from types import ModuleType

__all__ = ["run_module", "run_script"]


def run_script(path: str, args: list[str]) -> None:
    """Do what ``python path args`` does.

    The script's module takes the place of ``__main__`` for good, with a file and without a spec: so worker processes
    that are spawned, and whatever pickles, find it there.

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
    """Do what ``python -m name args`` does.

    Raises:
        ImportError: If there is no such module.
    """
    sys.argv = [name, *args]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
