"""Hash a model's structure, independently of its weights, sizes, dtype, device, mode and classifier."""

from __future__ import annotations

import hashlib

from torch import nn

from nmconv.flow import Op, act_kind, is_conv, leaf_op, zoo
from nmconv.planning import Structure

__all__ = ["fingerprint"]

_CONV_ATTRIBUTES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


def fingerprint(model: nn.Module, structure: Structure) -> str:
    """Hash the names, kinds and extents of all convolutions and activations, and the data flow between them.

    Args:
        model: Not modified.
        structure: Its structure.

    Returns:
        16 hexadecimal digits. The classifier is left out.
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
            values = [getattr(module, attribute, None) for attribute in _CONV_ATTRIBUTES]
            digest.update(f"{name} conv {values}\n".encode())
    return digest.hexdigest()[:16]
