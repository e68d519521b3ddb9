"""Merged kernels computed from their factors on the fly: the factors stay parameters, under their old keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from nmconv.algebra import Affine, Geometry, affine_of, apply, compose, join, of_average, of_identity
from nmconv.errors import RewriteError
from nmconv.finding import Join
from nmconv.flow import LEAF, THROUGH, is_norm_act
from nmconv.merging.folded_norms import Told, folded_kind, mark
from nmconv.merging.partitioning import Node
from nmconv.surgery import RewrittenMethod, rewritten

__all__ = ["LIVE", "Live", "affine_of_nodes", "go_live", "why_not_live"]

LIVE = "_nmconv_live"  # on the module that takes the merged convolution's place: a Live
Numbers = Callable[[nn.Module, str, Geometry], Affine]


@dataclass(eq=False)
class Live:
    """What a merged kernel is computed from.

    Attributes:
        nodes: Of the run.
        modules: By name, those that the nodes speak of.
        geometry: Of the merged convolution.
    """

    nodes: tuple[Node, ...]
    modules: dict[str, nn.Module]
    geometry: Geometry

    def affine(self, numbers: Numbers = affine_of) -> Affine:
        """The convolution, from the factors as they are now."""
        like = next(value for module in self.modules.values() for value in module.parameters(recurse=False))
        return affine_of_nodes(self.nodes, self.modules.__getitem__, numbers, like)


def affine_of_nodes(
    nodes: Sequence[Node], module: Callable[[str], nn.Module], numbers: Numbers, like: Tensor
) -> Affine:
    """The nodes as one convolution.

    Args:
        nodes: Of a run, all with a geometry.
        module: From a name to the module.
        numbers: From a module, its kind and its geometry to the convolution it is.
        like: Gives dtype and device to identities.
    """
    parts = []
    for node in nodes:
        assert isinstance(node.geometry, Geometry)
        channels, rank = node.geometry.in_channels, node.geometry.rank
        if isinstance(node.element, Join):
            branches = [
                affine_of_nodes(branch, module, numbers, like) if branch else of_identity(like, channels, rank)
                for branch in node.branches
            ]
            parts.append(join(branches))
        elif node.element.kind == "pad":
            parts.append(Affine(node.geometry, of_identity(like, channels, rank).weight, diagonal=True))
        elif node.element.kind == "pool":
            parts.append(of_average(like, node.geometry))
        elif node.element.kind in ("conv", "norm"):
            parts.append(numbers(module(node.element.name), node.element.kind, node.geometry))
    if not parts:  # identities only
        assert isinstance(nodes[0].geometry, Geometry)
        return of_identity(like, nodes[0].geometry.in_channels, nodes[0].geometry.rank)
    return reduce(compose, parts)


def live_forward(module: nn.Module, input: Tensor) -> Tensor:
    """The merged convolution of ``input``, ``[batch, in, *sizes]``, with a kernel made of the factors as they are."""
    live: Live = module.__dict__[LIVE]
    device = input.device.type
    able = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if able else nullcontext():
        made = live.affine().dense()
    return apply(input, live.geometry, made.weight, made.bias, made.border)


_THIS = f"{__name__}:"
_HEAD = RewrittenMethod(
    "forward", "def forward(self, input):\n    return _live(self, input)\n", (("_live", _THIS + "live_forward"),)
)
_THROUGH = RewrittenMethod("forward", "def forward(self, input):\n    return input\n")
_AFTER = RewrittenMethod(
    "forward",
    "def forward(self, x):\n    return _after(self, x)\n",
    (("_after", "nmconv.merging.folded_norms:after_norm"),),
)
_TRAIN = RewrittenMethod(
    "train",
    "def train(self, mode=True):\n    _tell(self, mode)\n    return _train(self, mode)\n",
    (("_tell", "nmconv.merging.folded_norms:tell"), ("_train", _THIS + "base_train")),
)


def base_train(module: Any, mode: bool) -> Any:
    """``train`` of the class that a norm had before."""
    return type(module)._nmconv_base.train(module, mode)


def why_not_live(module: nn.Module) -> str:
    """Why the module cannot stay as a factor, or ""."""
    if any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        return "a hook changes its spectral norm's vectors in every call (torch's older spectral_norm)"
    try:
        rewritten(type(module), (_THROUGH,))
    except RewriteError as error:
        return str(error)
    return ""


def go_live(
    model: nn.Module,
    head: str,
    removed: Iterable[str],
    nodes: tuple[Node, ...],
    geometry: Geometry,
    told: Told,
) -> None:
    """Let the module ``head`` compute the merged convolution, and the others hand their input on.

    Args:
        model: Changed.
        head: Qualified name of the convolution whose place the merged one takes.
        removed: Of the other modules.
        nodes: Of the run.
        geometry: Of the merged convolution.
        told: From :func:`nmconv.merging.folded_norms.told_of`.
    """
    names = [name for node in nodes for name in _names(node)]
    live = Live(nodes, {name: model.get_submodule(name) for name in names}, geometry)
    for name in (head, *removed):
        module: Any = model.get_submodule(name)
        norm_act = is_norm_act(module)
        kind = folded_kind(module)
        methods: tuple[RewrittenMethod, ...] = (_HEAD,) if name == head else (_AFTER if norm_act else _THROUGH,)
        if name == head:
            module.__dict__.update({LIVE: live, LEAF: True, "geometry": geometry})
        else:
            module.__dict__[THROUGH] = "act" if norm_act else "all"
        if kind:
            mark(module, kind, told)
            methods = (*methods, _TRAIN)
        module.__class__ = rewritten(type(module), methods)


def _names(node: Node) -> Iterable[str]:
    if isinstance(node.element, Join):
        for branch in node.branches:
            for inner in branch:
                yield from _names(inner)
    elif node.element.kind in ("conv", "norm"):
        yield node.element.name
