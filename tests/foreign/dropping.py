"""Drops activation calls of a model at run time, as a plan names them; the model's modules stay where they are.

Global module hooks keep the stack of running forwards, the forwards of the activations named are wrapped for the time
of the block, and a ``TorchFunctionMode`` sees the functional calls. Whoever is innermost on the stack makes a call;
calls are counted per module object, or per kind of function, within one forward of who makes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

FUNCTIONS = [
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "hardswish",
    "mish",
    "softplus",
]
Key = tuple[int, "int | str", int, bool]  # who calls, the module or the function, which call, whether in training


@dataclass
class Frame:
    """A forward that runs, and how often it has called each module and each kind of function."""

    module: nn.Module
    seen: Counter = field(default_factory=Counter)


class Dropping(TorchFunctionMode):
    """While it is entered, the calls at these sites return what they were given: itself if in-place, else a copy.

    Hooks of a dropped activation run as ever, and see that.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Any]) -> None:
        super().__init__()
        self.names: dict[Key, str] = {}
        self.hit: set[str] = set()
        self.inside = {id(module) for module in model.modules()}
        self.acts: dict[int, nn.Module] = {}
        self.stack: list[Frame] = []
        self.decided: dict[int | str, set[bool]] = {}  # for what runs again in a backward pass, where nobody calls
        for site in sites:
            owner = model.get_submodule(site.owner)
            target: int | str = site.function or id(model.get_submodule(site.name))
            if site.function is None:
                self.acts[id(model.get_submodule(site.name))] = model.get_submodule(site.name)
            in_training = site.train_call if site.train_call is not None else site.call
            for training, number in ((False, site.call), (True, in_training)):
                if site.modes in ("both", "train" if training else "eval"):
                    self.names[id(owner), target, number, training] = site.id

    def missed(self) -> set[str]:
        """Sites that no call so far was."""
        return set(self.names.values()) - self.hit

    def __enter__(self) -> Dropping:
        self.wrapped = list(self.acts.values())
        for act in self.wrapped:
            act.__dict__["forward"] = self._wrapper(act, act.forward)
        self.handles = [
            register_module_forward_pre_hook(self._push),
            register_module_forward_hook(self._pop, always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()
        for act in self.wrapped:
            del act.__dict__["forward"]

    def _push(self, module: nn.Module, args: Any) -> None:
        if id(module) in self.inside:  # what a module that is none of the model's calls, its caller calls
            self.stack.append(Frame(module))

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        while id(module) in self.inside and self.stack and self.stack.pop().module is not module:
            pass  # one that raised

    def _wrapper(self, act: nn.Module, forward: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.stack or self.stack[-1].module is not act:
                return forward(*args, **kwargs)  # called by hand: the function inside counts
            if self._drops(self.stack[-2] if len(self.stack) > 1 else None, id(act)):
                return args[0] if getattr(act, "inplace", False) else args[0].clone()
            return forward(*args, **kwargs)

        return wrapped

    def _drops(self, caller: Frame | None, target: int | str) -> bool:
        if caller is None:
            decided = self.decided.get(target, {False})
            assert len(decided) == 1, "the judge cannot tell which call this is"
            return next(iter(decided))
        caller.seen[target] += 1
        key = (id(caller.module), target, caller.seen[target], caller.module.training)
        drops = key in self.names
        if drops:
            self.hit.add(self.names[key])
        self.decided.setdefault(target, set()).add(drops)
        return drops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        kind = name.removesuffix("_")
        if kind in FUNCTIONS and isinstance(args[0] if args else kwargs.get("input"), Tensor):
            top = self.stack[-1] if self.stack else None
            if self._drops(top, kind):
                x = args[0] if args else kwargs["input"]
                in_place = name.endswith("_") or kwargs.get("inplace", False)
                return x if in_place or _second(func, args) else x.clone()
        return func(*args, **kwargs)


def _second(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether ``F.relu(x, True)`` and its like say in-place by position."""
    positions = {F.relu: 1, F.relu6: 1, F.silu: 1, F.mish: 1, F.selu: 1, F.hardswish: 1, F.leaky_relu: 2, F.elu: 2}
    at = positions.get(func)
    return at is not None and len(args) > at and args[at] is True
