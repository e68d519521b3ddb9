"""Doing to a pristine model what a file says was done, deciding nothing again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nmconv.algebra import Refusal, conv_module, is_channels_last, laid_out, like_of
from nmconv.errors import NmconvError
from nmconv.io.content import Content
from nmconv.io.merge_checks import check_merges
from nmconv.io.problems import DamagedFile, ForeignFile
from nmconv.merging import Merge, install, trains, write_methods
from nmconv.surgery import ResolvedPlan, change

__all__ = ["Homes", "replay"]

Homes = dict[nn.Module, torch.device]  # where the parameters of a merged convolution belong


def replay(model: nn.Module, content: Content, carried: ResolvedPlan | None, takes: Mapping[str, str]) -> Homes:
    """Convert and merge the model in place. What is merged stands on the meta device: nothing is allocated.

    Args:
        model: A working copy of a pristine one.
        content: What is to be done.
        carried: Its plan, carried over to the model.
        takes: Of each module whose forward makes a sum that goes, the structure of that forward's arguments.

    Raises:
        Foreign, Damaged: If it cannot be done on this model, which is then left half changed.
    """
    homes: Homes = {}
    try:
        if content.plan is not None and carried is not None:
            change(model, content.plan, carried, gradual=bool(content.slopes))
        for merges in content.merges:
            check_merges(model, merges)
            _merge(model, merges, takes, homes)
    except (DamagedFile, ForeignFile):
        raise
    except (NmconvError, Refusal, ValueError) as error:  # this model is not the one that it was made for
        raise ForeignFile(f"what it says cannot be done to this {type(model).__name__}: {error}") from error
    return homes


def _merge(model: nn.Module, merges: Sequence[Merge], takes: Mapping[str, str], homes: Homes) -> None:
    methods, failed = write_methods(model, merges, takes)
    for error in failed.values():
        raise error
    convs: dict[str, nn.Module] = {}
    last = is_channels_last(model)
    for merge in merges:
        if merge.live:  # its factors stay where they are
            continue
        head: Any = model.get_submodule(merge.head)
        weight = like_of(head)
        made = laid_out(conv_module(merge.geometry, torch.empty(0, dtype=weight.dtype, device="meta")), last)
        made.requires_grad_(trains(model.get_submodule, (merge.head, *merge.removed)))
        made.training = head.training
        homes[made] = homes.pop(head, weight.device)
        convs[merge.head] = made
    install(model, merges, convs, methods)
