"""Doing to a pristine model what a file says was done, deciding nothing again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nmconv.errors import NmconvError, NoEffectWarning
from nmconv.io._content import Content
from nmconv.io._fit import check_merges, check_plan
from nmconv.io._problems import Damaged, Foreign
from nmconv.merging import (
    Merge,
    conv_module,
    install,
    is_channels_last,
    laid_out,
    like_of,
    trains,
    write_methods,
)
from nmconv.planning import Refusal
from nmconv.recording import Recordings
from nmconv.surgery import apply_plan, check_flow

__all__ = ["Homes", "replay"]

Homes = dict[nn.Module, torch.device]  # where the parameters of a merged convolution belong


def replay(model: nn.Module, content: Content, recordings: Recordings | None) -> Homes:
    """Convert and merge the model in place. What is merged stands on the meta device: nothing is allocated.

    Args:
        model: Pristine.
        content: What is to be done.
        recordings: Of the model, if its data flow is to be compared with the plan's.

    Raises:
        Foreign, Damaged: If it cannot be done on this model, which is then left half changed.
    """
    homes: Homes = {}
    try:
        if content.plan is not None:
            check_plan(model, content.plan)
            if recordings is not None:
                check_flow(model, content.plan, recordings)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NoEffectWarning)
                apply_plan(model, content.plan, inplace=True, witness=False)
        for merges in content.merges:
            check_merges(model, merges)
            _merge(model, merges, homes)
    except (Damaged, Foreign):
        raise
    except (NmconvError, Refusal, ValueError) as error:  # this model is not the one that it was made for
        raise Foreign(f"what it says cannot be done to this {type(model).__name__}: {error}") from error
    return homes


def _merge(model: nn.Module, merges: Sequence[Merge], homes: Homes) -> None:
    methods, failed = write_methods(model, merges)
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
