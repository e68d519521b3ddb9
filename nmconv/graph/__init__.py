"""Reading models: from an ``nn.Module`` to chains of convolutions and their activations. Changes nothing."""

from nmconv.graph._fingerprint import fingerprint
from nmconv.graph._structure import structure_of

__all__ = ["fingerprint", "structure_of"]
