"""A model's structure in one short text: the same for any weights, sizes, dtype, device, mode and classifier."""

from __future__ import annotations

import hashlib

from torch import nn

from nmconv.flow import Op, act_kind, is_conv, leaf_op, zoo
from nmconv.planning import Structure

__all__ = ["fingerprint"]

_SHOWN = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


def fingerprint(model: nn.Module, structure: Structure) -> str:
    """Hash of names, kinds and extents of all convolutions and activations, and of what the forward does with them.

    The classifier is left out.
    """
    classifier = zoo.classifier_names(model)
    digest = hashlib.sha256(structure.digest().encode())
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name == head or name.startswith(f"{head}.") for head in classifier):
            continue
        op = leaf_op(module)
        if op is Op.ACT:
            digest.update(f"{name} {act_kind(module)}\n".encode())
        elif op is Op.CONV or is_conv(module):
            values = [getattr(module, attribute, None) for attribute in _SHOWN]
            digest.update(f"{name} conv {values}\n".encode())
    return digest.hexdigest()[:16]
