"""Merged kernels computed from their factors in each call; the factors stay parameters under their old keys."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from nmconv.algebra import Affine, Geometry, affine_of, apply_conv
from nmconv.errors import RewriteError
from nmconv.finding import steps_of
from nmconv.flow import LEAF, PASS_THROUGH, is_norm_act
from nmconv.merging.folded_norms import WarnedKinds, folded_kind, mark
from nmconv.merging.node_affines import ToAffine, affine_of_nodes
from nmconv.merging.nodes import RunNode
from nmconv.surgery import RewrittenMethod, rewritten_class

__all__ = ["LIVE", "LiveKernel", "make_live", "why_not_live"]

LIVE = "_nmconv_live"  # on the module that takes the merged convolution's place: a LiveKernel


@dataclass(eq=False)
class LiveKernel:
    """What a merged kernel is computed from.

    Attributes:
        nodes: Nodes of the run.
        modules: The convolutions and norms of the nodes, by qualified name.
        geometry: Geometry of the merged convolution.
    """

    nodes: tuple[RunNode, ...]
    modules: dict[str, nn.Module]
    geometry: Geometry

    def affine(self, to_affine: ToAffine = affine_of) -> Affine:
        """Return the convolution for the present values of the factors."""
        like = next(value for module in self.modules.values() for value in module.parameters(recurse=False))
        channels, rank = self.geometry.in_channels, self.geometry.rank
        return affine_of_nodes(self.nodes, self.modules.__getitem__, to_affine, like, channels, rank)


def live_forward(module: nn.Module, input: Tensor) -> Tensor:
    """Convolve ``[batch, in, *sizes]`` with the kernel for the present values of the factors."""
    live: LiveKernel = module.__dict__[LIVE]
    device = input.device.type
    has_autocast = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
        affine = live.affine().dense()
    return apply_conv(input, live.geometry, affine.weight, affine.bias, affine.border)


def base_train(module: Any, mode: bool) -> Any:
    """Call ``train`` of the class that a norm had before."""
    return type(module)._nmconv_base.train(module, mode)


_THIS = f"{__name__}:"
_FOLDED_NORMS = "nmconv.merging.folded_norms:"
_HEAD = RewrittenMethod(
    "forward", "def forward(self, input):\n    return _live(self, input)\n", (("_live", _THIS + "live_forward"),)
)
_THROUGH = RewrittenMethod("forward", "def forward(self, input):\n    return input\n")
_NORM_ACT = RewrittenMethod(
    "forward",
    "def forward(self, x):\n    return _drop_and_act(self, x)\n",
    (("_drop_and_act", _FOLDED_NORMS + "drop_and_act"),),
)
_TRAIN = RewrittenMethod(
    "train",
    "def train(self, mode=True):\n    _warn(self, mode)\n    return _train(self, mode)\n",
    (("_warn", _FOLDED_NORMS + "warn_once"), ("_train", _THIS + "base_train")),
)


def why_not_live(module: nn.Module) -> str:
    """Return the reason why the module cannot be a factor of a live kernel, or ""."""
    if any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        return "a hook changes its spectral norm's vectors in every call (torch's older spectral_norm)"
    try:
        rewritten_class(type(module), (_THROUGH,))
    except RewriteError as error:
        return str(error)
    return ""


def make_live(
    model: nn.Module,
    head: str,
    removed: Iterable[str],
    nodes: tuple[RunNode, ...],
    geometry: Geometry,
    warned: WarnedKinds,
) -> None:
    """Let the module ``head`` compute the merged convolution, and let the others pass their input on.

    Args:
        model: The model, changed in place.
        head: Qualified name of the convolution whose place the merged one takes.
        removed: Qualified names of the other modules.
        nodes: The nodes of the run.
        geometry: The geometry of the merged convolution.
        warned: The model's WarnedKinds.
    """
    steps = steps_of(node.element for node in nodes)
    names = [step.name for step in steps if step.kind in ("conv", "norm")]
    live = LiveKernel(nodes, {name: model.get_submodule(name) for name in names}, geometry)
    for name in (head, *removed):
        module: Any = model.get_submodule(name)
        norm_act = is_norm_act(module)
        kind = folded_kind(module)
        if name == head:
            methods: tuple[RewrittenMethod, ...] = (_HEAD,)
            module.__dict__.update({LIVE: live, LEAF: True, "geometry": geometry})
        else:
            methods = (_NORM_ACT if norm_act else _THROUGH,)
            module.__dict__[PASS_THROUGH] = "act" if norm_act else "all"
        if kind:
            mark(module, kind, warned)
            methods = (*methods, _TRAIN)
        module.__class__ = rewritten_class(type(module), methods)
