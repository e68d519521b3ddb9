"""Copies of models: on the meta device, with copied tensors, or with the tensors themselves."""

from nmconv.copying.copies import Copy, check_copy, meta_copy, real_copy, shared_on_copy, structure_copy
from nmconv.copying.deep_copy import copy_of

__all__ = ["Copy", "check_copy", "copy_of", "meta_copy", "real_copy", "shared_on_copy", "structure_copy"]
