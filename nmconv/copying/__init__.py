"""Copies of models: on the meta device, with cloned tensors, or with the tensors themselves."""

from nmconv.copying.deep_copy import copy_model
from nmconv.copying.held_objects import closure_contents, module_tensors, parts_of
from nmconv.copying.model_copies import Copy, copy_sharing_tensors, copy_with_tensors, meta_copy

__all__ = [
    "Copy",
    "closure_contents",
    "copy_model",
    "copy_sharing_tensors",
    "copy_with_tensors",
    "meta_copy",
    "module_tensors",
    "parts_of",
]
