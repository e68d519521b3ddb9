"""Gradual sites: activations that are mixed with their inputs by a slope, until they are finished.

Each site has one slope s: 0 is the original, 1 the hard conversion (the deep training of VanillaNet, arXiv 2305.12972,
section 3.1: ``(1 - s) * act(x) + s * x``). It is a buffer of the activation, or of the module whose method calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.errors import ModelTypeError, NmconvError, OptionError
from nmconv.flow import GRADUAL, held, mixed, mixed_into
from nmconv.planning import Changes, Plan
from nmconv.surgery.checks import check_plain
from nmconv.surgery.placeholders import WAS, hooked_apart, identity_for, keeps_something, passing
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten

__all__ = [
    "Mixing",
    "appearing",
    "begin",
    "begin_methods",
    "check_can_be_gradual",
    "check_finished",
    "check_gradual",
    "check_hoists_nothing",
    "check_slope",
    "device_near",
    "dropping",
    "finish_sites",
    "get_slopes",
    "is_dropping",
    "is_slope",
    "own_copy",
    "set_slope",
    "slope_name",
]

_SLOPES = "_nmconv_slopes"  # on a module: from the names of its slopes' buffers to pairs of a site's id and a number
_HARD = "_nmconv_hard"  # on a module with rewritten methods: those of the hard conversion
_BUFFER = "_nmconv_slope_"
_RANDOM = ("rrelu",)

Mixing = dict[str, str]  # from the ids of sites to the names of their slopes' buffers, in one module


# -- what runs ---------------------------------------------------------------------------------------------------------


def drops(module: Any, input: Tensor) -> Tensor:
    """The forward of an activation that goes: at slope 1 it hands on ``input``, any shape."""
    slope = _slope_now(module)
    made = type(module)._nmconv_base.forward(module, held(input, slope, 1))
    into = getattr(module, "inplace", False) is True
    return mixed_into(input, made, slope) if into else mixed(input, made, slope)


def _slope_now(module: Any) -> Tensor:
    """The slope of an activation's one site, or of that which is called in its mode."""
    other = getattr(module, f"{_BUFFER}1", None) if module.training else None
    slope: Tensor = getattr(module, f"{_BUFFER}0") if other is None else other
    return slope


def appears(module: Any, input: Tensor) -> Tensor:
    """The forward of an activation that was put where none was: at slope 0 it hands on ``input``, any shape."""
    slope = getattr(module, f"{_BUFFER}0")
    made = type(module)._nmconv_base.forward(module, held(input, slope, 0))
    return mixed(made, input.to(made.dtype), slope)


def apply_and_refill(module: Any, fn: Any, recurse: bool) -> Any:
    """``nn.Module._apply``, after which the slopes are what they were: ``to_empty`` loses and ``half`` rounds them."""
    base: type[nn.Module] = type(module)._nmconv_base
    base._apply(module, fn, recurse)
    for name, (_, value) in module.__dict__[_SLOPES].items():
        module._buffers[name] = _slope(value, module._buffers[name].device)
    return module


def _method(name: str, arguments: str, function: Callable[..., Any]) -> RewrittenMethod:
    source = f"def {name}(self, {arguments}):\n    return _{function.__name__}(self, {arguments.partition('=')[0]})\n"
    return RewrittenMethod(name, source, ((f"_{function.__name__}", f"{__name__}:{function.__name__}"),))


_DROPS, _APPEARS = _method("forward", "input", drops), _method("forward", "input", appears)
_APPLY = _method("_apply", "fn, recurse=True", apply_and_refill)


# -- making a module gradual -------------------------------------------------------------------------------------------


