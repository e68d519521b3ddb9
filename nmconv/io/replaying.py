"""Replaying a file's plan and merges on a pristine model, without deciding anything again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nmconv.algebra import Refusal, conv_module, in_memory_format, is_channels_last, reference_tensor
from nmconv.errors import NmconvError
from nmconv.io.content import FileContent
from nmconv.io.merge_checks import check_merges
from nmconv.io.problems import DamagedFile, ForeignFile
from nmconv.merging import Merge, any_requires_grad, install, rewrite_forwards
from nmconv.surgery import ResolvedPlan, make_changes

__all__ = ["TargetDevices", "replay"]

TargetDevices = dict[nn.Module, torch.device]  # the devices that the parameters of merged convolutions belong on


def replay(
    model: nn.Module, content: FileContent, resolved: ResolvedPlan | None, argument_structure: Mapping[str, str]
) -> TargetDevices:
    """Convert and merge the model in place. Merged convolutions are on the meta device, so that nothing is allocated.

    Args:
        model: A working copy of a pristine model.
        content: The plan and the merges.
        resolved: Its plan, resolved for the model.
        argument_structure: By owner of a sum that is removed, the call signature of its forward.

    Returns:
        The devices that the merged convolutions belong on.

    Raises:
        ForeignFile: If it cannot be done with this model, which is left half changed.
        DamagedFile: If it cannot be done with any model.
    """
    devices: TargetDevices = {}
    try:
        if content.plan is not None and resolved is not None:
            make_changes(model, content.plan, resolved, gradual=bool(content.slopes))
        for merges in content.merges:
            check_merges(model, merges)
            _merge(model, merges, argument_structure, devices)
    except (DamagedFile, ForeignFile):
        raise
    except (NmconvError, Refusal, ValueError) as error:
        raise ForeignFile(f"what it says cannot be done to this {type(model).__name__}: {error}") from error
    return devices


def _merge(
    model: nn.Module, merges: Sequence[Merge], argument_structure: Mapping[str, str], devices: TargetDevices
) -> None:
    methods, failed = rewrite_forwards(model, merges, argument_structure)
    for error in failed.values():
        raise error
    convs: dict[str, nn.Module] = {}
    channels_last = is_channels_last(model)
    for merge in merges:
        if merge.live:  # its factors stay in place
            continue
        head: Any = model.get_submodule(merge.head)
        like = reference_tensor(head)
        conv = in_memory_format(
            conv_module(merge.geometry, torch.empty(0, dtype=like.dtype, device="meta")), channels_last
        )
        conv.requires_grad_(any_requires_grad(model.get_submodule, (merge.head, *merge.removed)))
        conv.training = head.training
        devices[conv] = devices.pop(head, like.device)
        convs[merge.head] = conv
    install(model, merges, convs, methods)
