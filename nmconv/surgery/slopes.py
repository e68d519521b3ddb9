"""Slopes of gradual sites: how modules store them, and how to read and set them.

Each gradual site has one slope s: 0 is the original, 1 the hard conversion. It is a buffer, outside the state dict, of
the activation module or of the module whose method calls the activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nmconv.errors import NmconvError, OptionError
from nmconv.flow import GRADUAL
from nmconv.surgery.checks import check_is_module, plan_of

__all__ = [
    "HARD_METHODS",
    "SlopeNames",
    "add_slopes",
    "check_finished",
    "check_gradual",
    "check_slope",
    "get_slopes",
    "is_dropping",
    "is_slope",
    "nearest_device",
    "remove_slopes",
    "reset_slope_buffers",
    "set_slope",
    "slope_name",
    "slopes_of",
]

_SLOPES = "_nmconv_slopes"  # on a module: maps the name of each slope's buffer to the site's id and the slope
HARD_METHODS = "_nmconv_hard"  # on a module whose methods mix: those of the hard conversion
_PREFIX = "_nmconv_slope_"

SlopeNames = dict[str, str]  # maps the ids of sites to the names of their slopes' buffers, within one module


class _Slope(NamedTuple):
    """A slope, its site's id, and the buffer that holds it."""

    module: nn.Module
    buffer: str
    site: str
    value: float


# -- storage -----------------------------------------------------------------------------------------------------------


def slope_name(number: int) -> str:
    """Return the buffer name of a module's slope with the given number, from 0."""
    return f"{_PREFIX}{number}"


def is_slope(name: str) -> bool:
    """Return whether a buffer's qualified name is that of a slope."""
    return name.rpartition(".")[2].startswith(_PREFIX)


def add_slopes(module: nn.Module, names: SlopeNames, device: torch.device) -> None:
    """Register slopes on a module, all 0."""
    for name in names.values():
        module._buffers[name] = _buffer(0.0, device)
    module.__dict__["_non_persistent_buffers_set"] = {*module._non_persistent_buffers_set, *names.values()}
    module.__dict__[_SLOPES] = {name: (site, 0.0) for site, name in names.items()}


def remove_slopes(module: nn.Module) -> None:
    """Remove all slopes from a module."""
    names = module.__dict__.pop(_SLOPES)
    for name in names:
        del module._buffers[name]
    module.__dict__["_non_persistent_buffers_set"] = module._non_persistent_buffers_set - names.keys()


def reset_slope_buffers(module: nn.Module) -> None:
    """Write a module's slopes to its buffers again, on the buffers' devices."""
    for name, (_, value) in module.__dict__[_SLOPES].items():
        module._buffers[name] = _buffer(value, module._buffers[name].device)  # type: ignore[union-attr]


def _buffer(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def slopes_of(model: nn.Module) -> Iterator[_Slope]:
    """Yield all slopes in a model."""
    for module in model.modules():
        for name, (site, value) in module.__dict__.get(_SLOPES, {}).items():
            yield _Slope(module, name, site, value)


def is_dropping(module: nn.Module) -> bool:
    """Return whether a module is an activation that is dropped gradually."""
    return bool(vars(module).get(GRADUAL, ("",))[0] == "drop")


def nearest_device(model: nn.Module, path: str) -> torch.device:
    """Return the device of a submodule's tensors, or of the innermost module around it that has tensors."""
    while True:
        module = model.get_submodule(path)
        for value in (*module.parameters(), *module.buffers()):
            return value.device
        if not path:
            return torch.device("cpu")
        path = path.rpartition(".")[0]


# -- reading and setting -----------------------------------------------------------------------------------------------


def get_slopes(model: nn.Module) -> dict[str, float]:
    """Return the slopes of a gradual model.

    Args:
        model: The result of ``nmconv.convert(..., gradual=True)``, or a module that contains it.

    Returns:
        Maps the id of each gradual site, as in the plan, to its slope: 0 is the original, 1 the hard conversion. Empty
        for other models.

    Raises:
        ModelTypeError: If ``model`` is not a module.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> nmconv.get_slopes(nmconv.convert(model, "2:1", gradual=True))
        {'3#1': 0.0}
    """
    check_is_module(model)
    return {slope.site: slope.value for slope in slopes_of(model)}


def set_slope(model: nn.Module, s: float | Mapping[str, float]) -> None:
    """Set the slopes of a gradual model, in place.

    The model may be compiled or wrapped; it is not recompiled.

    Args:
        model: The result of ``nmconv.convert(..., gradual=True)``, or a module that contains it.
        s: One slope for all sites, from 0, the original, to 1, the hard conversion; or a mapping from the ids of sites,
            as in the plan, to slopes: other sites keep theirs.

    Raises:
        OptionError: If a slope is not a number from 0 to 1, there is no such site, or the model is not gradual.
        ModelTypeError: If ``model`` is not a module.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> model = nmconv.convert(model, "2:1", gradual=True)
        >>> nmconv.set_slope(model, {"3#1": 0.5})
        >>> nmconv.get_slopes(model)
        {'3#1': 0.5}
    """
    current = check_gradual(model, "set the slope of")
    new = dict(s) if isinstance(s, Mapping) else dict.fromkeys(current, s)
    for site, value in new.items():
        if site not in current:
            examples = ", ".join(list(current)[:5])
            raise OptionError(
                f"{site!r} is not a gradual site of this {type(model).__name__}: give one of {examples}, …"
            )
        check_slope(value)
    with torch.no_grad():
        for module, name, site, _ in list(slopes_of(model)):
            if site in new:
                value = float(new[site])
                module.__dict__[_SLOPES][name] = (site, value)
                module._buffers[name].fill_(value)  # type: ignore[union-attr]


def check_slope(value: Any) -> None:
    """Raise OptionError unless the value is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise OptionError(f"a slope of {value!r}: give a number from 0, the original, to 1, the hard conversion")


def check_gradual(model: nn.Module, action: str, *, or_unchanged: bool = False) -> dict[str, float]:
    """Return a gradual model's slopes.

    Args:
        model: What the user passed.
        action: What the caller does with it, for the message: ``set the slope of``.
        or_unchanged: Whether a model whose plan changes nothing, and which has no slopes, is allowed.

    Raises:
        OptionError: If it has no gradual sites.
        ModelTypeError: If it is not a module.
    """
    slopes = get_slopes(model)
    if not slopes:
        plans = [plan for module in model.modules() if (plan := plan_of(module)) is not None]
        if plans and not any(plan.changes_any for plan in plans):
            if or_unchanged:
                return slopes
            raise OptionError(
                f"the plan of this {type(model).__name__}, at {plans[0].ratio}, drops nothing, so that there is no "
                "slope to set: convert at another ratio"
            )
        raise OptionError(
            f"this {type(model).__name__} has no gradual sites: {action} what nmconv.convert(..., gradual=True) "
            "returned"
        )
    return slopes


def check_finished(model: nn.Module, error: type[NmconvError]) -> None:
    """Raise an error of the given class if a model has gradual sites."""
    slope = next(slopes_of(model), None)
    if slope is not None:
        raise error(
            f"this {type(model).__name__} is gradual ({slope.site} and others are mixed): call finish() first, as "
            "nmconv.Gradual(model, 1, end=0).finish() does"
        )
