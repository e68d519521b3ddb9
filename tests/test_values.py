"""Shapes by formula instead of by fake tensors: those that the convolution gives, or none."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import net
from torch import nn

import nmconv
from nmconv.graph._rules import shape_of_function, shape_of_module
from nmconv.graph._values import Unknown, Values


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shapes_are_those_of_the_convolution(rank):
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    for kernel, stride, dilation, padding, mode in itertools.product(
        (1, 2, 3), (1, 2), (1, 2), (0, 1), ("zeros", "circular")
    ):
        conv = cls(4, 6, kernel, stride, padding, dilation, groups=2, padding_mode=mode)
        for size in (5, 6, 8):
            x = torch.zeros(3, 4, *range(size, size + rank))
            assert shape_of_module(conv, x) == tuple(conv(x).shape)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Max", "Avg"])
def test_shapes_are_those_of_the_pool(rank, kind):
    cls = getattr(nn, f"{kind}Pool{rank}d")
    for kernel, stride, padding in itertools.product((2, 3, (3, 2, 4)[:rank]), (None, 2), (0, 1)):
        pool = cls(kernel, stride, padding)
        for size in (5, 6, 8):
            x = torch.zeros(3, 4, *range(size, size + rank))
            assert shape_of_module(pool, x) == tuple(pool(x).shape)
    x = torch.zeros(3, 4, *range(5, 5 + rank))
    assert shape_of_module(cls(2, ceil_mode=True), x) is None
    assert shape_of_module(cls(1, 1, 1), x) is None  # an error
    assert shape_of_module(cls([2] * rank), x) == shape_of_module(cls((2,)), x) == shape_of_module(cls(2), x)
    assert shape_of_module(cls((2,) * 4), x) is None
    assert kind == "Avg" or shape_of_module(cls(2, return_indices=True), x) is None


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
    assert shape_of_module(conv, x) == (2, 6, 3, 3)
    assert shape_of_module(conv, x[0]) is None  # without a batch
    assert shape_of_module(conv, x[:, :3]) is None and shape_of_module(conv, x[..., :2]) is None  # an error
    assert shape_of_module(conv, x.double()) is None
    assert shape_of_module(nn.Conv2d(4, 6, 3, padding="same"), x) is None
    assert shape_of_module(nn.ConvTranspose2d(4, 6, 3), x) is None
    conv.forward = lambda x: x
    assert shape_of_module(conv, x) is None

    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)[:1]

    assert shape_of_module(Own(4, 6, 3), x) is None


def test_a_linear_layer_and_adaptive_pools():
    line, x = nn.Linear(5, 7), torch.zeros(2, 3, 5)
    assert shape_of_module(line, x) == (2, 3, 7) and shape_of_module(line, x[0, 0]) == (7,)
    assert shape_of_module(line, x[..., :4]) is None and shape_of_module(line, x.double()) is None
    for rank, cls in enumerate((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), 1):
        x = torch.zeros(2, 3, *range(4, 4 + rank))
        for size in (1, 2, 9, (3,) * rank, [2] * rank, (None,) * rank):
            if rank > 1 or size != (None,):
                assert shape_of_module(cls(size), x) == tuple(cls(size)(x).shape)
        assert shape_of_module(cls(None), x) is None and (rank > 1 or shape_of_module(cls((None,)), x) is None)
        assert shape_of_module(cls(1), x[0]) is None and shape_of_module(cls((1,) * (rank + 1)), x) is None


A, B = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 1, 1)
CALLS = {
    "sum": lambda x, y: x + y,
    "small + large": lambda x, y: y + x,
    "fewer extents": lambda x, y: x * y[0],
    "more extents": lambda x, y: y[0] - x,
    "a number": lambda x, y: x / 3,
    "in place": lambda x, y: x.clone().mul_(y),
    "mean": lambda x, y: x.mean((2, 3)),
    "mean, one axis": lambda x, y: torch.mean(x, 1),
    "mean, kept": lambda x, y: x.mean(dim=(-1, 0), keepdim=True),
    "mean, kept by position": lambda x, y: torch.mean(x, (1, 2), True),
    "cat": lambda x, y: torch.cat([x, x], 1),
    "cat from behind": lambda x, y: torch.cat((x, x, x), dim=-2),
    "cat of one": lambda x, y: torch.concat([y]),
}
NONE = {
    "no sizes that fit": lambda x, y: x + x[:, :2],
    "larger in place": lambda x, y: y.add_(x),
    "other dtypes": lambda x, y: x * y.double(),
    "whole numbers": lambda x, y: x.long() / y.long(),
    "rounded": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "mean of all": lambda x, y: x.mean(),
    "mean in another dtype": lambda x, y: x.mean(1, dtype=torch.float64),
    "mean, one axis twice": lambda x, y: x.mean((1, -3)),
    "mean, no such axis": lambda x, y: x.mean(4),
    "cat of unlike": lambda x, y: torch.cat([x, y], 1),
    "cat of other dtypes": lambda x, y: torch.cat([x, x.double()]),
    "cat, no such axis": lambda x, y: torch.cat([x], 4),
}


def told(call):
    """What the rule says of the last call that ``call`` makes, and what it gives, if anything."""
    made = {}

    class Net(torch.nn.Module):
        def forward(self, x, y):
            return call(x, y)

    graph = torch.fx.symbolic_trace(Net()).graph

    class Running(torch.fx.Interpreter):
        def run_node(self, n):
            made[n] = super().run_node(n)
            return made[n]

    last = list(graph.nodes)[-2]
    with contextlib.suppress(Exception):
        Running(torch.fx.GraphModule(torch.nn.Module(), graph)).run(A.clone(), B.clone())
    given = [
        [made[each] for each in part]
        if isinstance(part, (list, tuple)) and part and isinstance(part[0], torch.fx.Node)
        else made.get(part, part)
        if isinstance(part, torch.fx.Node)
        else part
        for part in last.args
    ]
    return shape_of_function(last, given), made.get(last)


@pytest.mark.parametrize("call", CALLS)
def test_rules_say_what_functions_give(call):
    shape, value = told(CALLS[call])
    assert shape == tuple(value.shape) and value.dtype == torch.float32


@pytest.mark.parametrize("call", NONE)
def test_rules_say_nothing_else(call):
    assert told(NONE[call])[0] is None


def strided(self, y):
    z = y[:, :, ::2] * 0.5
    return self.act(y) if z.is_contiguous() else y


def given_anew(self, y):
    return self.act(y) if self.fc(y.permute(0, 2, 3, 1)).shape[-1] == 8 else y


def cast(self, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.act(y) if self.fc(y.permute(0, 2, 3, 1)).dtype == torch.bfloat16 else y


def viewed(self, y):
    one, other = y.contiguous().chunk(2, 1)
    return self.act(y) if (one * other).view(-1, *y.shape[2:]).shape[0] > 3 else y


def permuted(self, y):
    z = y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    z = torch.cat([z * torch.ones(8, 1, 1), z], 1).permute(0, 2, 3, 1)
    return self.act(y) if z.view(-1, 16).shape[0] > 3 else y


def scaled(self, y):
    return self.act(y) if (y * np.sqrt(0.5)).shape[-1] > 4 else y


FORKS = [strided, given_anew, cast, viewed, permuted, scaled]


@pytest.mark.parametrize("forward", FORKS, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_forward_that_goes_by_shapes_strides_and_dtypes_goes_as_it_does(forward, memory):
    """The calls that the plan names are those that are really made; hooks judge."""
    fc = nn.Linear(8, 5)
    fc.weight, fc.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))
    fork = net(forward, act=nn.ReLU(), fc=fc)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), fork, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    model, x = model.eval().to(memory_format=memory), torch.randn(2, 3, 16, 16)
    called = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(x)
    for module in model.modules():
        module._forward_hooks.clear()
    plan = nmconv.make_plan(model, "2:1", example_inputs=x)
    assert not plan.untraced
    assert [site.name for site in plan.sites if site.step] == called


def test_a_number_of_numpys_leaves_shapes_known():
    def forward(self, x):
        return self.c(self.b(F.relu(self.a(x)) * np.sqrt(0.5)))

    model = net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3), c=nn.Conv2d(8, 8, 3)).eval()
    (run,) = nmconv.find_runs(model, example_inputs=torch.randn(2, 3, 9, 9))
    assert run.size == (7, 7)