def dropping(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of an activation that goes."""
    return rewritten(cls, (_DROPS, _APPLY))


def appearing(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of an activation that was put where none was."""
    return rewritten(cls, (_APPEARS, _APPLY))


def slope_name(number: int) -> str:
    """The name of a module's buffer with its slope of that number, from 0."""
    return f"{_BUFFER}{number}"


def own_copy(act: nn.Module) -> nn.Module:
    """A shallow copy that can have buffers that ``act`` does not have."""
    made = hooked_apart(act)
    for space in ("_parameters", "_buffers", "_modules"):
        made.__dict__[space] = dict(act.__dict__[space])
    return made


def begin(module: nn.Module, cls: type[nn.Module], how: tuple[str, bool], mixing: Mixing, device: torch.device) -> None:
    """Make an activation gradual.

    Args:
        module: The activation.
        cls: What :func:`dropping` or :func:`appearing` made of its class.
        how: ``"drop"`` or ``"move"``, and whether the identity that takes its place in the end must copy.
        mixing: Its site and the slope; two where it is called in eval mode otherwise than in train mode.
        device: Where these are.
    """
    module.__class__ = cls
    module.__dict__[GRADUAL] = how
    add_slopes(module, mixing, device)


def begin_methods(
    module: nn.Module,
    methods: tuple[RewrittenMethod, ...],
    hard: tuple[RewrittenMethod, ...],
    mixing: Mixing,
    device: torch.device,
) -> None:
    """Make calls of activations in methods of a module gradual.

    Args:
        module: Whose methods.
        methods: With mixes.
        hard: What takes their places in the end.
        mixing: The sites and their slopes.
        device: Where these are.
    """
    module.__class__ = rewritten(type(module), (*methods, _APPLY))
    module.__dict__[_HARD] = hard
    add_slopes(module, mixing, device)


def add_slopes(module: nn.Module, mixing: Mixing, device: torch.device) -> None:
    """Register slopes, all 0."""
    for name in mixing.values():
        module._buffers[name] = _slope(0.0, device)
    module.__dict__["_non_persistent_buffers_set"] = {*module._non_persistent_buffers_set, *mixing.values()}
    module.__dict__[_SLOPES] = {name: (site, 0.0) for site, name in mixing.items()}


def _slope(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def device_near(model: nn.Module, path: str) -> torch.device:
    """The device of the tensors of a module, or else of the innermost one around it that has some."""
    while True:
        module = model.get_submodule(path)
        for value in (*module.parameters(), *module.buffers()):
            return value.device
        if not path:
            return torch.device("cpu")
        path = path.rpartition(".")[0]


# -- slopes ------------------------------------------------------------------------------------------------------------


def _slopes(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, float]]:
    """Of each slope its module, its buffer's name, its site's id, and the number."""
    for module in model.modules():
        for name, (site, value) in module.__dict__.get(_SLOPES, {}).items():
            yield module, name, site, value


def is_dropping(module: nn.Module) -> bool:
    """Whether it is an activation that goes by degrees."""
    return bool(vars(module).get(GRADUAL, ("",))[0] == "drop")


def is_slope(name: str) -> bool:
    """Whether a buffer's qualified name is that of a slope."""
    return name.rpartition(".")[2].startswith(_BUFFER)


def get_slopes(model: nn.Module) -> dict[str, float]:
    """The slopes of a gradual model.

    Args:
        model: What ``nmconv.convert(..., gradual=True)`` returned, or a module that holds it.

    Returns:
        From the id of each site that goes, as in its plan, to its slope: 0 is the original, 1 the hard conversion.
        Empty for other models.

    Raises:
        ModelTypeError: If ``model`` is no module.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> nmconv.get_slopes(nmconv.convert(net, "2:1", gradual=True))
        {'1#1': 0.0}
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"{type(model).__name__} is no nn.Module: give the model itself")
    return {site: value for _, _, site, value in _slopes(model)}


def set_slope(model: nn.Module, s: float | Mapping[str, float]) -> None:
    """Set the slopes of a gradual model, in place.

    Compiled and wrapped models will do, and are not compiled anew.

    Args:
        model: What ``nmconv.convert(..., gradual=True)`` returned, or a module that holds it.
        s: One slope for all sites, from 0, the original, to 1, the hard conversion; or a mapping from the ids of sites,
            as in the plan, to slopes: the other sites keep theirs.

    Raises:
        OptionError: If a slope is no number from 0 to 1, if there is no such site, or if the model is not gradual.
        ModelTypeError: If ``model`` is no module.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> soft = nmconv.convert(net, "2:1", gradual=True)
        >>> nmconv.set_slope(soft, {"1#1": 0.5})
        >>> nmconv.get_slopes(soft)
        {'1#1': 0.5}
    """
    known = check_gradual(model, "set the slope of")
    wanted = dict(s) if isinstance(s, Mapping) else dict.fromkeys(known, s)
    for site, value in wanted.items():
        if site not in known:
            few = ", ".join(list(known)[:5])
            raise OptionError(f"{site!r} is no gradual site of this {type(model).__name__}: give one of {few}, …")
        check_slope(value)
    with torch.no_grad():
        for module, name, site, _ in list(_slopes(model)):
            if site in wanted:
                value = float(wanted[site])
                module.__dict__[_SLOPES][name] = (site, value)
                module._buffers[name].fill_(value)  # type: ignore[union-attr]


def check_slope(value: Any) -> None:
    """Refuse what is no slope, with OptionError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise OptionError(f"a slope of {value!r}: give a number from 0, the original, to 1, the hard conversion")


def check_gradual(model: nn.Module, todo: str) -> dict[str, float]:
    """Return a gradual model's slopes.

    Raises:
        OptionError: If it has none.
        ModelTypeError: If it is no module.
    """
    found = get_slopes(model)
    if not found:
        raise OptionError(
            f"this {type(model).__name__} has no gradual sites: {todo} what nmconv.convert(..., gradual=True) returned"
        )
    return found


def check_finished(model: nn.Module, error: type[NmconvError]) -> None:
    """Refuse a gradual model, with an error of that class."""
    site = next((site for _, _, site, _ in _slopes(model)), None)
    if site is not None:
        raise error(
            f"this {type(model).__name__} is gradual ({site} and others are mixed): call finish() first, as "
            "nmconv.Gradual(model, 1, end=0).finish() does"
        )


# -- beginning and end -------------------------------------------------------------------------------------------------


def check_hoists_nothing(hoists: bool) -> None:
    """Refuse gradual conversion together with hoists, with OptionError."""
    if hoists:
        raise OptionError(
            "gradual=True with hoist_padding=True: padding moves at once, so that at slope 0 the model would not "
            "be the original; convert, or make the plan, with hoist_padding=False"
        )


def check_can_be_gradual(model: nn.Module, plan: Plan, changes: Changes) -> None:
    """Refuse what cannot be done by degrees, with OptionError."""
    check_hoists_nothing(bool(changes.hoists))
    if plan.branches:
        raise OptionError(
            f"gradual=True and a plan that removes the branch of {', '.join(plan.branches[0].convs)}: a branch goes at "
            "once; apply the plan without gradual=True"
        )
    for change in changes.made:
        call = change.call
        module = None if call.function else model.get_submodule(call.name)
        names = {call.kind, *(base.__name__ for base in type(module).__mro__)}
        if any(name.lower() in _RANDOM for name in names):
            raise OptionError(
                f"{call.id} is a {call.kind}, which draws random numbers: at slope 1 others would be drawn behind it "
                "than in the hard conversion; exclude it, or convert without gradual=True"
            )


def finish_sites(model: nn.Module) -> None:
    """Leave what a hard conversion leaves, in place, whatever the slopes are.

    Raises:
        ModelTypeError: If it is no plain module.
    """
    check_plain(model, "finish_sites", compiled=True)
    for module in dict.fromkeys(module for module, *_ in _slopes(model)):
        names = module.__dict__.pop(_SLOPES)
        for name in names:
            del module._buffers[name]
        module.__dict__["_non_persistent_buffers_set"] = module._non_persistent_buffers_set - names.keys()
        base = type(module)._nmconv_base  # type: ignore[attr-defined]
        if GRADUAL not in module.__dict__:
            module.__class__ = rewritten(base, module.__dict__.pop(_HARD))
            continue
        how, copies = module.__dict__.pop(GRADUAL)
        if how == "move":
            module.__class__ = base
        elif keeps_something(module):
            module.__class__ = passing(base, copies=copies)
        else:
            was = module.__dict__[WAS]
            was.training = module.training
            _replace(model, module, identity_for(was, copies=copies))


def _replace(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    for parent in model.modules():
        for slot, child in parent._modules.items():
            if child is module:
                parent._modules[slot] = other
