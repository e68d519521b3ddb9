"""Which of the models that a script creates is converted, and what is said of each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nmconv.planning import Plan

__all__ = ["Models", "say"]


def say(text: str) -> None:
    """Print a line on stderr, since stdout is the script's; of all ranks, in the first one only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"nmconv.run: {text}", file=sys.stderr, flush=True)


class Models:
    """Converts the first model, or each whose name a pattern names, and keeps account of all.

    Args:
        convert: Converts a model in place; what plan it followed comes back.
        patterns: Globs on names: the whole one, or without what stands before a ``/`` and behind a ``.`` (``resnet50``
            names ``hf-hub:timm/resnet50.a1_in1k``). Case does not count. Empty: the first model, whatever its name.
    """

    def __init__(self, convert: Callable[[nn.Module], Plan], patterns: tuple[str, ...]) -> None:
        self._convert = convert
        self._patterns = tuple(pattern.lower() for pattern in patterns)
        self._left: list[str] = []
        self._tried: list[str] = []
        self._converted = 0
        self._warned = False
        self._first_step = register_optimizer_step_pre_hook(self._warn)

    def built(self, name: str, model: nn.Module) -> nn.Module:
        """The model that the script gets.

        Raises: as :func:`nmconv.convert` does, in the middle of the script.
        """
        if not self._is_meant(name):
            self._left.append(name)
            say(f"{name} stays as it is: {self._why()}")
            return model
        self._tried.append(name)
        plan = self._convert(model)
        self._converted += 1
        self._first_step.remove()
        say(f"{name} is converted: {str(plan).splitlines()[0]}")
        return model

    @property
    def problem(self) -> str | None:
        """What is wrong if no model was converted."""
        if self._converted:
            return None
        if self._tried:
            return f"no model was converted: {', '.join(self._tried)} could not be, and the script went on without"
        if self._left:
            return f"no model was converted: --match names none of {', '.join(dict.fromkeys(self._left))}"
        return (
            "no model was converted: none was created by timm's or torchvision's builders in this process (a class "
            "called directly is not seen, nor are processes that the script starts: use torchrun -m nmconv.run)"
        )

    def _is_meant(self, name: str) -> bool:
        if not self._patterns:
            return not self._converted
        names = (name.lower(), name.lower().rpartition("/")[2].partition(".")[0])
        return any(fnmatchcase(text, pattern) for text in names for pattern in self._patterns)

    def _why(self) -> str:
        return "--match does not name it" if self._patterns else "the first model is converted, this one came later"

    def _warn(self, *step: Any) -> None:
        """Called before each step of any optimizer until a model is converted."""
        if not self._warned:
            self._warned = True  # removing the hook is not allowed while hooks are called
            say(f"warning: training has begun, and {self.problem}")
