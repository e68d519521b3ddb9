"""Choose which of a script's models to convert, and report on each."""

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
    """Print a line on stderr (stdout belongs to the script), on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"nmconv.run: {text}", file=sys.stderr, flush=True)


class Models:
    """Convert a script's first model, or each model whose name matches a pattern, and keep a record of all.

    Args:
        convert: Converts a model in place and returns the plan.
        patterns: Globs, case-insensitive. Each is matched against the whole name and against the name without the
            part up to the last ``/`` and the part from the first ``.`` on: ``resnet50`` matches
            ``hf-hub:timm/resnet50.a1_in1k``. Empty: convert the first model, whatever its name.
    """

    def __init__(self, convert: Callable[[nn.Module], Plan], patterns: tuple[str, ...]) -> None:
        self._convert = convert
        self._patterns = tuple(pattern.lower() for pattern in patterns)
        self._skipped: list[str] = []
        self._attempted: list[str] = []
        self._unchanged: list[str] = []
        self._converted_count = 0
        self._has_warned = False
        self._first_step_hook = register_optimizer_step_pre_hook(self._warn_at_first_step)

    def on_built(self, name: str, model: nn.Module) -> nn.Module:
        """Return the model that the script gets, converted if it is selected.

        Raises:
            NmconvError: As raised by :func:`nmconv.convert`, from the script's call of the builder.
        """
        if not self._is_selected(name):
            self._skipped.append(name)
            say(f"{name} stays as it is: {self._skip_reason()}")
            return model
        self._attempted.append(name)
        plan = self._convert(model)
        if not plan.changes_any:
            self._unchanged.append(self._attempted.pop())
            say(f"{name} stays as it is: {plan.ratio} drops nothing of it")
            return model
        self._converted_count += 1
        self._first_step_hook.remove()
        say(f"{name} is converted: {str(plan).splitlines()[0]}")
        return model

    @property
    def problem(self) -> str | None:
        """Why no model has been converted, or None if one has."""
        if self._converted_count:
            return None
        if self._attempted:
            return f"no model was converted: {', '.join(self._attempted)} raised an error, which the script caught"
        if self._unchanged:
            return f"no model was converted: nothing is dropped of {', '.join(dict.fromkeys(self._unchanged))}"
        if self._skipped:
            return f"no model was converted: --match names none of {', '.join(dict.fromkeys(self._skipped))}"
        return (
            "no model was converted: none was created by timm's or torchvision's builders in this process (a class "
            "called directly is not seen, nor are processes that the script starts: use torchrun -m nmconv.run)"
        )

    def _is_selected(self, name: str) -> bool:
        if not self._patterns:
            return not self._converted_count
        names = (name.lower(), name.lower().rpartition("/")[2].partition(".")[0])
        return any(fnmatchcase(text, pattern) for text in names for pattern in self._patterns)

    def _skip_reason(self) -> str:
        return "--match does not name it" if self._patterns else "the first model is converted, this one came later"

    def _warn_at_first_step(self, *hook_args: Any) -> None:
        """Warn once. The hook runs before each step of any optimizer until a model has been converted."""
        if not self._has_warned:
            self._has_warned = True  # a hook cannot be removed while hooks run
            say(f"warning: training has begun, and {self.problem}")
