"""Shapes by formula instead of by fake tensors: those that the convolution gives, or none."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nmconv.graph._values import Unknown, Values, _slid


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shapes_are_those_of_the_convolution(rank):
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    for kernel, stride, dilation, padding, mode in itertools.product(
        (1, 2, 3), (1, 2), (1, 2), (0, 1), ("zeros", "circular")
    ):
        conv = cls(4, 6, kernel, stride, padding, dilation, groups=2, padding_mode=mode)
        for size in (5, 6, 8):
            x = torch.zeros(3, 4, *range(size, size + rank))
            assert _slid(conv, x) == tuple(conv(x).shape)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Max", "Avg"])
def test_shapes_are_those_of_the_pool(rank, kind):
    cls = getattr(nn, f"{kind}Pool{rank}d")
    for kernel, stride, padding in itertools.product((2, 3, (3, 2, 4)[:rank]), (None, 2), (0, 1)):
        pool = cls(kernel, stride, padding)
        for size in (5, 6, 8):
            x = torch.zeros(3, 4, *range(size, size + rank))
            assert _slid(pool, x) == tuple(pool(x).shape)
    x = torch.zeros(3, 4, *range(5, 5 + rank))
    assert _slid(cls(2, ceil_mode=True), x) is None
    assert _slid(cls(1, 1, 1), x) is None  # an error
    assert _slid(cls([2] * rank), x) == _slid(cls((2,)), x) == _slid(cls(2), x)
    assert _slid(cls((2,) * 4), x) is None
    assert kind == "Avg" or _slid(cls(2, return_indices=True), x) is None


class Net(nn.Module):
    """Whose values keep the shape they had, or only seem to."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        y = self.pool(x).relu_()
        x = x + x.mean((2, 3), keepdim=True)  # its second is smaller
        x = x.mean((2, 3), keepdim=True) + x  # its first is
        y += torch.add(y, y)
        y = y.add(y, alpha=2).sub(x.shape[0]) + self.scale
        z = F.leaky_relu(input=y.flatten(1))
        return x.flatten(1), torch.add(z, z, out=torch.empty_like(z)), y.half() + y.double(), y + [1, 2][0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_shape_of_a_network(device):
    net = Net().eval()
    graph = torch.fx.symbolic_trace(net)
    x, wanted = torch.randn(2, 3, 8, 6), {}

    class Shapes(torch.fx.Interpreter):
        def run_node(self, n):
            made = super().run_node(n)
            wanted[n] = (tuple(made.shape), made.dtype) if isinstance(made, torch.Tensor) else None
            return made

    with torch.no_grad():
        Shapes(graph).run(x)
    values = Values(graph.to(device))
    values.set(next(iter(graph.graph.nodes)), x)
    found = 0
    for node, shape in wanted.items():
        if shape is None or node.op == "output":
            continue
        assert (values.shape(node), values.get(node).dtype) == shape, node
        assert values.shape(node) == tuple(values.get(node).shape), node
        found += 1
    assert found > 15
    with pytest.raises(Unknown, match="no tensor"):
        values.shape(next(node for node in graph.graph.nodes if node.target is getattr))


def test_where_the_convolution_has_the_last_word():
    conv, x = nn.Conv2d(4, 6, 3), torch.zeros(2, 4, 5, 5)
    assert _slid(conv, x) == (2, 6, 3, 3)
    assert _slid(conv, x[0]) is None  # without a batch
    assert _slid(conv, x[:, :3]) is None and _slid(conv, x[..., :2]) is None  # an error
    assert _slid(conv, x.double()) is None
    assert _slid(nn.Conv2d(4, 6, 3, padding="same"), x) is None
    assert _slid(nn.ConvTranspose2d(4, 6, 3), x) is None
    conv.forward = lambda x: x
    assert _slid(conv, x) is None

    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)[:1]

    assert _slid(Own(4, 6, 3), x) is None
