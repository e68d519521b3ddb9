"""Gradual sites: activations that are mixed with their inputs by a slope s, until the conversion is finished.

The mix is that of VanillaNet's deep training (arXiv 2305.12972, section 3.1): ``(1 - s) * act(x) + s * x``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.errors import OptionError
from nmconv.flow import GRADUAL, held, mixed, mixed_into
from nmconv.planning import Changes, Plan
from nmconv.surgery.placeholders import shallow_copy
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten_class
from nmconv.surgery.slopes import HARD_METHODS, SlopeNames, add_slopes, reset_slope_buffers, slope_name

__all__ = [
    "GradualActivation",
    "appearing_class",
    "check_can_be_gradual",
    "check_hoists_nothing",
    "copy_with_own_children",
    "dropping_class",
    "make_methods_gradual",
]

_RANDOM = ("rrelu",)


# -- forwards of gradual activations -----------------------------------------------------------------------------------


def drops(module: Any, input: Tensor) -> Tensor:
    """Run an activation that is dropped gradually: at slope 1 it returns ``input``, any shape."""
    slope = _current_slope(module)
    activated = type(module)._nmconv_base.forward(module, held(input, slope, 1))
    is_inplace = getattr(module, "inplace", False) is True
    return mixed_into(input, activated, slope) if is_inplace else mixed(input, activated, slope)


def _current_slope(module: Any) -> Tensor:
    """Return the slope of an activation's only site; of two, the second is the one that is called in train mode."""
    second = getattr(module, slope_name(1), None) if module.training else None
    slope: Tensor = getattr(module, slope_name(0)) if second is None else second
    return slope


def appears(module: Any, input: Tensor) -> Tensor:
    """Run an activation that was put where none was: at slope 0 it returns ``input``, any shape."""
    slope = getattr(module, slope_name(0))
    activated = type(module)._nmconv_base.forward(module, held(input, slope, 0))
    return mixed(activated, input.to(activated.dtype), slope)


def apply_and_refill(module: Any, fn: Any, recurse: bool) -> Any:
    """Run ``nn.Module._apply``, then restore the slopes: ``to_empty`` loses and ``half`` rounds them."""
    base: type[nn.Module] = type(module)._nmconv_base
    base._apply(module, fn, recurse)
    reset_slope_buffers(module)
    return module


def _method(name: str, arguments: str, function: Callable[..., Any]) -> RewrittenMethod:
    source = f"def {name}(self, {arguments}):\n    return _{function.__name__}(self, {arguments.partition('=')[0]})\n"
    return RewrittenMethod(name, source, ((f"_{function.__name__}", f"{__name__}:{function.__name__}"),))


_DROPS = _method("forward", "input", drops)
_APPEARS = _method("forward", "input", appears)
_APPLY = _method("_apply", "fn, recurse=True", apply_and_refill)


def dropping_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of an activation that is dropped gradually."""
    return rewritten_class(cls, (_DROPS, _APPLY))


def appearing_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of an activation that appears gradually where none was."""
    return rewritten_class(cls, (_APPEARS, _APPLY))


# -- making modules gradual --------------------------------------------------------------------------------------------


@dataclass
class GradualActivation:
    """An activation module that is about to become gradual.

    Attributes:
        module: The activation.
        cls: Its gradual class.
        action: ``"drop"`` or ``"move"``.
        copies: Whether the identity that replaces it in the end must copy.
        slopes: The slopes of its site; of two sites where it is called differently in train mode.
        device: The device of its slopes.
    """

    module: nn.Module
    cls: type[nn.Module]
    action: str
    copies: bool
    slopes: SlopeNames
    device: torch.device

    def commit(self) -> None:
        """Make the module gradual."""
        self.module.__class__ = self.cls
        self.module.__dict__[GRADUAL] = (self.action, self.copies)
        add_slopes(self.module, self.slopes, self.device)


def make_methods_gradual(
    module: nn.Module,
    methods: tuple[RewrittenMethod, ...],
    hard_methods: tuple[RewrittenMethod, ...],
    slopes: SlopeNames,
    device: torch.device,
) -> None:
    """Replace methods of a module by ones that mix the activations that they call.

    Args:
        module: The module.
        methods: Methods that mix.
        hard_methods: Methods of the hard conversion, which replace them in the end.
        slopes: The slopes of the sites in these methods.
        device: The device of the slopes.
    """
    module.__class__ = rewritten_class(type(module), (*methods, _APPLY))
    module.__dict__[HARD_METHODS] = hard_methods
    add_slopes(module, slopes, device)


def copy_with_own_children(act: nn.Module) -> nn.Module:
    """Return a shallow copy to which parameters, buffers and children can be added without adding them to ``act``."""
    twin = shallow_copy(act)
    for attribute in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[attribute] = dict(act.__dict__[attribute])
    return twin


def check_hoists_nothing(hoists: bool) -> None:
    """Raise OptionError if a gradual conversion is to hoist padding."""
    if hoists:
        raise OptionError(
            "gradual=True with hoist_padding=True: padding moves at once, and at slope 0 the model would not "
            "be the original; convert, or make the plan, with hoist_padding=False"
        )


def check_can_be_gradual(model: nn.Module, plan: Plan, changes: Changes) -> None:
    """Raise OptionError if a plan contains changes that cannot be made gradually."""
    check_hoists_nothing(bool(changes.hoists))
    if plan.branches:
        raise OptionError(
            f"gradual=True and a plan that removes the branch of {', '.join(plan.branches[0].convs)}: a branch is "
            "removed at once; apply the plan without gradual=True"
        )
    for change in changes.made:
        call = change.call
        module = None if call.function else model.get_submodule(call.name)
        names = {call.kind, *(base.__name__ for base in type(module).__mro__)}
        if any(name.lower() in _RANDOM for name in names):
            raise OptionError(
                f"{call.id} is a {call.kind}, which draws random numbers: at slope 1, later calls would draw others "
                "than in the hard conversion; exclude it, or convert without gradual=True"
            )
