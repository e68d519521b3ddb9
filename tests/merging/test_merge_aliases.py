"""One tensor under two names, written to in place under one of them: merging must see who reads what, and when."""

import pytest
import torch
from merge_nets import SHAPES, C, assert_agree, assert_near, conv, convs_of, made, merge, picture
from torch import nn

torch.set_num_threads(1)

ALIAS = {
    "identity": lambda self, x: self.i(x),
    "dropout": lambda self, x: self.d(x),
    "nothing": lambda self, x: x,
    "contiguous": lambda self, x: x.contiguous(),
    "view": lambda self, x: x.view(x.shape),
    "slice": lambda self, x: x[:],
    "to": lambda self, x: x.to(torch.float64),
}


def later_norm(self, x, y):
    y += self.a(x)
    return y + self.n(x)


def later_conv(self, x, y):
    y += self.a(x)
    return self.b(x) + y


def on_itself(self, x, y):
    y += y
    return self.a(x) + y


def scaled_in_place(self, x, y):
    z = self.a(x)
    y *= 2.0
    return z + x


def branch_written(self, x, y):
    z = self.a(x)
    w = self.alias(z)
    w += x
    return z + self.n(w)


@pytest.mark.parametrize("later", [later_norm, later_conv, on_itself, scaled_in_place, branch_written])
@pytest.mark.parametrize("alias", ALIAS)
@pytest.mark.parametrize("stem", [True, False])
def test_writing_through_another_name(alias, later, stem):
    """One tensor under two names, one of them written to in place: what reads the other sees it."""

    def forward(self, x):
        x = self.s(x) if stem else x
        return later(self, x, self.alias(x))

    parts = {"a": conv(), "b": conv(), "s": conv(1), "n": nn.BatchNorm2d(C), "i": nn.Identity(), "d": nn.Dropout()}
    model = made(forward, **parts)
    type(model).alias = ALIAS[alias]
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    one, other = picture(C, 8, 9), picture(C, 8, 9)
    with torch.no_grad():
        assert_near(merged(one), model(other))
    assert_near(one, other)


def test_the_callers_own_tensor_is_written_as_before():
    """``x += a(x)`` on the model's input is seen by the caller."""

    def forward(self, x):
        x += self.a(x)
        return x

    model = made(forward, a=conv())
    one, other = picture(C, 8, 9), picture(C, 8, 9)
    with torch.no_grad():
        assert_near(merge(model)(one), model(other))
    assert_near(one, other)


def identity_between(self, x):
    y = self.a(x)
    z = self.i(y)
    y *= 2.0
    return self.b(z)


def read_before(self, x):
    y = self.a(x)
    mean = y.mean((2, 3), keepdim=True)
    return self.b(self.i(y)) * mean


def read_after(self, x):
    y = self.a(x)
    z = self.b(self.i(y))
    return z, y


def written_after(self, x):
    y = self.a(x)
    z = self.b(self.i(y))
    y.zero_()
    return z


def input_written_between(self, x):
    x = self.s(x)
    y = self.a(x)
    x.zero_()
    return self.b(y) + x


def input_written_later(self, x):
    x = self.s(x)
    y = self.b(self.a(x))
    x.add_(1.0)
    return y + x


def half_written(self, x):
    y = self.a(x)
    y[:, :2] = 0.0
    return self.b(y)


def view_written(self, x):
    y = self.a(x)
    y.view(-1)[:7].mul_(3.0)
    return self.b(y)


def data_written(self, x):
    y = self.a(x)
    y.data[:, 0] += 1.0
    return self.b(y)


def stored(self, x):
    self.seen = self.a(x)
    return self.b(self.seen)


def listed(self, x):
    maps = [self.a(x)]
    maps.append(self.b(maps[-1]))
    return maps


def norm_in_place(self, x):
    y = self.a(x)
    z = self.n(y)
    y += 1.0
    return self.b(z) + y


RUNS = [
    identity_between, read_before, read_after, written_after, input_written_between, input_written_later, half_written,
    view_written, data_written, stored, listed, norm_in_place,
]  # fmt: skip


def test_example_inputs_are_only_read():
    """A model may write into what it is given; merging gives it copies."""

    def forward(self, x):
        x += x
        return self.b(self.a(x))

    model = made(forward, a=conv(1), b=conv(3))
    x = picture(C, 8, 9)
    merged = merge(model, example_inputs=x)
    assert torch.equal(x, picture(C, 8, 9))
    assert convs_of(merged, C, 8, 9) == 1
    assert assert_agree(merged, model, *SHAPES)


@pytest.mark.parametrize("forward", RUNS)
@pytest.mark.parametrize("first", ["a", "b"])
def test_writing_within_a_run(forward, first):
    """1x1 then 3x3, or 3x3 and then 1x1: a run but for what else happens to the maps between them."""
    kernels = {"a": 3 if first == "a" else 1, "b": 1 if first == "a" else 3}
    parts = {name: conv(kernel) for name, kernel in kernels.items()}
    model = made(forward, **parts, s=conv(1), i=nn.Identity(), n=nn.BatchNorm2d(C))
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    if forward is stored:
        with torch.no_grad():
            merged(picture(C, 8, 8)), model(picture(C, 8, 8))
        assert_near(merged.seen, model.seen)
    if forward in (read_before, read_after, half_written, view_written, stored, listed):
        assert convs_of(merged, C, 8, 8) == 2
