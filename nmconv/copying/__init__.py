"""Copies of models: on the meta device, with cloned tensors, or with the tensors themselves."""

from nmconv.copying.deep_copy import copy_of
from nmconv.copying.held_objects import module_tensors
from nmconv.copying.model_copies import Copy, meta_copy, real_copy, structure_copy

__all__ = ["Copy", "copy_of", "meta_copy", "module_tensors", "real_copy", "structure_copy"]
