"""How a network is declared: what it is called with, and what is expected of nmconv."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Inputs = Callable[[int, int], tuple[Any, ...]]  # from a batch and a size
NETS: list[Network] = []


@dataclass(frozen=True)
class Network:
    """A network and what is expected.

    Attributes:
        name: What the tests call it.
        make: Makes it; its weights are drawn anew.
        inputs: Makes the arguments of a call, of a batch and a size.
        options: Keyword arguments that it may be called with besides.
        settings: Attributes that it may be given after it was made.
        methods: Other methods of it that a merged one may be asked for.
        counts: Activations on convolutions before and after converting at 2:1, by hand; then it must convert.
        converts: Whether it must convert; if not, an error of nmconv's own will do.
        merges: Whether merging must leave fewer convolutions after converting at 2:1 with hoisted padding.
        merges_plain: The same of the network as it is.
        given: Whether nmconv gets example inputs; else it has to guess.
        picky: Whether the result may refuse other sizes, batches and contexts.
        trains: Whether it runs in train mode.
        double: Whether it runs in float64.
        copies: Whether a deep copy of it is one; if not, it is converted in place.
        sizes: The size it is read at, and another.
        slow: Whether it takes long.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    options: tuple[dict[str, Any], ...] = ()
    settings: tuple[dict[str, Any], ...] = ()
    methods: tuple[str, ...] = ()
    counts: tuple[int, int] | None = None
    converts: bool = True
    merges: bool = False
    merges_plain: bool = False
    given: bool = False
    picky: bool = False
    trains: bool = True
    double: bool = True
    copies: bool = True
    sizes: tuple[int, int] = (16, 13)
    slow: bool = False

    @property
    def finest(self) -> torch.dtype:
        """What merging is judged in."""
        return torch.float64 if self.double else torch.float32

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in eval mode, the same in every call, with norms that do something."""
        seed(7)
        with quiet():
            model = self.make()
        with torch.no_grad():
            for module in model.modules():
                for name, low, high in (("running_mean", -0.3, 0.3), ("running_var", 0.5, 1.5)):
                    if _drawn(getattr(module, name, None)):
                        getattr(module, name).uniform_(low, high)
                if _drawn(getattr(module, "running_var", None)) and _drawn(getattr(module, "weight", None)):
                    module.weight.uniform_(0.5, 1.5)
                    module.weight[::2] *= -1
                    module.bias.uniform_(-0.5, 0.5)
        return model.to(dtype).eval()


def network(inputs: Inputs | None = None, **expected: Any) -> Callable[[Any], Any]:
    """Declares the class or function below it as a network. Without inputs it takes an image of three channels."""

    def declare(make: Any) -> Any:
        NETS.append(Network(make.__name__, make, inputs or image(), **expected))
        return make

    return declare


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings are no errors here: old weight norm, checkpoints and norms that were folded warn with reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def seed(number: int) -> None:
    """Seeds whatever draws."""
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)  # torch.manual_seed looks for devices, which takes longer than a call


def image(channels: int = 3) -> Inputs:
    return lambda batch, size: (torch.randn(batch, channels, size, size + 1),)


def sound(channels: int = 1) -> Inputs:
    return lambda batch, size: (torch.randn(batch, channels, 2 * size),)


def clip(channels: int = 3) -> Inputs:
    return lambda batch, size: (torch.randn(batch, channels, 4, size, size),)


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size where it has no stride."""
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, **options)


def unit(inputs: int = 4, outputs: int = 4, kernel: int = 3, act: nn.Module | None = None, **options: Any) -> nn.Module:
    """Convolution, norm, activation."""
    return nn.Sequential(
        conv(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs), act or nn.ReLU()
    )


class Two(nn.Module):
    """What many a network below begins with: two convolutions and two activations, and no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3), conv(4, 4, 1)
        self.r, self.q = nn.ReLU(), nn.ReLU()
        self.prepare()

    def prepare(self) -> None:
        """Adds what one network has besides."""


@dataclass
class Call:
    """One way to call a network."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    context: str = ""  # no_grad or autocast
    gradients: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    method: str = ""

    @property
    def other(self) -> bool:
        """Whether this is another way to call it than it was made for."""
        return bool(self.kwargs or self.settings or self.method)


def calls(net: Network, dtype: torch.dtype = torch.float32) -> list[Call]:
    """The ways to call it, the one it is read with first."""
    first, other = net.sizes
    seed(11)
    x = cast(net.inputs(2, first), dtype)
    return [
        Call("as read", x, gradients=True),
        Call("another size", cast(net.inputs(2, other), dtype)),
        Call("another batch", cast(net.inputs(3, first), dtype)),
        *(Call(f"with {options}", x, dict(cast(options, dtype))) for options in net.options),
        *(Call(f"with {settings} set", x, settings=settings) for settings in net.settings),
        *(Call(f"by {method}", x, method=method) for method in net.methods),
        Call("without gradients", x, context="no_grad"),
        Call("under autocast", x, context="autocast"),
    ]


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Copies the tensors in it, floats as of this type."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype).clone() if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {key: cast(each, dtype) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast(each, dtype) for each in value)
    return value


def _drawn(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.parameter.UninitializedTensorMixin)
