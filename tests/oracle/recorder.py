"""An independent oracle: it runs the original model and turns chosen activation calls into identities at run time.

Nothing here knows nmconv or torch.fx. Eager calls are watched: a temporary ``nn.Module.__call__`` keeps the stack of
modules whose forward is running, and a ``TorchFunctionMode`` sees the functional calls. The innermost module on that
stack owns a call; calls are numbered from 1 per module object (or kind of function) within one forward call of the
owner. A module's ``forward`` called by hand, not through ``__call__``, opens no frame: its caller owns what it calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

KINDS = ("relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "hardswish", "mish", "softplus")

# Every function object that can reach the mode -> (kind, whether its name says in-place).
_FUNCTIONS: dict[Any, tuple[str, bool]] = {
    getattr(space, kind + suffix): (kind, bool(suffix))
    for space in (F, torch, torch.Tensor, torch._C._nn)
    for kind in KINDS
    for suffix in ("", "_")
    if hasattr(space, kind + suffix)
}

# By hand: what may be done to a value on the way to a product or quotient, and what that may come to.
_ON_THE_WAY = {"sigmoid", "hardsigmoid", "relu6", "softplus", "tanh", "erf", "exp", "pow", "neg", "add", "rsub", "rdiv"}
_ON_THE_WAY |= {"hardtanh", "clamp"}  # nn.ReLU6 calls the first
_STRAIGHT = {"neg", "add", "rsub", "pow", "rdiv", "mul", "div"}  # without one of the others there is no activation
_PRODUCTS = {"mul", "div"}
_BY_HAND: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("silu", F.silu),
    ("hardswish", F.hardswish),
    ("mish", F.mish),
    ("gelu", F.gelu),
    ("gelu", lambda x: F.gelu(x, approximate="tanh")),
]

_TORCH_CLASSES = {nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU}
_TORCH_CLASSES |= {nn.CELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.Softplus}
_TIMM_MODULES = ("timm.layers.activations", "timm.layers.activations_me")
_TIMM_GATES = ("Sigmoid", "Tanh", "HardSigmoid", "HardSigmoidMe")


class SiteLike(Protocol):
    """What the oracle reads of a site; see nmconv's ``Site`` for the meaning of the fields."""

    @property
    def name(self) -> str: ...
    @property
    def function(self) -> str | None: ...
    @property
    def owner(self) -> str: ...
    @property
    def call(self) -> int: ...
    @property
    def train_call(self) -> int | None: ...
    @property
    def modes(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """One recorded activation call.

    Attributes:
        owner: Qualified name of the module whose forward made the call ("" is the model itself).
        name: Qualified name of the activation module (the first it is registered under); None for a functional call.
        kind: Class name of the activation module, or the kind of function.
        call: Which call of this module object (or kind of function) it is within one forward call of the owner.
        inplace: Whether the call works in-place.
    """

    owner: str
    name: str | None
    kind: str
    call: int
    inplace: bool


@dataclasses.dataclass
class DropLog:
    """What became of the sites given to ``dropped``.

    Attributes:
        sites: The sites, in the order given.
        hits: How often each of them was turned into an identity, in the same order.
        disagreements: By position, a line on each site that claims another in-placeness than its call really had.
    """

    sites: list[SiteLike]
    hits: list[int] = dataclasses.field(init=False)
    disagreements: dict[int, str] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.hits = [0] * len(self.sites)

    def count(self, site: SiteLike) -> int:
        """How often this very site object was hit."""
        return next(hits for known, hits in zip(self.sites, self.hits, strict=True) if known is site)

    def assert_all_hit(self, *, training: bool) -> None:
        """Fails, naming them, if sites that run in this mode were never hit."""
        modes = ("both", "train" if training else "eval")
        pairs = zip(self.sites, self.hits, strict=True)
        missed = [_label(site) for site, hits in pairs if not hits and site.modes in modes]
        if missed:
            raise AssertionError(f"{len(missed)} site(s) never hit: {', '.join(missed)}")

    def assert_inplace_agrees(self) -> None:
        """Fails, naming them, if sites that were hit claim the wrong in-placeness."""
        if self.disagreements:
            raise AssertionError("; ".join(self.disagreements.values()))


def is_activation(module: nn.Module) -> bool:
    """Whether calling the module applies an activation, judged by its class.

    Known are torch.nn's classes for ``KINDS`` and timm's own, gates such as Sigmoid left out. The forward must be the
    known class's own too: one overridden in a subclass or on the object (an identity, say) makes no activation. If that
    forward calls an activation function, ``record`` sees the function instead.
    """
    for base in type(module).__mro__:
        if base in _TORCH_CLASSES or (base.__module__ in _TIMM_MODULES and base.__name__ not in _TIMM_GATES):
            return type(module).forward is base.forward and "forward" not in vars(module)
    return False


@contextlib.contextmanager
def dropped(model: nn.Module, sites: Iterable[SiteLike]) -> Iterator[DropLog]:
    """Turns exactly the calls at these sites into identities while the block runs; the model itself is not touched.

    A dropped call does not run at all, hooks included. It returns its input itself where the call would have worked
    in-place (by the module's or the call's own flag, whatever the site says), else a clone of it.

    Args:
        model: The original model, in either mode. Which number of a site counts is up to the mode of its owner.
        sites: The sites to drop. Their action is not looked at.

    Yields:
        A log of the hits; it may be read after the block.

    Raises:
        AttributeError: A name is not a module of the model.
        ValueError: Two sites mean the same call.
    """
    log = DropLog(list(sites))
    index = _index(model, log.sites)

    def drops(watch: _Watch, target: nn.Module | str, number: int, inplace: bool) -> bool:
        owner = watch.stack[-1].module
        found = index.get((owner, target, number, owner.training))
        if found is None:
            return False
        log.hits[found] += 1
        site = log.sites[found]
        told = getattr(site, "inplace", inplace)
        if told != inplace:
            log.disagreements[found] = f"{_label(site)} says inplace={told}, the call has inplace={inplace}"
        return True

    with _Watch(drops):
        yield log


@contextlib.contextmanager
def record(model: nn.Module, predicate: Callable[[nn.Module], bool] = is_activation) -> Iterator[list[Entry]]:
    """Records every activation call that the model makes while the block runs, changing nothing.

    What an activation module calls inside is not recorded besides it, nor what other models do in the block.

    Args:
        model: The model to watch.
        predicate: Says which modules are activations.

    Yields:
        The list of entries, in the order of the calls; it grows as the model runs.
    """
    names = {module: name for name, module in model.named_modules()}
    entries: list[Entry] = []

    def name_of(module: nn.Module) -> str:
        return names.get(module, f"<unregistered {type(module).__name__}>")

    def listen(watch: _Watch, target: nn.Module | str, number: int, inplace: bool) -> bool:
        if isinstance(target, nn.Module) and not predicate(target):
            return False
        running = [frame.module for frame in watch.stack]
        if any(module in names for module in running) and not any(map(predicate, running)):
            name = name_of(target) if isinstance(target, nn.Module) else None
            kind = type(target).__name__ if isinstance(target, nn.Module) else target
            entries.append(Entry(name_of(running[-1]), name, kind, number, inplace))
        return False

    with _Watch(listen):
        yield entries


def assert_same(a: Any, b: Any, path: str = "output") -> None:
    """Fails at the first difference between two outputs, naming its path.

    Tensors must agree in dtype, shape, device and every element (``torch.equal``, but NaN equals NaN; on the meta
    device there are no elements to compare). Containers must be of the same type, and dicts have their keys in the same
    order. Dataclasses and plain objects without an ``__eq__`` of their own are compared attribute by attribute.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        for what in ("dtype", "shape", "device"):
            _check(getattr(a, what) == getattr(b, what), path, f"{what} {getattr(a, what)} != {getattr(b, what)}")
        if not a.is_meta and not torch.equal(a, b):
            differ = (a != b) & ~((a != a) & (b != b))
            _check(not differ.any(), path, f"{int(differ.sum())} of {a.numel()} elements differ")
        return
    _check(type(a) is type(b), path, f"{type(a).__name__} != {type(b).__name__}")
    if isinstance(a, Mapping):
        _check(list(a) == list(b), path, f"keys {list(a)} != {list(b)}")
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (tuple, list)):
        _check(len(a) == len(b), path, f"length {len(a)} != {len(b)}")
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{path}[{i}]")
    elif dataclasses.is_dataclass(a) and not isinstance(a, type):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name), f"{path}.{field.name}")
    elif type(a).__eq__ is object.__eq__ and getattr(a, "__dict__", None):
        _check(list(vars(a)) == list(vars(b)), path, f"attributes {list(vars(a))} != {list(vars(b))}")
        for name, value in vars(a).items():
            assert_same(value, vars(b)[name], f"{path}.{name}")
    else:
        _check(a == b or (a != a and b != b), path, f"{a!r} != {b!r}")


@dataclasses.dataclass
class _Frame:
    """One running forward: its module, and how often it has called each module object or kind of function so far."""

    module: nn.Module
    counts: Counter[nn.Module | str] = dataclasses.field(default_factory=Counter)


class _Watch(TorchFunctionMode):
    """Numbers module and functional activation calls and asks about each, just before it runs, whether to drop it.

    A mode is off while its own handler runs, so the ``torch.relu_`` inside ``F.relu(inplace=True)`` is not a call here.
    A product or quotient is a call, too, if all its operands are made from one value, something on the way bends it,
    and it gives what one of ``_BY_HAND`` makes of that value. Numbers alone do not tell: zeros fit all of these.
    """

    def __init__(self, drops: Callable[[_Watch, nn.Module | str, int, bool], bool]):
        super().__init__()
        self.stack: list[_Frame] = []
        self._drops = drops
        # From a tensor to what it is made from, as that was, and whether it is bent.
        self._made: dict[int, tuple[Tensor, Tensor, int, bool]] = {}

    def __enter__(self) -> _Watch:
        original = nn.Module.__call__

        def __call__(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            inplace = bool(getattr(module, "inplace", False))
            if self._counted(module, inplace):
                return _identity(args, kwargs, inplace)
            self.stack.append(_Frame(module))
            try:
                return original(module, *args, **kwargs)
            finally:
                self.stack.pop()

        self._original = original
        nn.Module.__call__ = __call__  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        nn.Module.__call__ = self._original  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            kind, inplace = _FUNCTIONS[func]
            inplace = inplace or bool(kwargs.get("inplace", False))  # F.* hand it on by keyword, however it was passed
            if self._counted(kind, inplace):
                return _identity(args, kwargs, inplace)
        name = getattr(func, "__name__", "").strip("_")
        sources = self._sources(args) if name in _ON_THE_WAY | _PRODUCTS else []
        if sources and name in _PRODUCTS:
            made = func(*[arg.clone() if isinstance(arg, Tensor) else arg for arg in args], **kwargs)
            for source, bent in sources:
                kind = bent and _kind_by_hand(made, source)
                if kind:
                    inplace = func.__name__.endswith("_") and args[0] is source
                    if self._counted(kind, inplace):
                        return source if inplace else source.clone()
                    return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if sources and not any(result is arg for arg in args):
            source, bent = sources[0]
            self._made[id(result)] = (result, source, source._version, bent or name not in _STRAIGHT)
        elif sources and name not in _STRAIGHT and id(result) in self._made:  # in place
            self._made[id(result)] = (*self._made[id(result)][:3], True)
        return result

    def _sources(self, args: Iterable[Any]) -> list[tuple[Tensor, bool]]:
        """The values that all tensors among the arguments are made from, as they still are, the last one first.

        With each goes whether something bends it on the way to one of the arguments.
        """
        ways = [list(self._way(arg)) for arg in args if isinstance(arg, Tensor)]
        found = []
        for one, _ in ways[0] if ways else ():
            bends = [[bent for other, bent in way if other is one] for way in ways]
            if all(bends):
                found.append((one, any(map(any, bends))))
        return found

    def _way(self, value: Tensor) -> Iterator[tuple[Tensor, bool]]:
        bent = False
        while True:
            yield value, bent
            made, source, version, bends = self._made.get(id(value), (None, value, 0, False))
            if made is not value or source._version != version:
                return
            value, bent = source, bent or bends

    def _counted(self, target: nn.Module | str, inplace: bool) -> bool:
        """Counts a call in the innermost frame (outside all modules there is none) and says whether to drop it."""
        if not self.stack:
            return False
        counts = self.stack[-1].counts
        counts[target] += 1
        return self._drops(self, target, counts[target], inplace)


def _kind_by_hand(made: Tensor, source: Tensor) -> str:
    if made.is_meta or made.shape != source.shape or not source.is_floating_point():
        return ""
    tolerance = 1e-2 if source.dtype in (torch.half, torch.bfloat16) else 1e-5
    near = {"rtol": tolerance, "atol": tolerance}
    return next((kind for kind, function in _BY_HAND if torch.allclose(made, function(source), **near)), "")


def _index(model: nn.Module, sites: list[SiteLike]) -> dict[tuple[nn.Module, nn.Module | str, int, bool], int]:
    """Maps (owner, module object or kind, number of the call, owner in training mode) to the site's position."""
    index: dict[tuple[nn.Module, nn.Module | str, int, bool], int] = {}
    for i, site in enumerate(sites):
        owner = model.get_submodule(site.owner)
        target = site.function if site.function is not None else model.get_submodule(site.name)
        numbers: dict[bool, int | None] = {False: site.call, True: site.train_call}
        if site.modes == "train":
            numbers = {True: site.call if site.train_call is None else site.train_call}
        elif site.modes == "eval":
            numbers = {False: site.call}
        for training, number in numbers.items():
            if number is not None and index.setdefault((owner, target, number, training), i) != i:
                first = index[owner, target, number, training]
                raise ValueError(f"two sites mean the same call: {_label(sites[first])} and {_label(site)}")
    return index


def _label(site: SiteLike) -> str:
    """Names a site for a message; unlike ``Site.id`` it tells the owners of a shared module apart."""
    what = site.name if site.function is None else f"{site.name}:{site.function}"
    return f"{what}#{site.call} (called by {site.owner or 'the model itself'}, {site.modes})"


def _identity(args: tuple[Any, ...], kwargs: dict[str, Any], inplace: bool) -> Tensor:
    """What a dropped call returns: its first argument, or a clone of it."""
    x = args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
    return x if inplace else x.clone()


def _check(good: bool, path: str, message: str) -> None:
    if not good:
        raise AssertionError(f"{path}: {message}")
