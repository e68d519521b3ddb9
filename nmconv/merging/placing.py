"""Putting merged convolutions into a working copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from nmconv.algebra import (
    Refusal,
    affine_in_double,
    conv_from_affine,
    in_memory_format,
    is_channels_last,
    reference_tensor,
)
from nmconv.errors import RewriteError
from nmconv.finding import elements_from_json
from nmconv.flow import PASS_THROUGH, is_norm_act
from nmconv.merging.call_guards import guard_calls
from nmconv.merging.folded_norms import AfterNorm, FoldedDropout, FoldedNorm, WarnedKinds, folded_kind, warned_kinds
from nmconv.merging.live_kernels import LIVE, make_live
from nmconv.merging.nodes import RunNode, geometry_of_nodes, nodes_of
from nmconv.merging.report import Merge, get_merges
from nmconv.surgery import MERGED, Edit, rewrite_methods, rewritten_class

__all__ = ["bake", "install", "rewrite_forwards"]

_Slots = dict[int, list[tuple[nn.Module, str]]]  # by id of a module, the parents and names it is registered under


def rewrite_forwards(
    model: nn.Module, merges: Sequence[Merge], argument_structure: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, RewriteError]]:
    """Rewrite forwards without the additions that merges remove.

    Args:
        model: The model, only read.
        merges: The merges to carry out in it.
        argument_structure: By owner of a sum, the call signature of its forward.

    Returns:
        The rewritten forwards, and the reasons why others cannot be rewritten, each by owner.
    """
    edits: dict[tuple[str, str], Edit] = {}
    for merge in merges:
        for addition in merge.sums:
            edit = edits.setdefault((addition.owner, "forward"), Edit(argument_structure.get(addition.owner, "")))
            edit.sums.append(addition)
    methods: dict[str, Any] = {}
    failed: dict[str, RewriteError] = {}
    for (owner, _), written in rewrite_methods(model, edits, ()).items():
        if isinstance(written, RewriteError):
            failed[owner] = written
        else:
            methods[owner] = written
    return methods, failed


def install(
    model: nn.Module, merges: Sequence[Merge], convs: Mapping[str, nn.Module], methods: Mapping[str, Any]
) -> None:
    """Carry out merges.

    Args:
        model: The model, changed in place.
        merges: The merges to carry out.
        convs: The merged convolutions by :attr:`Merge.head`, without those of live merges.
        methods: From :func:`rewrite_forwards`.
    """
    slots = _slots(model)
    warned = warned_kinds(model)
    for merge in merges:
        if merge.live:
            nodes = _live_nodes(model, merge)
            make_live(model, merge.head, merge.removed, nodes, merge.geometry, warned)
            continue
        remains = {name: _remainder(model.get_submodule(name), warned, bool(merge.norm)) for name in merge.removed}
        _replace_modules(model, slots, {**remains, merge.head: convs[merge.head]})
    for owner, method in methods.items():
        module = model.get_submodule(owner)
        module.__class__ = rewritten_class(type(module), (method,))
    rounds = (*get_merges(model), tuple(merges))
    guard_calls(model, (merge for merges in rounds for merge in merges), methods)
    model.__dict__[MERGED] = rounds


def bake(model: nn.Module) -> None:
    """Replace live kernels by plain convolutions, as if the merges had not been live."""
    rounds = get_merges(model)
    live = [merge for merges in rounds for merge in merges if merge.live]
    if not live:
        return
    slots, channels_last = _slots(model), is_channels_last(model)
    warned = warned_kinds(model)
    for merge in live:
        head: Any = model.get_submodule(merge.head)
        conv = in_memory_format(
            conv_from_affine(head.__dict__[LIVE].affine(affine_in_double), reference_tensor(head), merge.trainable),
            channels_last,
        )
        remains = {name: _remainder(model.get_submodule(name), warned, False) for name in merge.removed}
        _replace_modules(model, slots, {**remains, merge.head: conv})
    model.__dict__[MERGED] = tuple(
        tuple(replace(merge, live=False, factors="") for merge in merges) for merges in rounds
    )


def _slots(model: nn.Module) -> _Slots:
    slots: _Slots = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            slots.setdefault(id(child), []).append((parent, name))
    return slots


def _replace_modules(model: nn.Module, slots: _Slots, changes: Mapping[str, nn.Module]) -> None:
    for name, module in changes.items():
        for parent, slot in slots[id(model.get_submodule(name))]:
            parent._modules[slot] = module


def _live_nodes(model: nn.Module, merge: Merge) -> tuple[RunNode, ...]:
    """Return the nodes that a live merge computes its kernel from.

    Raises:
        ValueError: If the model's modules do not compose to the convolution that the merge describes.
    """
    elements = elements_from_json(merge.factors)
    sizes = tuple(max(extent, 1) for extent in merge.geometry.extent)
    nodes = nodes_of(model.get_submodule, elements, merge.geometry.in_channels, sizes)
    try:
        geometry = geometry_of_nodes(nodes, merge.geometry.in_channels, merge.geometry.rank)
    except Refusal as refusal:
        raise ValueError(f"{merge.head}: {refusal}") from refusal
    if geometry != merge.geometry:
        raise ValueError(f"{merge.head}: its factors compose to another convolution than the one described")
    return nodes


def _remainder(module: nn.Module, warned: WarnedKinds, keeps_norm: bool) -> nn.Module:
    """Return what remains of a module that is folded away.

    Args:
        module: The module.
        warned: The model's WarnedKinds.
        keeps_norm: Whether a norm stays after the merged convolution, so that training needs no warning.
    """
    remainder: nn.Module = nn.Identity()
    warned_norms = WarnedKinds(norm=True) if keeps_norm else warned
    kind = folded_kind(module)
    if is_norm_act(module) or module.__dict__.get(PASS_THROUGH) == "act":
        after = AfterNorm(module, warned_norms)
        is_identity = isinstance(after.act, nn.Identity) and isinstance(after.drop, nn.Identity)
        remainder = FoldedNorm(warned_norms) if is_identity else after
    elif kind:
        remainder = FoldedNorm(warned_norms) if kind == "norm" else FoldedDropout(warned)
    remainder.training = module.training
    return remainder
