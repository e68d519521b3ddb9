"""A network of three convolutions and two activations, from which the others of these tests derive."""

import torch
from torch import nn


def conv(inputs=4, outputs=4, size=3):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def picture(batch=2, size=16):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three convolutions and two activations; `skip` names activations that the forward leaves out."""

    skip = ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = conv(3), conv(), conv()
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def run(self, name, x):
        return x.clone() if name in self.skip else getattr(self, name)(x)
