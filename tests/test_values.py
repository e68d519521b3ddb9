"""Shapes by formula instead of by fake tensors: those that the convolution gives, or none."""

import itertools

import pytest
import torch
from torch import nn

from nmconv.graph._values import _convolved


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shapes_are_those_of_the_convolution(rank):
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    for kernel, stride, dilation, padding, mode in itertools.product(
        (1, 2, 3), (1, 2), (1, 2), (0, 1), ("zeros", "circular")
    ):
        conv = cls(4, 6, kernel, stride, padding, dilation, groups=2, padding_mode=mode)
        for size in (5, 6, 8):
            x = torch.zeros(3, 4, *range(size, size + rank))
            assert _convolved(conv, x) == tuple(conv(x).shape)


def test_where_the_convolution_has_the_last_word():
    conv, x = nn.Conv2d(4, 6, 3), torch.zeros(2, 4, 5, 5)
    assert _convolved(conv, x) == (2, 6, 3, 3)
    assert _convolved(conv, x[0]) is None  # without a batch
    assert _convolved(conv, x[:, :3]) is None and _convolved(conv, x[..., :2]) is None  # an error
    assert _convolved(conv, x.double()) is None and _convolved(conv, [x]) is None
    assert _convolved(nn.Conv2d(4, 6, 3, padding="same"), x) is None
    assert _convolved(nn.ConvTranspose2d(4, 6, 3), x) is None
    conv.forward = lambda x: x
    assert _convolved(conv, x) is None

    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)[:1]

    assert _convolved(Own(4, 6, 3), x) is None
